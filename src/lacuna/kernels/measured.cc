#include "lacuna/kernels/measured.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <map>

namespace lacuna::kernels {
namespace {

/// Problem text -> candidate.
std::map<std::string, std::string>& table() {
  static std::map<std::string, std::string> winners;
  return winners;
}

}  // namespace

Problem measured_as(Problem problem) {
  problem.tokens = static_cast<int64_t>(
      std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(problem.tokens, 1))));
  if (problem.pattern.kind == format::PatternKind::kUnstructured ||
      problem.pattern.kind == format::PatternKind::kBlock)
    problem.sparsity = std::round(problem.sparsity * 10) / 10;
  return problem;
}

void set_measured_winners(const std::vector<MeasuredWinner>& winners) {
  table().clear();
  for (const MeasuredWinner& winner : winners) table()[winner.problem.text()] = winner.candidate;
}

std::optional<std::string> measured_winner(const Problem& problem) {
  if (table().empty()) return std::nullopt;
  auto found = table().find(problem.text());
  if (found == table().end()) found = table().find(measured_as(problem).text());
  if (found == table().end()) return std::nullopt;
  return found->second;
}

}  // namespace lacuna::kernels
