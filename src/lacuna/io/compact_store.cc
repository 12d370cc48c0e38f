#include "lacuna/io/compact_store.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "lacuna/core/version.h"
#include "lacuna/format/codes.h"

namespace lacuna::io {
namespace {
using format::CompactMatrix;
using format::PatternKind;
using nlohmann::json;

constexpr const char* kKey = "lacuna";

/// One part of a matrix: its suffix, its type and shape, and where it lies in CompactMatrix.
struct Part {
  std::string_view suffix;
  DType dtype;
  Shape shape;
  Bytes CompactMatrix::*bytes;
};

/// The parts of a matrix with this pattern and shape; an extent that the content decides is -1.
std::vector<Part> parts_of(const SparseDeclaration& d) {
  const auto groups = [](int64_t extent, int64_t of) { return (extent + of - 1) / of; };
  const bool coded = !d.quantization.none();
  const Part bitmap{".bitmap", DType::kU8, {d.rows, groups(d.columns, 8)}, &CompactMatrix::bitmap};
  const auto values = [&](Shape shape) {
    return Part{".values", coded ? format::stored_dtype(d.quantization.code) : d.values,
                std::move(shape), &CompactMatrix::values};
  };
  // What one row holds of the elements above.
  const CompactMatrix layout{.pattern = d.pattern,
                             .rows = d.rows,
                             .columns = d.columns,
                             .values_dtype = d.values,
                             .quantization = d.quantization};
  const int64_t in_row =
      layout.values_row_bytes() / (coded ? 1 : static_cast<int64_t>(size_bytes(d.values)));
  std::vector<Part> parts;
  switch (d.pattern.kind) {
    case PatternKind::kUnstructured:
      parts = {bitmap,
               values({-1}),
               {".offsets",
                DType::kI64,
                {groups(d.rows, format::kRowGroup) + 1},
                &CompactMatrix::offsets}};
      break;
    case PatternKind::kKeepOf:
      parts = {bitmap, values({d.rows, in_row})};
      break;
    case PatternKind::kBlock:
      parts = {{".block_columns", DType::kI32, {-1}, &CompactMatrix::block_columns},
               {".block_offsets",
                DType::kI64,
                {groups(d.rows, d.pattern.block_rows) + 1},
                &CompactMatrix::block_offsets},
               values({-1, d.pattern.block_rows, in_row})};
      break;
    case PatternKind::kDense:
      if (coded) parts = {values({d.rows, in_row})};
      break;
  }
  if (!coded) return parts;
  const Shape scales{d.rows, d.quantization.groups(d.columns)};
  parts.push_back({".scales", DType::kBF16, scales, &CompactMatrix::scales});
  if (d.quantization.zero_points)
    parts.push_back({".zeros", DType::kI8, scales, &CompactMatrix::zero_points});
  return parts;
}

Result<SparseDeclaration> read_declaration(const std::string& where, const json& entry,
                                           int version) {
  const auto text = [&](const char* key) {
    return entry.is_object() && entry.contains(key) && entry[key].is_string()
               ? entry[key].get<std::string>()
               : std::string();
  };
  SparseDeclaration declaration;
  if (entry.is_object() && entry.contains("quantization")) {
    const auto quantization = format::Quantization::parse(text("quantization"));
    if (!quantization.ok() || quantization->none())
      return bad_input("{}: unknown quantization (got {}; need int8, int4g64, fp8, ...).", where,
                       entry["quantization"].dump());
    if (version < kQuantizedFormatVersion)
      return bad_input("{}: is quantised, which format version {} doesn't know (need {}).", where,
                       version, kQuantizedFormatVersion);
    declaration.quantization = *quantization;
  }
  const auto pattern = format::Pattern::parse(text("pattern"));
  if (!pattern.ok() || (pattern->kind == PatternKind::kDense && declaration.quantization.none()))
    return bad_input("{}: unknown pattern (got \"{}\"; need unstructured, KEEP:OF or block:RxC).",
                     where, text("pattern"));
  declaration.pattern = *pattern;
  const auto values = dtype_from_safetensors(text("values"));
  if (!values || (*values != DType::kF32 && *values != DType::kBF16 && *values != DType::kF16))
    return bad_input("{}: unknown value type (got \"{}\"; need F32, BF16 or F16).", where,
                     text("values"));
  declaration.values = *values;
  constexpr int64_t kLargestExtent = (int64_t{1} << 31) - 1;
  const json shape = entry.value("shape", json());
  for (const json& extent : shape)
    if (!extent.is_number_integer() || extent.get<int64_t>() < 0 ||
        extent.get<int64_t>() > kLargestExtent)
      return bad_input("{}: impossible shape (need two sizes below 2^31).", where);
  if (!shape.is_array() || shape.size() != 2)
    return bad_input("{}: not the shape of a matrix (need two sizes below 2^31).", where);
  declaration.rows = shape[0];
  declaration.columns = shape[1];
  return declaration;
}

}  // namespace

Result<SparseDeclarations> read_declarations(const json& config, const std::string& file) {
  SparseDeclarations declarations;
  const auto ours = config.find(kKey);
  if (ours == config.end() || ours->is_null()) return declarations;
  if (!ours->is_object()) return bad_input("{}: \"{}\" is not an object (need one).", file, kKey);
  const auto version = ours->find("format_version");
  const auto weights = ours->find("weights");
  if (version == ours->end() && weights == ours->end()) return declarations;
  if (version == ours->end() || (*version != kFormatVersion && *version != kQuantizedFormatVersion))
    return bad_input(
        "{}: unknown format version (got {}; need {} or {}). It was written by another version of "
        "the tool: convert it with that one.",
        file, version == ours->end() ? "none" : version->dump(), kFormatVersion,
        kQuantizedFormatVersion);
  if (weights == ours->end()) return declarations;
  if (!weights->is_object())
    return bad_input("{}: \"{}.weights\" is not an object (need one).", file, kKey);
  for (const auto& [name, entry] : weights->items()) {
    LACUNA_TRY(declarations[name], read_declaration(fmt::format("{}: weight \"{}\"", file, name),
                                                    entry, version->get<int>()));
  }
  return declarations;
}

void write_declarations(const SparseDeclarations& declarations, json& config) {
  json& ours = config[kKey];
  if (!ours.is_object()) ours = json::object();
  const bool quantized = std::any_of(declarations.begin(), declarations.end(),
                                     [](const auto& d) { return !d.second.quantization.none(); });
  ours["format_version"] = quantized ? kQuantizedFormatVersion : kFormatVersion;
  json& weights = ours["weights"] = json::object();
  for (const auto& [name, d] : declarations) {
    json& entry = weights[name] = {{"pattern", d.pattern.text()},
                                   {"shape", {d.rows, d.columns}},
                                   {"values", safetensors_name(d.values)}};
    if (!d.quantization.none()) entry["quantization"] = d.quantization.text();
  }
}

std::vector<std::string> compact_part_names(const std::string& name,
                                            const SparseDeclaration& declaration) {
  std::vector<std::string> names;
  for (const Part& part : parts_of(declaration)) names.push_back(name + std::string(part.suffix));
  return names;
}

SparseDeclaration declaration_of(const CompactMatrix& matrix) {
  return {matrix.pattern, matrix.rows, matrix.columns, matrix.values_dtype, matrix.quantization};
}

std::vector<NamedTensor> compact_parts(const std::string& name, const CompactMatrix& matrix) {
  std::vector<NamedTensor> tensors;
  for (const Part& part : parts_of(declaration_of(matrix))) {
    Tensor tensor{part.dtype, part.shape, matrix.*part.bytes};
    if (!tensor.shape.empty() && tensor.shape[0] < 0) {
      tensor.shape[0] = 1;
      const auto item_bytes = tensor.elements() * static_cast<int64_t>(size_bytes(tensor.dtype));
      tensor.shape[0] = static_cast<int64_t>(tensor.bytes.size()) / item_bytes;
    }
    tensors.push_back({name + std::string(part.suffix), std::move(tensor)});
  }
  return tensors;
}

Result<CompactMatrix> read_compact(const std::string& name, const SparseDeclaration& declaration,
                                   const StoredTensors& tensors) {
  CompactMatrix matrix;
  matrix.pattern = declaration.pattern;
  matrix.rows = declaration.rows;
  matrix.columns = declaration.columns;
  matrix.values_dtype = declaration.values;
  matrix.quantization = declaration.quantization;
  for (const Part& part : parts_of(declaration)) {
    LACUNA_TRY(const StoredTensor found,
               expect_tensor(tensors, name + std::string(part.suffix), part.dtype, part.shape));
    matrix.*part.bytes = found.tensor.bytes;
  }
  return matrix;
}

Status check_sound(const CompactMatrix& matrix, const std::string& where) {
  const auto violations = format::validate(matrix, 1);
  if (violations.empty()) return {};
  const auto& [row, column, what] = violations.front();
  if (row < 0) return bad_input("{}: {}. The file is damaged: get it again.", where, what);
  return bad_input("{}: row {}, column {}: {}. The file is damaged: get it again.", where, row,
                   column, what);
}

}  // namespace lacuna::io
