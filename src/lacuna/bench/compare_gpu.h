// The timing method on a GPU (docs/bench.md).
#pragma once

#include "lacuna/bench/compare.h"
#include "lacuna/model/torch.h"

namespace lacuna::bench {

/// compare() on a GPU: torch's dense product, our dense kernel and every candidate of the problems
/// that supports them, and beside these what a model gets: `--memory compact` and `--memory
/// fastest`. Weights are random normal values, each kept with the probability that the problem
/// says, or the codes of random_weight(); copies of them pass options.rotated_bytes. Products run
/// in CUDA graphs, one after the other, the graphs take turns. An output that is more than 2^-8 of
/// its norm away from the float64 product isn't timed.
///
/// The product of codes is that of what they stand for, as it is, or rounded once to the type of x
/// (so are the dense rivals that don't multiply codes); or its x is what kernels round it to, where
/// compute.int8_activations lets them. A record's candidate names in brackets what was rounded.
/// @param compute  on a GPU; its type is that of the problems
/// @errors as compare(); kNotPossible: codes with more than 64 tokens, numbers of another type than
/// x, no library
Result<Comparison> compare_on_gpu(const std::vector<kernels::Problem>& problems,
                                  const CompareOptions& options, const model::Compute& compute,
                                  const std::function<void(const std::string&)>& step = {},
                                  const std::atomic<bool>* interrupted = nullptr);

}  // namespace lacuna::bench
