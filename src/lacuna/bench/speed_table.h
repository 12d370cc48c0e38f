// What products will take on this machine, from the table that `lacuna tune` measured.
#pragma once

#include <vector>

#include "lacuna/bench/tune.h"
#include "lacuna/core/status.h"
#include "lacuna/kernels/select.h"

namespace lacuna::bench {

/// Times by problem. Those of one shape that differ only in their share of zeros (or the operation
/// that suits it) lie on a line between two that were measured.
class SpeedTable {
 public:
  explicit SpeedTable(std::vector<TunedProblem> measured) : measured_(std::move(measured)) {}
  /// This machine's. @errors kNotPossible: none was measured, or it can't be used (why)
  static Result<SpeedTable> here();
  bool has(const kernels::Problem& problem) const;
  /// Beyond the shares of zeros that were measured: what lies denser goes on with the line, what
  /// lies sparser takes as long as the last one; from one measurement alone only tenths around it.
  /// @errors kNotPossible: not measured (the command that does it)
  Result<double> milliseconds(const kernels::Problem& problem) const;

 private:
  std::vector<TunedProblem> measured_;
};

}  // namespace lacuna::bench
