// What inspect and verify share: which weights count, and how zeros are counted.
#pragma once

#include <set>
#include <string>

#include "lacuna/io/checkpoint.h"
#include "lacuna/io/decoder_spec.h"

namespace lacuna::api {

/// Names of the weights of all Linears in the decoder blocks: what pruning aims at.
std::set<std::string> block_weights(const io::DecoderSpec& spec);

struct SparsityCount {
  int64_t zeros = 0, elements = 0;
  void add(const SparsityCount& other) { zeros += other.zeros, elements += other.elements; }
  double sparsity() const {
    return elements ? static_cast<double>(zeros) / static_cast<double>(elements) : 0.0;
  }
};

SparsityCount count_zeros(const io::Weight& weight);
/// The declared pattern; for a dense tensor that declares none, the one its zeros follow.
format::Pattern pattern_of(const io::WeightInfo& info, const io::Weight& weight);

}  // namespace lacuna::api
