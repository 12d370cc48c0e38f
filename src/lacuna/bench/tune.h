// The measured table: which candidate is fastest here, found out by `lacuna tune`, kept in a file
// of the user's cache, and handed to kernels/ when the tool starts (docs/selection.md).
#pragma once

#include <atomic>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "lacuna/bench/compare.h"
#include "lacuna/core/status.h"
#include "lacuna/kernels/select.h"

namespace lacuna::bench {

/// A measured problem.
struct TunedProblem {
  kernels::Problem problem;
  std::string candidate;  ///< the winner
  std::string order;      ///< what the order of the list alone takes
  double us = 0;          ///< median of the winner
  double gain = 1;        ///< time of `order` over time of the winner, median over rounds
  int threads = 0;
};

/// Times all candidates of a problem against each other. The winner is the one with the least
/// median time, but what the order of the list takes stays unless it loses by more than 2 %: less
/// is noise.
/// @errors as compare(); kNotPossible: no candidate supports the problem; kCheckFailed: one of them
/// computes something else
Result<TunedProblem> tune(const kernels::Problem& problem, const CompareOptions& options,
                          const std::atomic<bool>* interrupted = nullptr);

/// What a table was measured with; another CPU or version of the library has another file.
struct TuneKey {
  std::string cpu, version;
  static TuneKey here();
  bool operator==(const TuneKey&) const = default;
};

/// $XDG_CACHE_HOME or ~/.cache, then lacuna/tune-HASH.json, the hash that of the key.
/// @errors kNotPossible: neither variable is set
Result<std::filesystem::path> tune_file(const TuneKey& key = TuneKey::here());
/// @errors kBadInput: unreadable, not such a table, another version of the file, another CPU or
/// library version than `key`
Result<std::vector<TunedProblem>> read_tuned(const std::filesystem::path& file,
                                             const TuneKey& key = TuneKey::here());
/// Adds to the table in `file` (a fresh one when there is none or it can't be read), replacing
/// problems that it has, and writes it whole: under a temporary name, then renamed.
Status add_tuned(const std::filesystem::path& file, const std::vector<TunedProblem>& fresh,
                 const TuneKey& key = TuneKey::here());

/// What use_tuned() found.
struct TunedUse {
  std::string file;
  size_t problems = 0;
  std::string remark;  ///< why there are none though there should be; else empty
  std::string state;   ///< "12 problems in FILE", "off (LACUNA_TUNE)", "none (run `lacuna tune`)"
};
/// Reads this machine's table, unless LACUNA_TUNE=off, and has kernels/ choose by it. A table that
/// can't be read is left alone and told in `remark`.
TunedUse use_tuned();

}  // namespace lacuna::bench
