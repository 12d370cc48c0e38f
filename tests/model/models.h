// What the tests of models share: opening them, and comparing logits.
#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
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

/// Logits [vocab] after the last of these tokens.
inline at::Tensor last_logits(const model::Decoder& decoder, const std::vector<int32_t>& ids) {
  return decoder.forward(ids_tensor(ids), nullptr, /*last_only=*/true).view({-1});
}

/// The largest logits are those of `ids`, in this order, and equal `expected` to 1e-4 of the first.
inline void expect_top_logits(const at::Tensor& logits, const std::vector<int64_t>& ids,
                              const std::vector<double>& expected, const std::string& what = "") {
  ASSERT_EQ(ids.size(), expected.size());
  const at::Tensor top = std::get<1>(logits.topk(static_cast<int64_t>(ids.size())));
  for (size_t i = 0; i < ids.size(); ++i) {
    EXPECT_EQ(top[static_cast<int64_t>(i)].item<int64_t>(), ids[i]) << "place " << i << what;
    EXPECT_NEAR(logits[ids[i]].item<double>(), expected[i], 1e-4 * std::abs(expected[0]))
        << "token " << ids[i] << what;
  }
}

}  // namespace lacuna::testing
