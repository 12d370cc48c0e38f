// The stores that compressed-tensors left behind: sparse-bitmask and sparse-24-bitmask. For a
// weight [N, K] of MODULE:
//
// | tensor             | sparse-bitmask                    | sparse-24-bitmask              |
// |--------------------|-----------------------------------|--------------------------------|
// | MODULE.shape       | I64 [2]                           | I64 [2, 1]                     |
// | MODULE.compressed  | non-zeros, row by row             | [N, K/2], two of every four    |
// | MODULE.bitmask     | U8 [N, ceil(K/8)], bit 0 first    | the same                       |
// | MODULE.row_offsets | I64 [N]: non-zeros before a row   | none                           |
//
// Old files carry a parameter's whole name ("MODULE.weight.bitmask", "MODULE.bias.bitmask") and
// compress vectors too: sparse-bitmask with shape [1], bitmask [ceil(K/8)] and row_offsets [].
#pragma once

#include <nlohmann/json_fwd.hpp>

#include "lacuna/io/checkpoint.h"
#include "lacuna/io/compact_store.h"

namespace lacuna::io {

inline bool is_legacy(Store store) {
  return store == Store::kSparseBitmask || store == Store::kSparse24Bitmask;
}

/// The weights of the files that lie in one of these stores, under their dense names.
/// @errors kBadInput: a part that is missing or has the wrong type or shape
Result<std::vector<WeightInfo>> find_legacy(const StoredTensors& tensors);
/// One of them: a matrix as a sound one of `info.pattern` (what find_legacy says, or what
/// config.json declares), a vector dense.
/// @errors kBadInput: counts or offsets that don't fit the mask; weights that break the pattern
Result<Weight> read_legacy(const WeightInfo& info, const StoredTensors& tensors);
/// Refuses a config.json that names a sparse format we don't know, or one that isn't bitmask-based.
Status check_legacy_config(const nlohmann::json& config, const std::string& file);

/// Can sparse-24-bitmask hold it?
bool fits_sparse24(const format::CompactMatrix& matrix);
/// A sound matrix as tensors of the store. @errors kBadInput: a name that doesn't end in ".weight";
/// quantised values
Result<std::vector<NamedTensor>> legacy_parts(const std::string& name,
                                              const format::CompactMatrix& matrix, Store store);
/// config.json's quantization_config for a folder in this store. `weights` are the sparse ones,
/// `sparsity` the share of zeros in the whole model.
nlohmann::json legacy_config(Store store, const std::vector<std::string>& weights, double sparsity);

}  // namespace lacuna::io
