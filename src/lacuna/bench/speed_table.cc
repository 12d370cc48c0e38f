#include "lacuna/bench/speed_table.h"

#include <algorithm>
#include <cstdlib>
#include <map>

#include "lacuna/kernels/measured.h"

namespace lacuna::bench {
namespace {

/// Whether two problems differ in nothing but how many zeros there are.
bool alike(kernels::Problem a, kernels::Problem b) {
  for (kernels::Problem* each : {&a, &b}) {
    if (each->pattern.kind == format::PatternKind::kUnstructured) each->operation.clear();
    each->sparsity = 0;
  }
  return a == b;
}

}  // namespace

Result<SpeedTable> SpeedTable::here() {
  const char* variable = std::getenv("LACUNA_TUNE");
  if (variable != nullptr && std::string_view(variable) == "off")
    return not_possible("the measured table is off (LACUNA_TUNE). Unset the variable.");
  LACUNA_TRY(const auto file, tune_file());
  if (!std::filesystem::exists(file))
    return not_possible("no times were measured on this machine. Run `lacuna tune MODEL` first.");
  auto measured = read_tuned(file);
  if (!measured.ok()) return not_possible("{}", measured.error().message);
  return SpeedTable(std::move(measured).value());
}

bool SpeedTable::has(const kernels::Problem& problem) const {
  return std::any_of(measured_.begin(), measured_.end(),
                     [&](const TunedProblem& tuned) { return tuned.problem == problem; });
}

Result<double> SpeedTable::milliseconds(const kernels::Problem& problem) const {
  std::map<double, double> times;  // by share of zeros
  for (const TunedProblem& tuned : measured_)
    if (alike(tuned.problem, problem)) times[tuned.problem.sparsity] = tuned.us / 1000;
  constexpr double kRounding = 0.05 + 1e-9;  // as kernels::measured_as() rounds
  const auto above = times.lower_bound(problem.sparsity - 1e-9);
  if (above != times.end() && above->first < problem.sparsity + 1e-9) return above->second;
  if (times.size() < 2) {
    if (times.size() == 1 && std::abs(times.begin()->first - problem.sparsity) <= kRounding)
      return times.begin()->second;
    return not_possible("no time was measured of {}. Run `lacuna tune {}` first.", problem.text(),
                        kernels::measured_as(problem).text());
  }
  if (above == times.end()) return times.rbegin()->second;
  const auto right = above == times.begin() ? std::next(above) : above;
  const auto left = std::prev(right);
  const double slope = (right->second - left->second) / (right->first - left->first);
  return std::max(left->second + slope * (problem.sparsity - left->first), right->second);
}

}  // namespace lacuna::bench
