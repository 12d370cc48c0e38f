// What second-order pruning needs of the inputs: the triangular factor of the inverse Hessian.
#pragma once

#include <ATen/ATen.h>

#include <string>
#include <vector>

#include "lacuna/core/status.h"
#include "lacuna/prune/method.h"

namespace lacuna::prune {

/// U upper triangular with (H + damping * mean(diag H) * I)^-1 = U^T U, where H = 2/sequences * G
/// and inputs that were never active ("dead": G_jj = 0) have H_jj = 1.
struct InverseFactor {
  at::Tensor upper;  ///< float32 [in, in]
  at::Tensor dead;   ///< bool [in]
  double damping = 0;
  std::vector<std::string> warnings;  ///< one for every rise of the damping
};

/// Factors once: H reversed = L L^T, U = L^-1 reversed. When Cholesky fails the damping rises
/// tenfold, with a warning, up to 10 times the mean diagonal.
/// @cost n^3/3 multiply-adds; three n x n matrices in memory, `gram` among them
/// @determinism the same bits for any thread count
/// @errors kCheckFailed: no factor even then; kBadInput: gram holds NaN or infinity
Result<InverseFactor> inverse_factor(const InputStatistics& statistics, double damping,
                                     const Executor& executor);

}  // namespace lacuna::prune
