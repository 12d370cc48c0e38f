// What the tests of models share: opening them, and comparing logits.
#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "lacuna/io/checkpoint.h"
#include "lacuna/model/decoder.h"

namespace lacuna::testing {

/// The value, or an exception that carries the error (gtest reports it as the test's failure).
template <class T>
T must(Result<T> result) {
  if (!result.ok()) throw std::runtime_error(result.error().message);
  return std::move(result).value();
}
inline void must(Status status) {
  if (!status.ok()) throw std::runtime_error(status.error().message);
}

inline model::Decoder open_decoder(const std::filesystem::path& folder,
                                   at::ScalarType dtype = at::kFloat) {
  return must(model::Decoder::load(must(io::Checkpoint::open(folder)), {at::kCPU, dtype}));
}

inline nlohmann::json read_json(const std::filesystem::path& file) {
  return nlohmann::json::parse(std::ifstream(file));
}

inline at::Tensor ids_tensor(const std::vector<int32_t>& ids) {
  return at::tensor(at::ArrayRef<int32_t>(ids), at::kLong).unsqueeze(0);
}

/// Largest difference as a share of the largest expected value.
inline double relative_difference(const at::Tensor& got, const at::Tensor& expected) {
  const at::Tensor difference = (got.to(at::kDouble) - expected.to(at::kDouble)).abs().max();
  return difference.item<double>() / expected.to(at::kDouble).abs().max().item<double>();
}

}  // namespace lacuna::testing
