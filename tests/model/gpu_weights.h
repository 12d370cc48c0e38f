// What tests of weights on a GPU share: who may run them, random sparse weights, and how far from
// exact a product may be. Every such test needs a GPU and says so elsewhere.
#pragma once

#include <gtest/gtest.h>

#include "lacuna/format/compact.h"
#include "lacuna/kernels/error_bound.h"
#include "lacuna/kernels/gpu_linear.h"
#include "lacuna/model/linear.h"
#include "model/models.h"

namespace lacuna::model {

inline const Compute kGpu{at::Device(at::kCUDA, 0), at::kBFloat16};

class Gpu : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto device = open_device("cuda");
    if (!device.ok()) GTEST_SKIP() << "needs a GPU: " << device.error().message;
    at::manual_seed(1);
  }
};

/// Tests of kernels that are for compute capability 9.0.
class GpuWeight24 : public Gpu {
 protected:
  void SetUp() override {
    Gpu::SetUp();
    if (IsSkipped()) return;
    if (!kernels::gpu_library().ok())
      GTEST_SKIP() << "needs the GPU kernels: " << kernels::gpu_library().error().message;
    if (gpus().front().major != 9) GTEST_SKIP() << "needs compute capability 9.0";
  }
};

/// Any two of every four, or fewer; some groups and rows without any.
inline at::Tensor mask24(int64_t rows, int64_t columns) {
  const int64_t groups = (columns + 3) / 4;
  const at::Tensor order = at::rand({rows, groups, 4}).argsort(int64_t{-1}).argsort(int64_t{-1});
  const at::Tensor count =
      at::randint(0, 3, {rows, groups, 1}).clamp_min(at::randint(0, 3, {rows, 1, 1}));
  return (order < count).view({rows, groups * 4}).narrow(1, 0, columns).contiguous();
}

inline Linear compact_on_gpu(const at::Tensor& weight,
                             const format::Pattern& pattern = format::Pattern::keep_of(2, 4),
                             std::optional<at::Tensor> bias = {}, const Compute& compute = kGpu) {
  if (bias) bias = bias->to(compute.device);
  return testing::must(Linear::compact(testing::must(format::compress(unwrap(weight), pattern)),
                                       std::move(bias), compute));
}

/// At most this far from exact: kernels::ErrorBound for every element, and one more rounding where
/// a bias is added to the rounded sum.
inline at::Tensor bound(const at::Tensor& exact, const at::Tensor& sums, int64_t inputs, bool bias,
                        at::ScalarType type = at::kBFloat16) {
  const double unit = type == at::kHalf ? 0x1p-11 : 0x1p-8;     // of a rounding to it
  const double least = type == at::kHalf ? 0x1p-24 : 0x1p-133;  // denormal
  const double n = kernels::float_roundings("cuda", inputs) * 0x1p-24;
  const at::Tensor floats = sums * (n / (1 - n)) + static_cast<double>(inputs + 16) * 0x1p-149;
  const at::Tensor once = floats + unit * (exact.abs() + floats) + least;
  return bias ? once + unit * (sums + once) : once;
}

/// Whole blocks, each kept with this probability; some weights of the others are zero as well.
inline at::Tensor block_mask(int64_t rows, int64_t columns, const format::Pattern& pattern,
                             double kept) {
  const int64_t r = pattern.block_rows, c = pattern.block_columns;
  return (at::rand({(rows + r - 1) / r, (columns + c - 1) / c}) < kept)
      .repeat_interleave(r, 0)
      .repeat_interleave(c, 1)
      .narrow(0, 0, rows)
      .narrow(1, 0, columns)
      .logical_and(at::rand({rows, columns}) < 0.98);
}

}  // namespace lacuna::model
