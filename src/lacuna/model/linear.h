// A Linear layer that is dense or compact, and looks the same from outside.
#pragma once

#include <ATen/ATen.h>

#include <memory>
#include <optional>
#include <vector>

#include "lacuna/io/checkpoint.h"
#include "lacuna/model/weight.h"

namespace lacuna::model {

/// Counts what Linear::forward and forward_into take, for profiles.
struct LinearClock {
  int64_t nanoseconds = 0, calls = 0;
};
/// Has every Linear count into `clock` from now on; null (as at the start) counts nothing and costs
/// a comparison. One thread at a time may run Linears while a clock is set.
void set_linear_clock(LinearClock* clock);

/// y = x W^T + b. On the CPU up to 16 tokens run on the linear operations of kernels/, dense
/// weights too, and any number where a kernel expands the weight tile by tile (bf16 with AMX); on a
/// GPU up to 64 where liblacuna_cuda.so has a kernel for the weight (in bf16 and f16 on compute
/// capability 9.0; docs/kernels.md lists them). A compact weight stays compact in
/// memory: more tokens, other codes and what no kernel takes expand it into a scratch shared by all
/// layers and take the dense product. On a GPU a quantised weight is expanded once, when it is
/// loaded, and is a dense one from then on.
class Linear {
 public:
  Linear() = default;
  /// @param weight [out, in] on the device and in the dtype of the computation
  static Linear dense(at::Tensor weight, std::optional<at::Tensor> bias);
  static Result<Linear> compact(format::CompactMatrix weight, std::optional<at::Tensor> bias,
                                const Compute& compute);

  /// A weight as a checkpoint stores it, and its bias in the type of the computation.
  struct Stored {
    StoredMatrix weight;
    std::optional<at::Tensor> bias;
  };
  /// Linears that read the same x. Where all are stored in the same form they become slices of one
  /// Linear that has all their rows: one product in place of several.
  static Result<std::vector<Linear>> together(std::vector<Stored> parts, const Compute& compute);
  /// The Linear of which these are the slices, all of them and in order; null if there is none. It
  /// lives as long as they do.
  static const Linear* whole_of(const std::vector<const Linear*>& parts);

  /// @param x [..., in] -> [..., out]
  at::Tensor forward(const at::Tensor& x) const;
  /// The same by the dense product whatever the tokens: a compact weight is expanded whole first.
  at::Tensor multiply_expanded(const at::Tensor& x) const;
  /// The same as forward() on raw memory of the device, in the dtype of the computation and aligned
  /// to 16 bytes: x [tokens, in] -> y [tokens, out]. On a CPU, where a kernel takes it, nothing
  /// allocates, locks or asks torch after the first call of a thread. On a GPU it goes onto torch's
  /// current stream.
  /// @param executor  of a CPU
  void forward_into(const void* x, int64_t tokens, void* y, const Executor& executor) const;
  /// Whether forward_into() on a GPU allocates nothing once it has been called, so that what it
  /// puts onto the stream can be recorded.
  bool recordable() const;
  /// The rows of W that ids (int64 [...]) name: [..., in], as an embedding does. Of a quantised
  /// weight only these rows are expanded.
  at::Tensor rows(const at::Tensor& ids) const;
  /// The same on raw CPU memory: ids [count] -> out [count, in].
  void rows_into(const int32_t* ids, int64_t count, void* out, const Executor& executor) const;
  /// W dense in the dtype of the computation (a fresh tensor when the weight is compact).
  at::Tensor weight() const;
  /// Replaces the weight by a dense one (pruning does this).
  void set_weight(at::Tensor weight);
  bool is_compact() const;
  int64_t out_features() const;
  int64_t in_features() const;
  /// Bytes that stay in memory for the weight.
  size_t weight_bytes() const;
  /// The problem of one token that its kernel was planned for; nothing on a GPU and where every
  /// call takes the dense product (blocks).
  std::optional<kernels::Problem> decode_problem() const;

 private:
  static Result<Linear> make(Stored stored, const Compute& compute);
  std::optional<at::Tensor> bias_;
  WeightPtr weight_;
  std::shared_ptr<const Linear> whole_;  ///< of a slice
  int64_t first_ = 0;                    ///< of a slice: its first row in the whole
};

}  // namespace lacuna::model
