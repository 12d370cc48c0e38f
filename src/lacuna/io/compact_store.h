// The compact store and the exchange formats: which safetensors names carry a sparse weight, and
// what config.json says of it (docs/formats.md).
#pragma once

#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <type_traits>
#include <vector>

#include "lacuna/core/executor.h"
#include "lacuna/format/compact.h"
#include "lacuna/format/exchange.h"
#include "lacuna/io/stored_tensors.h"

namespace lacuna::io {

/// An entry of config.json's lacuna.weights. A dense store keeps it too, so that the pattern
/// survives (it has no codes then). The pattern is dense for a quantised dense weight alone.
struct SparseDeclaration {
  format::Pattern pattern;
  int64_t rows = 0, columns = 0;
  DType values = DType::kBF16;  ///< of the weight; of the stored values unless quantised
  format::Quantization quantization;
  format::ExchangeForm form;  ///< none: the compact store. Without codes otherwise
};
using SparseDeclarations = std::map<std::string, SparseDeclaration, std::less<>>;

/// What config.json's key "lacuna" declares; empty without that key. `file` is for messages.
/// @errors kBadInput: unknown format version, pattern, value type, quantization or exchange format;
/// impossible shape
Result<SparseDeclarations> read_declarations(const nlohmann::json& config, const std::string& file);
/// Sets lacuna.format_version and lacuna.weights, leaving what else the key holds.
void write_declarations(const SparseDeclarations& declarations, nlohmann::json& config);

/// The safetensors names of a weight's parts, in the order in which they are written.
std::vector<std::string> compact_part_names(const std::string& name,
                                            const SparseDeclaration& declaration);
/// What declares a matrix in the compact store.
SparseDeclaration declaration_of(const format::CompactMatrix& matrix);
/// A sound matrix as the tensors that carry it. @errors kBadInput: codes for an exchange format,
/// which has no place for them
Result<std::vector<NamedTensor>> compact_parts(const std::string& name,
                                               const format::CompactMatrix& matrix,
                                               const format::ExchangeForm& form = {});
/// Whether every part is there with its type and shape; their content is not read.
/// @errors kBadInput: a part that is missing or has the wrong type or shape
Status check_parts(const std::string& name, const SparseDeclaration& declaration,
                   const StoredTensors& tensors);
/// The sound matrix that the parts carry, of the declared pattern: views of them, where they are
/// in the compact store.
/// @errors kBadInput: as check_parts(); content that breaks its rules (row and column named).
/// kNotPossible: too large for the memory (a few bytes of an exchange format may stand for any
/// number of rows and columns)
Result<format::CompactMatrix> read_compact(const std::string& name,
                                           const SparseDeclaration& declaration,
                                           const StoredTensors& tensors,
                                           const Executor& executor = Executor::serial());

/// Refuses a quantised matrix for a store that has no place for codes. @errors kBadInput
Status check_no_codes(const std::string& name, const format::CompactMatrix& matrix,
                      std::string_view store);
/// Fails with the first violation of a matrix. `where` names file and weight.
template <class Matrix>
Status check_sound(const Matrix& matrix, const std::string& where,
                   const Executor& executor = Executor::serial()) {
  std::vector<format::Violation> violations;
  if constexpr (std::is_same_v<Matrix, format::CompactMatrix>)
    violations = format::validate(matrix, 1, executor);
  else
    violations = format::validate(matrix, 1);
  if (violations.empty()) return {};
  const auto& [row, column, what] = violations.front();
  const std::string place = row < 0 ? "" : fmt::format("row {}, column {}: ", row, column);
  return bad_input("{}: {}{}. The file is damaged: get it again.", where, place, what);
}

}  // namespace lacuna::io
