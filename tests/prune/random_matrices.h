// Matrices that the tests of prune/ work on: the same values everywhere, from counters.
#pragma once

#include <ATen/ATen.h>

#include "lacuna/core/random.h"
#include "lacuna/prune/method.h"

namespace lacuna::prune::testing {

inline at::Tensor random_matrix(int64_t rows, int64_t columns, uint64_t seed) {
  at::Tensor matrix = at::empty({rows, columns}, at::kFloat);
  float* data = matrix.mutable_data_ptr<float>();
  for (int64_t i = 0; i < rows * columns; ++i)
    data[i] = static_cast<float>(random_normal(seed, 0, static_cast<uint64_t>(i)));
  return matrix;
}

/// Small integers: plenty of ties and zeros.
inline at::Tensor tied_matrix(int64_t rows, int64_t columns, uint64_t seed) {
  return random_matrix(rows, columns, seed).round();
}

/// Statistics of x [tokens, in] seen as one sequence.
inline InputStatistics statistics_of(const at::Tensor& x) {
  InputStatistics statistics;
  statistics.sequences = 1;
  statistics.tokens = x.size(0);
  statistics.gram = at::mm(x.t(), x);
  statistics.square_sums = statistics.gram.diagonal().clone();
  statistics.sums = x.sum({0});
  return statistics;
}

/// Correlated inputs: neighbouring columns share a part.
inline at::Tensor correlated_inputs(int64_t tokens, int64_t columns, uint64_t seed) {
  const at::Tensor own = random_matrix(tokens, columns, seed);
  return own + 0.7 * own.roll(1, 1) + 0.5 * random_matrix(tokens, 1, seed + 1);
}

inline InputStatistics identity_statistics(int64_t columns) {
  InputStatistics statistics;
  statistics.sequences = 2;  // H = 2/sequences * G = I
  statistics.tokens = columns;
  statistics.gram = at::eye(columns);
  statistics.square_sums = at::ones({columns});
  statistics.sums = at::zeros({columns});
  return statistics;
}

inline int64_t dropped(const at::Tensor& mask) { return mask.logical_not().sum().item<int64_t>(); }

}  // namespace lacuna::prune::testing
