// The timing method (docs/bench.md): outputs are checked, then all contenders take turns on rotated
// copies of the weight, and every one is compared with the best dense product of the same minute.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "lacuna/bench/contender.h"
#include "lacuna/bench/samples.h"
#include "lacuna/core/status.h"
#include "lacuna/kernels/select.h"

namespace lacuna::bench {

struct CompareOptions {
  double seconds = 2;             ///< of timed rounds
  int64_t least_rounds = 15;      ///< even if they take longer
  double settle_us = 20e3;        ///< of a turn, before its timed products
  double rotated_bytes = 1.5e9;   ///< of the copies of each layout; one copy at least
  double stream_bytes = 1 << 30;  ///< of the streaming read; 0: none
  /// Whoever takes this many times as long as the fastest of its problem is checked, not timed;
  /// 0: everyone is.
  double slowest = 8;
  uint64_t seed = 0;
  bool rivals = true;  ///< false: the candidates of the problems alone, nothing dense beside them

  /// One copy, some rounds: shows that everything works, measures nothing.
  static CompareOptions quick();
};

/// What one contender took.
struct Record {
  std::string problem, candidate;
  bool selectable = false;   ///< a candidate of kernels/
  Summary us;                ///< of one product
  int64_t copies = 0;        ///< of the weight, in rotation
  size_t weight_bytes = 0;   ///< resident
  size_t scratch_bytes = 0;  ///< shared by all weights of a model
  double flops = 0;          ///< 2 T N K, as if dense
  double gb_per_second = 0;  ///< of resident weight bytes
  double gflop_per_second = 0;
  std::optional<double> share;  ///< of the streaming read
  /// Time of the baseline over time of this, the median over rounds; nothing without a baseline.
  std::optional<Summary> ratio;
  double max_error = 0;            ///< max_error() of the last product checked
  std::vector<double> samples_us;  ///< by round
};

/// Why a contender wasn't timed.
struct Untimed {
  std::string problem, candidate, why;
};

/// One round robin.
struct Comparison {
  std::vector<kernels::Problem> problems;  ///< as asked
  std::vector<Record> records;             ///< in the order of the lists, dense last
  std::vector<Untimed> refused;            ///< don't support the problem, or are too slow
  std::vector<Untimed> failed;             ///< wrong output, or the library gave up
  std::string baseline;  ///< "PROBLEM CANDIDATE": least median time of the dense ones
  double read_before = 0, read_after = 0;  ///< GB/s; 0: not measured
  int64_t rounds = 0;
};

/// Times every contender of problems that share values, activations and NxKxT, with the dense
/// contenders of the same beside them, on as many threads as torch's.
/// @param step  called with what is going on (may be empty)
/// @errors kUsage: no problem, an unknown operation, problems that don't share all that;
/// kInterrupted
Result<Comparison> compare(const std::vector<kernels::Problem>& problems,
                           const CompareOptions& options,
                           const std::function<void(const std::string&)>& step = {},
                           const std::atomic<bool>* interrupted = nullptr);

/// Why an output is wrong: the first element beyond its bound; empty when none is.
/// @param exact, weight_sums  float64 [T,N]: the product and the sum of the magnitudes of its terms
/// @param slack  float64 [T,N], added to the bound; undefined: nothing
std::string wrong_output(const at::Tensor& y, const at::Tensor& exact,
                         const at::Tensor& weight_sums, const kernels::ErrorBound& bound,
                         const at::Tensor& slack = {});

/// The largest |y - exact| as a share of the largest |exact|. @param exact  float64, of y's shape
double max_error(const at::Tensor& y, const at::Tensor& exact);

/// Finds the baseline, the fastest of the dense problem's records, and everyone's ratio to it.
void set_ratios(Comparison& comparison, const kernels::Problem& dense);

/// @errors kUsage: no problem, or problems that don't share values, activations and NxKxT
Status check_one_shape(const std::vector<kernels::Problem>& problems);

/// Problems by what they share (values, activations, NxKxT), in order of their first: each group
/// can be compared in one go.
std::vector<std::vector<kernels::Problem>> same_shapes(
    const std::vector<kernels::Problem>& problems);

/// A file of problem strings, one a line; # begins a comment. @errors kBadInput: unreadable, a line
/// that is no problem (named), no problem at all
Result<std::vector<kernels::Problem>> read_cases(const std::string& file);

}  // namespace lacuna::bench
