#include "lacuna/format/scale_chooser.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "lacuna/core/half.h"

namespace lacuna::format {
namespace {

/// The least and the largest weight, 0 among them: every scale stands for 0 exactly.
std::pair<double, double> range(std::span<const float> weights) {
  float low = 0, high = 0;
  for (const float w : weights) low = std::min(low, w), high = std::max(high, w);
  return {low, high};
}

double squared_error(std::span<const float> weights, std::span<const float> importance,
                     const CodeScale& scale) {
  double sum = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const double difference = double{weights[i]} - double{scale.value(scale.nearest(weights[i]))};
    sum += difference * difference * (importance.empty() ? 1.0 : double{importance[i]});
  }
  return sum;
}

}  // namespace

CodeScale ScaleChooser::choose(std::span<const float> weights,
                               std::span<const float> importance) const {
  const auto [low, high] = range(weights);
  if (low == 0 && high == 0)
    return {quantization_.code, 0, quantization_.code == Code::kInt4 ? kInt4Zero : 0};
  const double largest = std::max(-low, high);
  if (quantization_.code == Code::kInt8) return stored(largest / 127, 127, 0);
  if (quantization_.code == Code::kFP8) return stored(largest / 448, 448, 0);
  return choose_int4(weights, importance, low, high);
}

/// Clipping the rarest values often costs less than the finer steps bring. Over groups of 64 of a
/// trained model (lab-16m), dense or half pruned, the best scale of 99 in 100 lies above 0.81 of
/// the full range; 13 candidates leave 0.86 of its squared error (0.92 with zero points), 193 of
/// them 0.4 % less. max|w|/8 leaves 0.95 dense and 1.04 pruned, max|w|/7 leaves 1.11.
CodeScale ScaleChooser::choose_int4(std::span<const float> weights,
                                    std::span<const float> importance, double low,
                                    double high) const {
  const int candidates = importance.empty() ? 13 : 31;
  const bool zero_points = quantization_.zero_points;
  const double full = zero_points ? (high - low) / 15 : std::max(-low / 8, high / 7);
  CodeScale best;
  double least = std::numeric_limits<double>::infinity();
  for (int i = 0; i < candidates; ++i) {
    const double wanted = full * (1.0 - i / 60.0);
    int zero = kInt4Zero;
    if (zero_points) {
      const double middle = (low + high) / 2;  // stays where it is when the range shrinks
      zero = std::clamp(static_cast<int>(std::lround(7.5 - middle / wanted)), 0, 15);
    }
    const CodeScale scale = stored(wanted, zero_points ? std::max(zero, 15 - zero) : 8, zero);
    const double error = squared_error(weights, importance, scale);
    if (error < least) least = error, best = scale;
  }
  return best;
}

CodeScale ScaleChooser::stored(double scale, double outermost, int zero) const {
  uint16_t bits = std::max<uint16_t>(float_to_bf16(static_cast<float>(scale)), 1);
  while (bits > 1 && !holds(double{bf16_to_float(bits)} * outermost)) --bits;
  return {quantization_.code, bf16_to_float(bits), zero};
}

bool ScaleChooser::holds(double value) const {
  const auto product = static_cast<float>(value);
  if (dtype_ == DType::kF32) return std::isfinite(product);
  return dtype_ == DType::kBF16 ? std::isfinite(bf16_to_float(float_to_bf16(product)))
                                : std::isfinite(f16_to_float(float_to_f16(product)));
}

}  // namespace lacuna::format
