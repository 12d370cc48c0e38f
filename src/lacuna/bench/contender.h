// What a benchmark times: the candidates of kernels/, the same product by torch and oneDNN, and a
// compact weight that is expanded first, all behind one face.
#pragma once

#include <ATen/ATen.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "lacuna/core/status.h"
#include "lacuna/format/compact.h"
#include "lacuna/kernels/error_bound.h"
#include "lacuna/kernels/linear.h"

namespace lacuna::bench {

/// The weight of a problem as it is before anyone lays it out: contenders pack it from here.
struct Weight {
  kernels::Problem problem;
  /// [N,K], dropped weights as +0. Of codes what they stand for, float32.
  at::Tensor dense;
  at::Tensor row_scales;                         ///< of int8 values, float32 [N]
  std::optional<format::CompactMatrix> compact;  ///< under a sparse pattern, or quantised
};

/// Random normal values, a random mask with exact counts (model/random_weight.h), quantised by
/// format::quantize where the problem asks for codes.
/// @errors as format::quantize
Result<Weight> random_weight(const kernels::Problem& problem, uint64_t seed);

/// The dense product of the same values, activations and NxKxT.
kernels::Problem dense_problem(const kernels::Problem& problem);

/// What of a library's message fits beside a name.
std::string first_line(const std::string& text);

/// A copy of a weight in the layout of some contenders.
class Packed {
 public:
  virtual ~Packed() = default;
  /// All that stays in memory for the weight.
  virtual size_t bytes() const = 0;
};

/// One way to compute y[T,N] = x[T,K] · W[N,K]^T.
struct Contender {
  std::string name;
  bool candidate = false;  ///< stands in a list of kernels/, so that choose() may take it
  std::string layout;      ///< contenders of an operation with one layout share its copies
  std::function<kernels::Support(const kernels::Problem&)> supports;
  /// @errors what the library says; torch throws its own
  std::function<Result<std::unique_ptr<Packed>>(const Weight&)> pack;
  /// Writes y where it is defined, else makes it: what a caller pays for a fresh output is part of
  /// every contender's time. `weight` comes from pack() of the same contender or layout.
  std::function<void(const kernels::Problem&, const Packed& weight, const at::Tensor& x,
                     at::Tensor& y)>
      run;
  /// Scratch that all weights of a model share.
  std::function<size_t(const kernels::Problem&)> scratch_bytes;
  std::function<kernels::ErrorBound(const kernels::Problem&)> bound;
  /// What it may be off besides, because it rounds x on purpose: float64 [T,N]. Empty: nothing.
  std::function<at::Tensor(const Weight&, const at::Tensor& x)> slack;
};

/// Everyone who may take part in problems of an operation. The reference doesn't: it is what the
/// others are held to.
std::vector<Contender> contenders(const kernels::LinearOperation& operation);

}  // namespace lacuna::bench
