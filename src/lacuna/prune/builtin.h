// The methods that come with the library, and the checks that all of them begin with.
#pragma once

#include "lacuna/prune/method.h"

namespace lacuna::prune {

const Method& magnitude_method();
const Method& wanda_method();
const Method& sparsegpt_method();

/// Shapes, types, finite values, a sparsity in [0, 1], statistics where the method needs them and a
/// group only where the pattern leaves a choice. Messages begin with what is wrong ("weight",
/// "inputs"); the caller puts the layer's name before it. @errors kBadInput, kUsage
Status check_request(const Method& method, const at::Tensor& weight,
                     const InputStatistics& statistics, const Request& request);

/// The result of a method that only chooses: the weights of the largest scores, unchanged.
Pruned keep_by_scores(const Method& method, const at::Tensor& weight, const at::Tensor& scores,
                      const Request& request);

}  // namespace lacuna::prune
