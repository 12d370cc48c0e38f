// Least squares of a layer's outputs: min over W' under a mask of |X (W - W')|^2 + damping, in
// coordinates where it is conditioned best.
#pragma once

#include <ATen/ATen.h>

#include <string>
#include <vector>

#include "lacuna/core/executor.h"
#include "lacuna/core/status.h"

namespace lacuna::prune {

/// G + damping * mean(diag G) * I, scaled to a unit diagonal from both sides. Weights in these
/// coordinates are W * norms ("scaled"); their magnitude is Wanda's score (nearly: damped).
struct DampedGram {
  at::Tensor unit;   ///< float32 [in, in], symmetric
  at::Tensor norms;  ///< float32 [in], > 0: roots of the damped diagonal
  double damping = 0;
  bool rounded_products = false;      ///< as Request has it
  std::vector<std::string> warnings;  ///< damping that was raised, eigenvalues that were clipped

  at::Tensor scaled(const at::Tensor& weight) const { return weight * norms; }
  /// Back again; exact zeros where the mask says so.
  at::Tensor weight(const at::Tensor& scaled, const at::Tensor& mask) const {
    return (scaled / norms).masked_fill_(mask.logical_not(), 0);
  }
};

/// With more damping than asked for, or its eigenvalues clipped, where it has no Cholesky factor
/// (inputs of a rank below their number, in float32).
/// @errors kBadInput: NaN or infinity on the diagonal; kCheckFailed: in no way made positive
Result<DampedGram> damped_gram(const at::Tensor& gram, double damping, const Executor& executor);

/// sum over outputs of d G d^T, d = W - W', G damped: what solvers and refinements make small.
/// Products in float32, sums in float64. @determinism the same bits for any executor
double damped_error(const at::Tensor& weight, const at::Tensor& pruned, const DampedGram& gram,
                    const Executor& executor);

/// a * unit, in strips of rows. @shape a [out, in] -> [out, in]
at::Tensor times_gram(const at::Tensor& a, const DampedGram& gram, const Executor& executor);

/// Conjugate gradients for all outputs at once, each on its own kept weights; the unit diagonal is
/// the preconditioner. An output whose error rounding would raise keeps the weights it had, so no
/// output's error grows. Where products are rounded every tenth residual is the true one, and so
/// are the errors that are compared. Stops when every residual, as the steps carry it along, is
/// `tolerance` of what it was.
/// @param dense   float32 [out, in], scaled: what the outputs are to be
/// @param mask    bool [out, in]
/// @param scaled  float32 [out, in], contiguous, zero where the mask is false: where it starts, and
/// the result
/// @cost steps + 2 products of [out, in] by [in, in], one more in ten steps where they are rounded
/// @determinism the same bits for any executor
void conjugate_gradients(const DampedGram& gram, const at::Tensor& dense, const at::Tensor& mask,
                         const at::Tensor& scaled, int64_t steps, double tolerance,
                         const Executor& executor);

}  // namespace lacuna::prune
