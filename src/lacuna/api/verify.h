// Proof that a stored model is what it says: bytes, structure, pattern, zeros.
#pragma once

#include <filesystem>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "lacuna/core/status.h"
#include "lacuna/format/pattern.h"

namespace lacuna::api {

struct VerifyOptions {
  std::optional<format::Pattern> expect_pattern;  ///< every sparse layer follows it
  /// Over the sparse layers, within 0.005. Of quantised ones the dropped weights count, for which
  /// the mask stands, not those that the codes round to zero.
  std::optional<double> expect_sparsity;
  /// Model whose values the kept ones must equal. A quantised weight is held against the mask and
  /// the values of that model, rounded: it must be the one that was quantised.
  std::optional<std::filesystem::path> against;
};

struct VerifiedLayer {
  std::string name, pattern, quantization;
  double sparsity = 0;
  int64_t zeros = 0, elements = 0;
};

struct VerifyReport {
  std::string model;
  bool ok = false;
  bool has_checksums = false;
  int64_t tensors = 0;                  ///< read back
  double sparsity = 0;                  ///< over the sparse layers
  std::vector<VerifiedLayer> layers;    ///< block Linears
  bool differs = false;                 ///< a kept value is not that of VerifyOptions::against
  std::vector<std::string> violations;  ///< each names tensor and chunk, or row and column
};

/// Reads every tensor back. Whatever is wrong inside the model becomes a violation (ok = false),
/// also a file that can't be opened. @errors kBadInput: no such folder; those of `against`
Result<VerifyReport> verify(const std::filesystem::path& model, const VerifyOptions& options = {},
                            const std::function<void(int64_t, int64_t)>& progress = {});

nlohmann::json to_json(const VerifyReport& report);

/// Compares every tensor of a model folder with its checksums.json, before a job reads it.
/// @errors kBadInput: a chunk that differs (tensor and chunk named), no checksums, those of
/// io::Checkpoint::open
Status check_checksums(const std::filesystem::path& model);

}  // namespace lacuna::api
