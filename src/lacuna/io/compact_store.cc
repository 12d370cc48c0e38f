#include "lacuna/io/compact_store.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "lacuna/core/memory.h"
#include "lacuna/core/version.h"
#include "lacuna/format/codes.h"

namespace lacuna::io {
namespace {
using format::CompactMatrix;
using format::ExchangeKind;
using format::IndexedMatrix;
using format::PatternKind;
using nlohmann::json;

constexpr const char* kKey = "lacuna";

/// One part of a matrix: its suffix, its type and shape (an extent that the content decides is -1),
/// and where it lies in CompactMatrix or IndexedMatrix.
template <class Matrix>
struct Part {
  std::string_view suffix;
  DType dtype;
  Shape shape;
  Bytes Matrix::*bytes;
};
template <class Matrix>
using Parts = std::vector<Part<Matrix>>;

/// An empty matrix as it is declared, in the compact store.
CompactMatrix compact_layout(const SparseDeclaration& d) {
  return {.pattern = d.pattern,
          .rows = d.rows,
          .columns = d.columns,
          .values_dtype = d.values,
          .quantization = d.quantization};
}

/// Its parts.
Parts<CompactMatrix> parts_of(const SparseDeclaration& d) {
  const auto groups = [](int64_t extent, int64_t of) { return (extent + of - 1) / of; };
  const bool coded = !d.quantization.none();
  const Part<CompactMatrix> bitmap{
      ".bitmap", DType::kU8, {d.rows, groups(d.columns, 8)}, &CompactMatrix::bitmap};
  const auto values = [&](Shape shape) {
    return Part<CompactMatrix>{".values",
                               coded ? format::stored_dtype(d.quantization.code) : d.values,
                               std::move(shape), &CompactMatrix::values};
  };
  // What one row holds of the elements above.
  const int64_t in_row = compact_layout(d).values_row_bytes() /
                         (coded ? 1 : static_cast<int64_t>(size_bytes(d.values)));
  Parts<CompactMatrix> parts;
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

/// The parts of a matrix in csr or coo.
Parts<IndexedMatrix> indexed_parts(const SparseDeclaration& d) {
  const bool csr = d.form.kind == ExchangeKind::kCsr;
  return {csr ? Part<IndexedMatrix>{".row_offsets",
                                    DType::kI64,
                                    {d.rows + 1},
                                    &IndexedMatrix::row_offsets}
              : Part<IndexedMatrix>{".rows", DType::kI32, {-1}, &IndexedMatrix::row_indices},
          {".columns", DType::kI32, {-1}, &IndexedMatrix::column_indices},
          {".values", d.values, {-1}, &IndexedMatrix::values}};
}

/// What lies in the files where a weight is declared in an exchange format: bsr is the compact
/// store of its blocks.
SparseDeclaration stored_as(SparseDeclaration declaration) {
  if (!declaration.form.none()) declaration.pattern = declaration.form.pattern();
  return declaration;
}

/// Calls f with the parts of a declared weight, whichever matrix they make up.
template <class F>
auto with_parts(const SparseDeclaration& declaration, F&& f) {
  return declaration.form.indexed() ? f(indexed_parts(declaration))
                                    : f(parts_of(stored_as(declaration)));
}

template <class Matrix>
std::vector<NamedTensor> tensors_of(const std::string& name, const Parts<Matrix>& parts,
                                    const Matrix& matrix) {
  std::vector<NamedTensor> tensors;
  for (const auto& part : parts) {
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

/// Fills in what the parts carry, and checks it.
template <class Matrix>
Result<Matrix> read_parts(const std::string& name, const Parts<Matrix>& parts,
                          const StoredTensors& tensors, const Executor& executor, Matrix matrix) {
  std::string file;
  for (const auto& part : parts) {
    LACUNA_TRY(const StoredTensor found,
               expect_tensor(tensors, name + std::string(part.suffix), part.dtype, part.shape));
    matrix.*part.bytes = found.tensor.bytes;
    if (file.empty()) file = found.file;
  }
  LACUNA_CHECK(check_sound(matrix, fmt::format("{}: weight \"{}\"", file, name), executor));
  return matrix;
}

/// The matrix as it lies in the files.
Result<CompactMatrix> read_stored(const std::string& name, const SparseDeclaration& d,
                                  const StoredTensors& tensors, const Executor& executor) {
  if (!d.form.indexed()) {
    const SparseDeclaration stored = stored_as(d);
    return read_parts(name, parts_of(stored), tensors, executor, compact_layout(stored));
  }
  LACUNA_TRY(const IndexedMatrix indexed, read_parts(name, indexed_parts(d), tensors, executor,
                                                     IndexedMatrix{.kind = d.form.kind,
                                                                   .rows = d.rows,
                                                                   .columns = d.columns,
                                                                   .values_dtype = d.values}));
  return format::from_indexed(indexed);
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
  if (entry.is_object() && entry.contains("format")) {
    const auto form = format::ExchangeForm::parse(text("format"));
    if (!form.ok())
      return bad_input("{}: unknown exchange format (got {}; need csr, coo or bsr:RxC).", where,
                       entry["format"].dump());
    if (version < kExchangeFormatVersion)
      return bad_input("{}: lies there as {}, which format version {} doesn't know (need {}).",
                       where, form->text(), version, kExchangeFormatVersion);
    if (!declaration.quantization.none())
      return bad_input("{}: is declared as {} and {} (need one: {} has no place for codes).", where,
                       declaration.quantization.text(), form->text(), form->text());
    declaration.form = *form;
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
  if (version == ours->end() ||
      (*version != kFormatVersion && *version != kQuantizedFormatVersion &&
       *version != kExchangeFormatVersion))
    return bad_input(
        "{}: unknown format version (got {}; need {}, {} or {}). It was written by another version "
        "of the tool: convert it with that one.",
        file, version == ours->end() ? "none" : version->dump(), kFormatVersion,
        kQuantizedFormatVersion, kExchangeFormatVersion);
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
  int version = kFormatVersion;
  json& weights = ours["weights"] = json::object();
  for (const auto& [name, d] : declarations) {
    json& entry = weights[name] = {{"pattern", d.pattern.text()},
                                   {"shape", {d.rows, d.columns}},
                                   {"values", safetensors_name(d.values)}};
    if (!d.quantization.none()) {
      entry["quantization"] = d.quantization.text();
      version = std::max(version, kQuantizedFormatVersion);
    }
    if (!d.form.none()) {
      entry["format"] = d.form.text();
      version = std::max(version, kExchangeFormatVersion);
    }
  }
  ours["format_version"] = version;
}

std::vector<std::string> compact_part_names(const std::string& name,
                                            const SparseDeclaration& declaration) {
  return with_parts(declaration, [&](const auto& parts) {
    std::vector<std::string> names;
    for (const auto& part : parts) names.push_back(name + std::string(part.suffix));
    return names;
  });
}

SparseDeclaration declaration_of(const CompactMatrix& matrix) {
  return {matrix.pattern,      matrix.rows,         matrix.columns,
          matrix.values_dtype, matrix.quantization, {}};
}

Result<std::vector<NamedTensor>> compact_parts(const std::string& name, const CompactMatrix& matrix,
                                               const format::ExchangeForm& form) {
  SparseDeclaration declaration = declaration_of(matrix);
  if (form.none()) return tensors_of(name, parts_of(declaration), matrix);
  LACUNA_CHECK(check_no_codes(name, matrix, form.text()));
  LACUNA_TRY(const CompactMatrix stored, format::with_pattern(matrix, form.pattern()));
  declaration.form = form;
  if (form.indexed())
    return tensors_of(name, indexed_parts(declaration), format::to_indexed(stored, form.kind));
  return tensors_of(name, parts_of(stored_as(declaration)), stored);
}

Status check_no_codes(const std::string& name, const CompactMatrix& matrix,
                      std::string_view store) {
  if (matrix.quantization.none()) return {};
  return bad_input(
      "weight \"{}\": {} has no place for codes (got {}; need unquantised values). Convert the "
      "model with --store dense first.",
      name, store, matrix.quantization.text());
}

Status check_parts(const std::string& name, const SparseDeclaration& declaration,
                   const StoredTensors& tensors) {
  return with_parts(declaration, [&](const auto& parts) -> Status {
    for (const auto& part : parts)
      LACUNA_CHECK(expect_tensor(tensors, name + std::string(part.suffix), part.dtype, part.shape));
    return {};
  });
}

Result<CompactMatrix> read_compact(const std::string& name, const SparseDeclaration& declaration,
                                   const StoredTensors& tensors, const Executor& executor) {
  if (declaration.form.none()) return read_stored(name, declaration, tensors, executor);
  LACUNA_CHECK(check_parts(name, declaration, tensors));
  const std::string& file = tensors.at(compact_part_names(name, declaration).front()).file;
  const std::string where = fmt::format("{}: weight \"{}\"", file, name);
  // A file of a few bytes may declare a matrix of any size: its bitmap, or for patterns that are
  // checked on it the dense form.
  const auto cells =
      static_cast<double>(declaration.rows) * static_cast<double>(declaration.columns);
  const double bytes =
      declaration.pattern.kind == PatternKind::kUnstructured ? cells / 8 : cells * 2;
  if (bytes > static_cast<double>(physical_memory_bytes()))
    return not_possible(
        "{}: {} of shape {} does not fit into memory (it needs {:.1f} GB; there are {:.1f}). Use a "
        "machine with more.",
        where, declaration.form.text(), shape_text({declaration.rows, declaration.columns}),
        bytes / 1e9, static_cast<double>(physical_memory_bytes()) / 1e9);
  LACUNA_TRY(const CompactMatrix stored, read_stored(name, declaration, tensors, executor));
  auto matrix = format::with_pattern(stored, declaration.pattern);
  if (!matrix.ok()) return bad_input("{}: {}", where, matrix.error().message);
  return matrix;
}

}  // namespace lacuna::io
