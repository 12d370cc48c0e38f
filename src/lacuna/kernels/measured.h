// The candidates that measured fastest on this machine. The table is filled from outside (bench/
// reads the file that `lacuna tune` writes) and asked by choose(), which prefers it to the order of
// a list.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "lacuna/kernels/select.h"

namespace lacuna::kernels {

/// The candidate that took least time for a problem.
struct MeasuredWinner {
  Problem problem;
  std::string candidate;
  bool operator==(const MeasuredWinner&) const = default;
};

/// The problem whose measurement stands for this one too: tokens rounded up to a power of two,
/// shares of zeros to tenths (a real layer's share is no round number).
Problem measured_as(Problem problem);

/// Replaces the table of this process. At start-up only: not safe against a concurrent choose().
void set_measured_winners(const std::vector<MeasuredWinner>& winners);
/// Who won the problem, else who won measured_as(problem), else nothing.
std::optional<std::string> measured_winner(const Problem& problem);

}  // namespace lacuna::kernels
