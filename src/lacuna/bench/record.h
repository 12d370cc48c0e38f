// Records of a benchmark as JSON, a line each.
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

/// One object for every contender: a record, or {"problem", "candidate", "refused" or "failed"}.
/// Each carries the environment, so that a line stands for itself.
std::vector<nlohmann::json> to_json(const Comparison& comparison, const Environment& environment);

}  // namespace lacuna::bench
