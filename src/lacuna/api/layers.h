// What jobs share about weights: which ones count, whether they can be computed with, their zeros.
#pragma once

#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "lacuna/io/checkpoint.h"
#include "lacuna/io/decoder_spec.h"

namespace lacuna::api {

/// Names of the weights of all Linears in the decoder blocks: what pruning aims at.
std::set<std::string> block_weights(const io::DecoderSpec& spec);

/// What keeps those weights from being what config.json describes, a line each: one that is
/// missing, doesn't hold floating-point numbers or has another shape.
std::vector<std::string> misfits(const io::Checkpoint& checkpoint, const io::DecoderSpec& spec);

/// Row and column of the first NaN or infinity.
std::optional<std::pair<int64_t, int64_t>> first_not_finite(const io::Weight& weight);
/// The same of a whole model, as the message of an error; empty when all numbers are finite. Reads
/// the model once.
std::string not_finite(const io::Checkpoint& checkpoint);

struct SparsityCount {
  int64_t zeros = 0, elements = 0;
  void add(const SparsityCount& other) { zeros += other.zeros, elements += other.elements; }
  double sparsity() const {
    return elements ? static_cast<double>(zeros) / static_cast<double>(elements) : 0.0;
  }
};

/// Of codes what the mask drops: a kept value that rounds to 0 is no zero.
SparsityCount count_zeros(const io::Weight& weight);
/// The declared pattern; for a dense tensor that declares none, the one its zeros follow: keep:of,
/// unstructured when at least a quarter are zeros, else dense.
format::Pattern pattern_of(const io::WeightInfo& info, const io::Weight& weight);

}  // namespace lacuna::api
