// A pruned model as a patch on the dense one: its mask.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "lacuna/api/jobs.h"
#include "lacuna/core/status.h"

namespace lacuna::api {

/// A weight whose kept values are not those of the dense model, or that is no matrix and differs.
struct ChangedWeight {
  std::string name;
  int64_t changed = 0, kept = 0;
};

struct DiffReport {
  std::string out;
  uint64_t bytes = 0, bytes_sparse = 0;  ///< of the mask's file; of the pruned model
  int64_t weights = 0;                   ///< matrices with a mask
  double bits_per_weight = 0;            ///< of the file, over their elements
  std::vector<ChangedWeight> changed;    ///< none, unless `mask_only`
};
/// Writes which weights `sparse` keeps, and what identifies every tensor of `dense`. Applied to the
/// dense model it gives the pruned one, when that has the dense model's values under its mask, as
/// magnitude, wanda, ria and dsnot leave them.
/// @param mask_only  also of a model with other values (or codes): the file then stands for its
/// mask alone
/// @errors kBadInput: kept values that differ and not `mask_only` (names and counts); weights of
/// another name, shape or type; nothing sparse
Result<DiffReport> diff(const std::filesystem::path& dense, const std::filesystem::path& sparse,
                        const std::filesystem::path& out, bool mask_only,
                        const JobProgress& progress = {});

struct ApplyReport {
  std::string out;
  uint64_t bytes_dense = 0, bytes_out = 0;
  int64_t weights = 0;
  double sparsity = 0;  ///< of the weights with a mask
};
/// Writes the dense model's values under a mask. What diff() made of a model without changed values
/// gives that model again, byte for byte in the same store.
/// @errors kBadInput: a damaged file; a tensor that is not the one that the mask was made for
/// (named)
Result<ApplyReport> apply(const std::filesystem::path& dense, const std::filesystem::path& mask,
                          const std::filesystem::path& out, io::Store store,
                          const JobProgress& progress = {});

}  // namespace lacuna::api
