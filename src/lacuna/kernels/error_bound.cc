#include "lacuna/kernels/error_bound.h"

#include <cmath>

namespace lacuna::kernels {
namespace {

/// Unit roundoff: 2^-24, 2^-8 and 2^-11 for 24, 8 and 11 significant bits.
double unit_roundoff(DType dtype) {
  return dtype == DType::kF32 ? 0x1p-24 : dtype == DType::kBF16 ? 0x1p-8 : 0x1p-11;
}
/// Smallest step between two numbers.
double smallest(DType dtype) {
  return dtype == DType::kF32 ? 0x1p-149 : dtype == DType::kBF16 ? 0x1p-133 : 0x1p-24;
}

}  // namespace

double float_roundings(std::string_view candidate, int64_t inputs) {
  const auto chunks = static_cast<double>((inputs + 31) / 32);
  if (candidate == "reference") return 1;
  if (candidate.starts_with("cuda")) return 2 * float_roundings_in_any_order(inputs);
  if (candidate.find("amx") != std::string_view::npos) return chunks + 16 + 1;
  if (candidate.find("_stream") != std::string_view::npos) {
    const auto products = static_cast<double>((inputs + 63) / 64 * 32);
    return (candidate.ends_with("_fma") ? 1 : 2) * products + 2 + 1;
  }
  if (candidate.find("_gather") != std::string_view::npos ||
      candidate.find("_piece") != std::string_view::npos ||
      candidate.find("_flat") != std::string_view::npos)
    return float_roundings_in_any_order(inputs);
  if (candidate.find("_tiled") != std::string_view::npos)
    return float_roundings_in_any_order(inputs);
  if (candidate.find("avx512") != std::string_view::npos) return 2 * chunks + 4 + 1;
  return 4 * chunks + 3 + 1 + 1;
}

double float_roundings_in_any_order(int64_t inputs) { return static_cast<double>(inputs) + 1; }

bool flushes_denormals(std::string_view candidate) {
  return candidate.find("_dot") != std::string_view::npos;
}

double ErrorBound::operator()(double exact, double weight_sum, double flushed) const {
  const double n = roundings * 0x1p-24;
  const auto sums = static_cast<double>(inputs + 16);
  double float_error = n / (1 - n) * weight_sum + sums * 0x1p-149;
  if (flushes_denormals) float_error += flushed + sums * 0x1p-126;
  return float_error + unit_roundoff(dtype) * (std::fabs(exact) + float_error) + smallest(dtype);
}

}  // namespace lacuna::kernels
