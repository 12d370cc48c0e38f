// KEEP:OF with dense columns: the inputs that matter most keep all their weights, so that a layer
// gives up less than the pattern takes.
#pragma once

#include <vector>

#include "lacuna/core/bytes.h"
#include "lacuna/prune/method.h"

namespace lacuna::prune {

/// Whether Request::rest is what this pattern leaves a choice of, and nothing contradicts it.
/// @errors kUsage
Status check_hybrid(const Request& request);

/// How many columns stay dense for the whole to reach the request's sparsity as nearly as whole
/// groups of the others allow.
int64_t dense_columns(const Request& request, int64_t columns);

/// A sparsity for each of these weights [rows, columns], in turn, for all of them together to reach
/// the request's: where whole groups of one fall short of it or pass it, the next make up for that.
std::vector<double> hybrid_sparsities(const std::vector<Shape>& shapes, const Request& request);

/// Dense are the columns with the most sum of w_ij^2 |x_j|^2. The others, side by side, are a
/// matrix of their own that the method prunes under Request::rest. Where the method changes kept
/// weights the dense columns make good what they can: the others' Gram matrix is then the Schur
/// complement G_RR - G_RD (G_DD + damping)^-1 G_DR, and W_D gets (W_R - W_R') G_RD (G_DD +
/// damping)^-1 in the end, which together is the least damped error for any choice of W_R'.
/// @paper of the idea: Spense, https://arxiv.org/abs/2606.10445 (2:4 and dense parts)
/// @cost a factor of G_DD and of the others' Gram matrix for every weight, which can't be shared
Result<Pruned> prune_hybrid(const Method& method, const at::Tensor& weight,
                            const InputStatistics& statistics, const Request& request);

}  // namespace lacuna::prune
