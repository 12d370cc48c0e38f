// Which scale a group of weights gets: what quantize() asks, and whoever makes codes himself.
#pragma once

#include <span>

#include "lacuna/format/codes.h"

namespace lacuna::format {

/// Chooses scales as they can be stored: in bf16, not negative, their product with the outermost
/// code finite in the type of the values.
class ScaleChooser {
 public:
  ScaleChooser(const Quantization& quantization, DType values_dtype)
      : quantization_(quantization), dtype_(values_dtype) {}

  /// The scale and zero point of one group (quantize.h has the rules); scale 0 for a group without
  /// a non-zero.
  /// @param weights  the kept ones, finite
  /// @param importance  of each weight's squared error, not negative; empty: all alike. Where it is
  /// given, int4 searches a wider range of scales: a rare large weight may matter little.
  CodeScale choose(std::span<const float> weights, std::span<const float> importance = {}) const;

 private:
  CodeScale choose_int4(std::span<const float> weights, std::span<const float> importance,
                        double low, double high) const;
  CodeScale stored(double scale, double outermost, int zero) const;
  bool holds(double value) const;

  Quantization quantization_;
  DType dtype_;
};

}  // namespace lacuna::format
