// A weight on the CPU whose rows kernels walk: dense, compact, slices of non-zeros, or a
// stream of values.
#pragma once

#include <variant>
#include <vector>

#include "lacuna/kernels/linear.h"
#include "lacuna/kernels/linear_csr/slices.h"
#include "lacuna/kernels/linear_stream/value_stream.h"
#include "lacuna/model/weight.h"

namespace lacuna::model {

/// y = x W^T + b by the linear operations of kernels/: up to format::kMaxTokens tokens planned
/// once, more where a kernel takes them (bf16 with AMX); else W is expanded into the scratch,
/// unless it is dense, and takes the dense product.
class RowWeight final : public Weight {
 public:
  /// Whether kernels walk such a tensor: on the CPU, contiguous, f32, bf16 or f16.
  static bool takes(const at::Tensor& weight);
  /// @param weight  one that it takes
  static Result<WeightPtr> dense(at::Tensor weight);
  /// @param matrix  without codes, or with fp8 codes that don't lie in blocks
  /// @param problem  of one token, with its operation; the matrix becomes slices if that is
  /// linear_csr, a stream if it is linear_stream
  static Result<WeightPtr> compact(format::CompactMatrix matrix, const kernels::Problem& problem,
                                   const Compute& compute);
  /// The rows of several matrices, one below the other, as a stream. ValueStream::pack says which
  /// @errors as there
  static Result<WeightPtr> stream(const std::vector<format::CompactMatrix>& parts,
                                  const kernels::Problem& problem, const Compute& compute);

  at::Tensor multiply(const at::Tensor& x, const std::optional<at::Tensor>& bias) const override;
  void run(const format::RowProduct& product, const Executor& executor) const override;
  at::Tensor expanded() const override;
  size_t bytes() const override;
  bool is_compact() const override { return !std::holds_alternative<at::Tensor>(held_); }
  bool is_coded() const override { return view_.dtype == DType::kF8E4M3; }
  void read_rows(const int32_t* ids, int64_t count, void* out,
                 const Executor& executor) const override;
  std::optional<kernels::Problem> decode_problem() const override { return plans_.front().problem; }

  using Held = std::variant<at::Tensor, format::CompactRows, kernels::linear_csr::Slices,
                            kernels::linear_stream::ValueStream>;
  RowWeight(Held held, int64_t rows, int64_t columns, const Compute& compute);

 private:
  static Result<WeightPtr> planned(Held held, kernels::Problem problem, const Compute& compute);
  /// What takes so many tokens of this type, or null: no kernel does without a dense copy.
  /// @param many  holds the plan for more than kMaxTokens
  const kernels::LinearPlan* plan_for(DType dtype, int64_t tokens,
                                      std::optional<kernels::LinearPlan>& many) const;
  void run_plan(const kernels::LinearPlan& plan, const format::RowProduct& product,
                const Executor& executor) const;

  Held held_;
  const kernels::LinearOperation* operation_ = nullptr;
  format::RowsView view_;                   // into held_
  std::vector<kernels::LinearPlan> plans_;  // for 1, 2, ... tokens
};

}  // namespace lacuna::model
