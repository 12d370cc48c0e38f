// Statistics of a dense model on disk: one calibration for any number of methods and sparsities.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "lacuna/core/status.h"
#include "lacuna/prune/method.h"

namespace lacuna::prune {

/// Statistics by the names of a block's Linears; those with one input share the object.
using InputsByTarget = std::map<std::string, std::shared_ptr<InputStatistics>>;

/// `DIR/`: statistics.json says which model and calibration they are of, block-NNN.safetensors has
/// for every distinct input, named by its first Linear: gram (the upper triangle row by row,
/// float32 [n (n + 1) / 2]), square_sums and sums [n] (io/noted_file.h).
class StatisticsFolder {
 public:
  /// @param about  model, calibration, ... ; statistics.json, written by finish()
  /// @errors kBadInput: finished statistics lie there already, or something else; kCheckFailed
  static Result<StatisticsFolder> create(const std::filesystem::path& folder, nlohmann::json about);
  /// @errors kBadInput: not there, not finished, or of another version
  static Result<StatisticsFolder> open(const std::filesystem::path& folder);

  /// @errors kBadInput: inputs that are not finite; kCheckFailed
  Status write(int64_t layer, const InputsByTarget& inputs);
  Status finish();
  /// @errors kBadInput: not there, damaged or of another block, naming file and tensor
  Result<InputsByTarget> read(int64_t layer) const;
  const nlohmann::json& about() const { return about_; }

 private:
  std::filesystem::path file_of(int64_t layer) const;
  std::filesystem::path folder_;
  nlohmann::json about_;
};

}  // namespace lacuna::prune
