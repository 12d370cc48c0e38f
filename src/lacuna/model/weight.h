// A weight as a device holds it for products, whatever the form.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <variant>
#include <vector>

#include "lacuna/format/compact.h"
#include "lacuna/format/row_product.h"
#include "lacuna/kernels/select.h"
#include "lacuna/model/torch.h"

namespace lacuna::model {

/// W [out, in], never changed once made. Each form is a class in a file of its own:
///
///   RowWeight      CPU: rows that kernels walk, dense, a bitmap, blocks or slices
///   CodedWeight    CPU: a stream of int8 or int4 codes
///   StoredWeight   CPU: codes as they are stored, expanded for each product
///   GpuWeight      GPU: packed for a kernel, or dense with one
///   DeviceCompact  GPU: as it is stored, expanded for each product
///   FastestWeight  GPU: several of these, by the number of tokens
///   TorchWeight    anywhere: a tensor and torch's product
///   WeightSlice    some rows of another
class Weight {
 public:
  virtual ~Weight() = default;
  Weight(const Weight&) = delete;
  Weight& operator=(const Weight&) = delete;
  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  /// The device, and the type of x and y.
  const Compute& compute() const { return compute_; }

  /// x W^T + bias, on whatever is fastest for so many tokens. @param x [..., in] -> [..., out]
  virtual at::Tensor multiply(const at::Tensor& x, const std::optional<at::Tensor>& bias) const;
  /// The same on raw memory of the device, contiguous, in the type of the computation and aligned
  /// to 16 bytes. On a GPU it goes onto torch's current stream.
  virtual void run(const format::RowProduct& product, const Executor& executor) const;
  /// W densely, itself or in the shared scratch: good until the next expansion on this thread.
  virtual at::Tensor expanded() const = 0;
  /// Writes rows of W: ids [count], each in 0..out-1 -> out [count, in], all in memory of the CPU.
  virtual void read_rows(const int32_t* ids, int64_t count, void* out,
                         const Executor& executor) const;
  /// Bytes that stay in memory.
  virtual size_t bytes() const = 0;
  /// Whether expanded() has to expand.
  virtual bool is_compact() const { return true; }
  /// Whether codes are held, of which looking rows up expands those rows alone.
  virtual bool is_coded() const { return false; }
  /// Whether run() on a GPU allocates nothing once it has been called, so that it can be recorded.
  virtual bool recordable() const { return true; }
  /// The problem of one token that a kernel of the CPU was planned for.
  virtual std::optional<kernels::Problem> decode_problem() const { return std::nullopt; }

 protected:
  Weight(int64_t rows, int64_t columns, const Compute& compute)
      : rows_(rows), columns_(columns), compute_(compute) {}

 private:
  int64_t rows_, columns_;
  Compute compute_;
};

using WeightPtr = std::shared_ptr<const Weight>;

/// A dense tensor [out, in], where and in what type it is.
WeightPtr dense_weight(at::Tensor weight);
/// The same by torch's product, whatever kernels there are.
WeightPtr plain_weight(at::Tensor weight);
/// @errors kBadInput: what the kernels can't take (named); kUsage, kNotPossible: what LACUNA_FORCE
/// asks for
Result<WeightPtr> compact_weight(format::CompactMatrix weight, const Compute& compute);
/// A weight on a GPU packed for its kernels, as `compute` asks for: once, for as many tokens as are
/// decoded at once, or in every form (FastestWeight). Null where no kernel takes it and one form is
/// asked for.
/// @param dense, scales  as GpuWeight::make has them
Result<WeightPtr> packed_weight(const kernels::Problem& problem, const Compute& compute,
                                const std::function<at::Tensor()>& dense,
                                const at::Tensor& scales = {});
/// What a matrix's codes are packed from on a GPU: the codes as numbers, dense, in the type of the
/// computation. Good until the next expansion on this thread.
at::Tensor codes_as_numbers(const format::CompactMatrix& matrix, const Compute& compute);
/// Rows [first, first + rows) of another weight, which lives on.
WeightPtr slice_of(WeightPtr whole, int64_t first, int64_t rows);

/// What a checkpoint holds: a tensor on the device and in the type of the computation, or a compact
/// matrix; or several of these, packed for their kernels.
using StoredMatrix = std::variant<at::Tensor, format::CompactMatrix, WeightPtr>;
/// All rows of the parts as one, or nothing where their forms differ. On a CPU what kernels will
/// walk comes to lie in large pages, also of one part: a mapped file has small ones.
/// @param parts  at least one, none packed
std::optional<StoredMatrix> stacked(const std::vector<StoredMatrix>& parts, const Compute& compute);
/// Weights of any of these forms.
Result<WeightPtr> weight_of(StoredMatrix stored, const Compute& compute);

/// The one token that candidates are asked about.
/// @param sparsity  share of zeros
kernels::Problem decode_problem_of(const format::Pattern& pattern, DType values, int64_t rows,
                                   int64_t columns, double sparsity, const Compute& compute);

}  // namespace lacuna::model
