// The compact store: which safetensors names carry a sparse weight, and what config.json says of it
// (docs/formats.md).
#pragma once

#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "lacuna/format/compact.h"
#include "lacuna/io/stored_tensors.h"

namespace lacuna::io {

/// An entry of config.json's lacuna.weights. A dense store keeps it too, so that the pattern
/// survives (it has no codes then). The pattern is dense for a quantised dense weight alone.
struct SparseDeclaration {
  format::Pattern pattern;
  int64_t rows = 0, columns = 0;
  DType values = DType::kBF16;  ///< of the weight; of the stored values unless quantised
  format::Quantization quantization;
};
using SparseDeclarations = std::map<std::string, SparseDeclaration, std::less<>>;

/// What config.json's key "lacuna" declares; empty without that key. `file` is for messages.
/// @errors kBadInput: unknown format version, pattern, value type or quantization; impossible shape
Result<SparseDeclarations> read_declarations(const nlohmann::json& config, const std::string& file);
/// Sets lacuna.format_version and lacuna.weights, leaving what else the key holds.
void write_declarations(const SparseDeclarations& declarations, nlohmann::json& config);

/// The safetensors names of a weight's parts, in the order in which they are written.
std::vector<std::string> compact_part_names(const std::string& name,
                                            const SparseDeclaration& declaration);
/// What declares a matrix.
SparseDeclaration declaration_of(const format::CompactMatrix& matrix);
/// A matrix as the tensors that carry it.
std::vector<NamedTensor> compact_parts(const std::string& name,
                                       const format::CompactMatrix& matrix);
/// The matrix that the parts carry, as views of them; its content is for format::validate().
/// @errors kBadInput: a part that is missing or has the wrong type or shape
Result<format::CompactMatrix> read_compact(const std::string& name,
                                           const SparseDeclaration& declaration,
                                           const StoredTensors& tensors);

/// Fails with the first violation of a matrix. `where` names file and weight.
Status check_sound(const format::CompactMatrix& matrix, const std::string& where);

}  // namespace lacuna::io
