// Which weights stay: exact counts for every pattern and group. Of equal scores the lower index is
// kept.
#pragma once

#include <ATen/ATen.h>

#include "lacuna/format/pattern.h"
#include "lacuna/prune/method.h"

namespace lacuna::prune {

/// Dropped of the first n units at this sparsity: floor(n * sparsity), blind to the last bits of
/// products such as 0.7 * 10. Differences of it share a total out without losing the remainders.
int64_t dropped_of(int64_t n, double sparsity);

/// Keeps the `keep` largest scores of each row. @shape [G, n] -> bool [G, n]
/// @determinism exact; scores must be finite or -inf
at::Tensor keep_largest(const at::Tensor& scores, int64_t keep);

/// The same for one short group: keep[i] = true for the `keep` largest of n scores.
void keep_largest(const float* scores, int n, int keep, bool* kept);

/// Columns that Group::kBlock128 looks at together: the largest multiple of the pattern's own width
/// (1, `of` or C) that is at most 128; at least one such width.
int64_t stripe_columns(const format::Pattern& pattern);

/// What stays of columns first .. first + w - 1 of a matrix when they compete among themselves; for
/// unstructured and block patterns. The counts of all stripes add up to that of the matrix.
/// @param scores float32 [out, w] of these columns; a block's score is the sum of its elements'
/// @return bool [out, w]
at::Tensor select_stripe(const at::Tensor& scores, const format::Pattern& pattern, double sparsity,
                         int64_t first);

/// What stays of a whole matrix. keep:of has its own groups and looks at neither sparsity nor
/// group; the last group of a row may be short (r columns) and keeps min(keep, r).
/// @param scores float32 [out, in], finite @return bool [out, in], true = kept
at::Tensor select(const at::Tensor& scores, const format::Pattern& pattern, double sparsity,
                  Group group);

}  // namespace lacuna::prune
