// How far a linear kernel's output may lie from the float64 definition: what tests and benchmarks
// hold the candidates to.
#pragma once

#include <cstdint>
#include <string_view>

#include "lacuna/core/dtype.h"

namespace lacuna::kernels {

/// Most float32 roundings between a product and the sum it ends in, bias included. AVX-512 has 16
/// lanes, each meeting two products a chunk of 32 columns, then a tree of 4 additions; AVX2 and
/// portable have 8 lanes, one product in 8 columns, a tree of 3; portable rounds its products too.
/// Where lanes follow the non-zeros (_gather) or blocks of any width (_piece, _flat), one lane may
/// meet them all. A row of a stream (_stream) has two or three sums, of which one meets half of
/// each 64 columns or less. A tile of AMX adds 16 even and 16 odd products, then both, then that to
/// the sum; products of bf16 are exact. The other tiled products add from the first column to the
/// last. Tensor cores add in whatever order, and cut off where others round, which is twice as far.
double float_roundings(std::string_view candidate, int64_t inputs);
/// The same for a sum in any order whatever, products rounded: what is known of a library.
double float_roundings_in_any_order(int64_t inputs);
/// Whether a candidate takes denormal weights and inputs as zero.
bool flushes_denormals(std::string_view candidate);

/// Most of |y - exact|: gamma_n sum|w x| with n `roundings` and gamma_n = n u / (1 - n u),
/// underflows, and one rounding to the type of y.
/// @param weight_sum  sum of |w x| + |bias|
struct ErrorBound {
  double roundings = 0;
  int64_t inputs = 0;
  DType dtype = DType::kBF16;  ///< of y
  bool flushes_denormals = false;
  /// @param flushed  sum of |w x| over products with a denormal factor, if the candidate flushes
  double operator()(double exact, double weight_sum, double flushed = 0) const;
};

}  // namespace lacuna::kernels
