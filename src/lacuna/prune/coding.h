// Codes for a pruned weight: rounding errors are made good within the mask.
#pragma once

#include "lacuna/prune/stages.h"

namespace lacuna::prune {

/// What make_codes() reads of the statistics. @errors as Stage::prepare()
Status prepare_coding(InputStatistics& statistics, const Request& request);

/// What make_codes() reads, on the CPU: codes are made there wherever the model is, row by row,
/// because each weight decides what follows.
InputStatistics on_cpu(const InputStatistics& statistics);

/// Bytes at work beyond those of the other stages: gradient and scaled weights; factor and damped
/// Gram matrix. @param weights, squared  as Stage::working_bytes()
uint64_t coding_bytes(uint64_t weights, uint64_t squared);

/// Puts the kept weights of a result on a grid of the request's quantization, the mask as it is.
/// Coding::kGptq:
///
/// 1. the column loop (column_loop.h) over the pruned weights, unless the solver was such a loop
/// and
///    has put them on a grid already: each weight's rounding error is spread over the columns to
///    its right, with the scales chosen when it reaches their groups;
/// 2. descent over the codes: weight by weight, the value of the grid that is best while all others
///    stay, sweep after sweep while any changes. It looks back where the loop couldn't, and never
///    raises the damped error (damped_gram.h) to the dense weights.
///
/// Coding::kAwq: scales that make the rounding errors times the inputs' energy small, and the
/// nearest codes: what AWQ's search of ranges does (Lin et al., https://arxiv.org/abs/2306.00978);
/// its channel scales have no place in the format.
///
/// @paper step 1: Frantar et al., GPTQ, https://arxiv.org/abs/2210.17323; step 2: Behdin et al.,
/// QuantEase, https://arxiv.org/abs/2309.01885
/// @param problem  the dense weight; statistics are prepared; its mask is not looked at. On the
/// CPU, as `pruned`
/// @errors kCheckFailed: the descent raised the damped error
Status make_codes(const Problem& problem, Pruned& pruned);

/// Step 2 alone. @param pruned  with a grid @return the damped error before and after
std::pair<double, double> descend(const Problem& problem, Pruned& pruned);

}  // namespace lacuna::prune
