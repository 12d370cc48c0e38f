// What is said of a packed weight beside its bytes: a list of integers, which a graph of
// torch.compile holds as a constant.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <vector>

#include "lacuna/format/pattern.h"
#include "lacuna/kernels/select.h"

namespace lacuna::python {

/// The device that a weight is packed for; its bytes mean nothing elsewhere.
enum class PackedFor : int64_t { kCpu = 0, kGpu = 1 };

struct Form {
  int64_t rows = 0, columns = 0;
  DType dtype = DType::kBF16;  ///< of the values
  format::Pattern pattern;
  double sparsity = 0;  ///< share of weights that are not stored
  PackedFor packed_for = PackedFor::kCpu;
  std::vector<int64_t> rest;  ///< where the parts lie: the device's own

  std::vector<int64_t> ints() const;
  /// Throws what is wrong with a list that pack() didn't make.
  static Form of(at::IntArrayRef ints);
  /// The product with this many rows of x.
  kernels::Problem problem(int64_t tokens, at::ScalarType activations) const;
};

/// A packed weight.
struct Packed {
  at::Tensor bytes;  ///< u8
  Form form;
};

// On a CPU (packed_cpu.cc) and on a GPU (packed_gpu.cc); x and bias have been checked.

Packed pack_cpu(const at::Tensor& weight, const format::Pattern& pattern);
at::Tensor unpack_cpu(const at::Tensor& packed, const Form& form);
at::Tensor linear_cpu(const at::Tensor& x, const at::Tensor& packed, const Form& form,
                      const std::optional<at::Tensor>& bias);

Packed pack_gpu(const at::Tensor& weight, const format::Pattern& pattern);
at::Tensor unpack_gpu(const at::Tensor& packed, const Form& form);
at::Tensor linear_gpu(const at::Tensor& x, const at::Tensor& packed, const Form& form,
                      const std::optional<at::Tensor>& bias);

}  // namespace lacuna::python
