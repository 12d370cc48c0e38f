// Products that only steer a search, or whose factors have few bits anyway, may be cheaper than
// others.
#pragma once

#include <ATen/Context.h>

#include <string>

namespace lacuna::prune {

/// As long as it lives, float32 products may round their factors, which takes a fraction of the
/// time where a machine has units for it; sums stay float32. Nothing happens if `on` is false, or
/// they may already.
/// It holds for the process, so only where a single thread asks for products.
class RoundedProducts {
 public:
  /// @param precision  torch's word: "high" is 10 bits of mantissa on a GPU (TF32), "medium" also
  /// bfloat16 on a CPU
  explicit RoundedProducts(bool on, const std::string& precision = "high")
      : on_(on &&
            at::globalContext().float32MatmulPrecision() == at::Float32MatmulPrecision::HIGHEST) {
    if (on_) at::globalContext().setFloat32MatmulPrecision(precision);
  }
  ~RoundedProducts() {
    if (on_) at::globalContext().setFloat32MatmulPrecision("highest");
  }
  RoundedProducts(const RoundedProducts&) = delete;
  RoundedProducts& operator=(const RoundedProducts&) = delete;

 private:
  bool on_;
};

}  // namespace lacuna::prune
