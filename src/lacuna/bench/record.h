// A benchmark's results as JSON: one object a problem, or a line a contender.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "lacuna/bench/compare.h"

namespace lacuna::bench {

/// Where the numbers were had.
struct Environment {
  std::string machine;  ///< the processor's name
  int threads = 0;
  std::string lacuna, libtorch;  ///< versions
  std::string commit;            ///< that this was built from; "-dirty": with changes besides
  static Environment here();
};
nlohmann::json to_json(const Environment& environment);

/// One object for every problem that was asked for: its candidates, the best dense product of the
/// same run, the other dense ones, and who wasn't timed and why.
std::vector<nlohmann::json> results_of(const Comparison& comparison,
                                       const Environment& environment);

/// One object for every contender, to stand on a line of its own: a record with its problem, or
/// {"problem", "name", "refused" or "failed"}.
std::vector<nlohmann::json> lines_of(const Comparison& comparison, const Environment& environment);

}  // namespace lacuna::bench
