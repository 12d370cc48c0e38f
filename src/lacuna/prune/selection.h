// Which weights stay: exact counts for every pattern and group, for blocks to within half a block.
// Of equal scores the lower index is kept.
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

/// What the parts of a matrix have dropped so far. A part takes over what those before it left
/// undone, so that their counts add up to that of the matrix.
struct Share {
  double sparsity = 0;
  int64_t seen = 0, dropped = 0;  ///< weights
  /// Counts the next part in: how many weights it should drop.
  double due(int64_t count);
};

/// What stays of a stripe of columns (or of a whole matrix) whose weights compete among themselves;
/// for unstructured and block patterns. Blocks go whole, in ascending order of the mean of their
/// weights' scores, until the count is met as nearly as they allow.
/// @param scores float32 [out, w] of these columns, the stripe after those in `share`
/// @return bool [out, w]
at::Tensor select_stripe(const at::Tensor& scores, const format::Pattern& pattern, Share& share);

/// Keeps the `keep` largest of all scores, as keep_largest() does with one row of them, in parallel
/// and without sorting: counts by the leading bits say in which narrow range the threshold lies,
/// and only what lies there is looked at again.
/// @param scores float32 of any shape, on the CPU @cost three passes
/// @determinism exact, for any executor; scores must be finite or -inf
at::Tensor keep_largest_of_all(const at::Tensor& scores, int64_t keep, const Executor& executor);

/// What stays of a whole matrix. keep:of has its own groups and looks at neither sparsity nor
/// group; the last group of a row may be short (r columns) and keeps min(keep, r).
/// @param scores float32 [out, in], finite @return bool [out, in], true = kept
/// @determinism the same for any executor
at::Tensor select(const at::Tensor& scores, const format::Pattern& pattern, double sparsity,
                  Group group, const Executor& executor = Executor::serial());

}  // namespace lacuna::prune
