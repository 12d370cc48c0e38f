// What codes can stand for: the scales of a weight under work, and the value nearest to a number.
// It is the grid of format/quantization.h, so what a solver puts on it is stored without another
// rounding.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "lacuna/core/executor.h"
#include "lacuna/core/status.h"
#include "lacuna/format/codes.h"
#include "lacuna/format/compact.h"
#include "lacuna/prune/method.h"

namespace lacuna::prune {

/// On the CPU, as all that makes codes.
class Grid {
 public:
  /// All scales are 0 until they are chosen.
  /// @param weight  [out, in], for its shape
  Grid(const Request& request, const at::Tensor& weight);

  const format::Quantization& quantization() const { return quantization_; }
  /// Columns that share a scale.
  int64_t width() const { return width_; }
  int64_t groups() const { return groups_; }
  /// [out, groups], row by row.
  const std::vector<format::CodeScale>& scales() const { return scales_; }

  /// Chooses the scales of a group for what its columns hold (format/scale_chooser.h).
  /// @param weight float32 [out, columns of the group], finite @param mask bool, likewise
  /// @param importance float32 [columns]: of each column's squared rounding error
  /// @determinism the same for any executor
  void choose(int64_t group, const at::Tensor& weight, const at::Tensor& mask,
              const at::Tensor& importance, const Executor& executor);

  /// The value nearest to w.
  float nearest(int64_t row, int64_t column, float w) const {
    const format::CodeScale& scale = scales_[static_cast<size_t>(row * groups_ + column / width_)];
    return scale.value(scale.nearest(w));
  }
  /// The same for all rows of a column. @shape w [out] -> [out]
  at::Tensor nearest(int64_t column, const at::Tensor& w) const;

 private:
  format::Quantization quantization_;
  DType values_;
  int64_t rows_, columns_, width_, groups_;
  std::vector<format::CodeScale> scales_;
};

/// What is stored of a pruned weight with a grid: its mask bit by bit, and codes that stand for
/// exactly its values.
/// @param values  type of the weight in the file
/// @errors kCheckFailed: a kept value that lies beside the grid, a mask that breaks the pattern
Result<format::CompactMatrix> coded_matrix(const Pruned& pruned, const format::Pattern& pattern,
                                           DType values, const Executor& executor);

}  // namespace lacuna::prune
