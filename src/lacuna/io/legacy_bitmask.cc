#include "lacuna/io/legacy_bitmask.h"

#include <bit>
#include <nlohmann/json.hpp>

namespace lacuna::io {
namespace {
using format::CompactMatrix;
using format::Pattern;
using nlohmann::json;

constexpr std::string_view kWeight = ".weight";
// The last release whose reader knows both stores writes this layout.
constexpr const char* kVersion = "0.10.2";

const Pattern kTwoOfFour = Pattern::keep_of(2, 4);

/// "MODULE." or "MODULE.weight." of a weight whose parts are known.
std::string prefix_of(const WeightInfo& info) {
  constexpr std::string_view kSuffix = "bitmask";
  return info.parts[0].substr(0, info.parts[0].size() - kSuffix.size());
}

/// Number of set bits in a row of a bitmask.
int64_t count_row(const CompactMatrix& matrix, int64_t row) {
  const int64_t stride = matrix.bitmap_stride_bytes();
  int64_t count = 0;
  for (int64_t i = row * stride; i < (row + 1) * stride; ++i)
    count += std::popcount(matrix.bitmap.as<uint8_t>()[i]);
  return count;
}

/// Set bits before each `step`-th row; with_total adds their number at the end.
std::vector<int64_t> prefix_counts(const CompactMatrix& matrix, int64_t step, bool with_total) {
  std::vector<int64_t> counts;
  int64_t total = 0;
  for (int64_t row = 0; row < matrix.rows; ++row) {
    if (row % step == 0) counts.push_back(total);
    total += count_row(matrix, row);
  }
  if (with_total) counts.push_back(total);
  return counts;
}

Result<WeightInfo> describe(const std::string& prefix, const StoredTensors& tensors) {
  WeightInfo info;
  info.name = prefix + "weight";
  if (std::string_view(prefix).ends_with(".weight."))
    info.name = prefix.substr(0, prefix.size() - 1);
  info.parts = {prefix + "bitmask", prefix + "compressed", prefix + "shape"};

  const auto values = tensors.find(prefix + "compressed");
  if (values == tensors.end())
    return bad_input("{}: tensor \"{}compressed\" is missing (need it beside {}bitmask).",
                     tensors.at(info.parts[0]).file, prefix, prefix);
  const auto& [compressed, file] = values->second;
  info.dtype = compressed.dtype;
  if (info.dtype != DType::kF32 && info.dtype != DType::kBF16 && info.dtype != DType::kF16)
    return bad_input("{}: tensor \"{}\" has an unsupported type (got {}; need F32, BF16 or F16).",
                     file, values->first, safetensors_name(info.dtype));
  const bool two_of_four = compressed.shape.size() == 2;
  info.store = two_of_four ? Store::kSparse24Bitmask : Store::kSparseBitmask;
  info.pattern = two_of_four ? kTwoOfFour : Pattern::unstructured();

  const std::string shape_name = prefix + "shape";
  LACUNA_TRY(const StoredTensor shape,
             expect_tensor(tensors, shape_name, DType::kI64,
                           two_of_four && tensors.contains(shape_name) &&
                                   tensors.at(shape_name).tensor.shape.size() == 2
                               ? Shape{2, 1}
                               : Shape{2}));
  const auto* extents = shape.tensor.bytes.as<int64_t>();
  for (int i = 0; i < 2; ++i) info.shape.push_back(read_unaligned<int64_t>(extents + i));
  constexpr int64_t kLargestExtent = (int64_t{1} << 31) - 1;
  for (const int64_t extent : info.shape)
    if (extent < 0 || extent > kLargestExtent)
      return bad_input("{}: tensor \"{}\" holds no shape of a matrix (got {}).", shape.file,
                       shape_name, shape_text(info.shape));
  const int64_t rows = info.shape[0], columns = info.shape[1];
  LACUNA_CHECK(expect_tensor(tensors, info.parts[0], DType::kU8, Shape{rows, (columns + 7) / 8}));
  if (two_of_four && columns % 4 != 0)
    return bad_input("{}: tensor \"{}\" says {} columns (need a multiple of 4 for 2:4).",
                     shape.file, shape_name, columns);
  LACUNA_CHECK(expect_tensor(tensors, info.parts[1], info.dtype,
                             two_of_four ? Shape{rows, columns / 2} : Shape{-1}));
  if (tensors.contains(prefix + "row_offsets")) {
    info.parts.push_back(prefix + "row_offsets");
    LACUNA_CHECK(expect_tensor(tensors, info.parts.back(), DType::kI64, Shape{rows}));
  }
  for (const std::string& part : info.parts) info.bytes += tensors.at(part).tensor.bytes.size();
  return info;
}

}  // namespace

Result<std::vector<WeightInfo>> find_legacy(const StoredTensors& tensors) {
  std::vector<WeightInfo> found;
  for (const auto& [name, stored] : tensors) {
    if (!name.ends_with(".bitmask")) continue;
    LACUNA_TRY(WeightInfo info,
               describe(name.substr(0, name.size() - std::string_view("bitmask").size()), tensors));
    found.push_back(std::move(info));
  }
  return found;
}

Result<CompactMatrix> read_legacy(const WeightInfo& info, const StoredTensors& tensors) {
  const std::string prefix = prefix_of(info);
  const auto bytes = [&](const char* part) { return tensors.at(prefix + part).tensor.bytes; };
  const std::string where =
      fmt::format("{}: weight \"{}\"", tensors.at(info.parts[0]).file, info.name);
  CompactMatrix matrix;
  matrix.rows = info.shape[0];
  matrix.columns = info.shape[1];
  matrix.values_dtype = info.dtype;
  matrix.bitmap = bytes("bitmask");
  matrix.values = bytes("compressed");
  if (info.store == Store::kSparse24Bitmask) {
    matrix.pattern = kTwoOfFour;
  } else {
    matrix.pattern = Pattern::unstructured();
    matrix.offsets = Bytes::take(prefix_counts(matrix, format::kRowGroup, /*with_total=*/true));
  }
  LACUNA_CHECK(check_sound(matrix, where));
  if (tensors.contains(prefix + "row_offsets")) {
    const Bytes stored = bytes("row_offsets");
    const auto counts = prefix_counts(matrix, 1, /*with_total=*/false);
    for (int64_t row = 0; row < matrix.rows; ++row)
      if (const auto got = read_unaligned<int64_t>(stored.as<int64_t>() + row); got != counts[row])
        return bad_input(
            "{}: tensor \"{}row_offsets\", row {}: wrong number of values before it (got {}; need "
            "{}). The file is damaged: get it again.",
            where, prefix, row, got, counts[row]);
  }
  // Which zeros of a group are stored is open here; ours have one form only.
  auto canonical = format::compress(format::expand(matrix), info.pattern);
  if (!canonical.ok()) return bad_input("{}: {}", where, canonical.error().message);
  return canonical;
}

Status check_legacy_config(const json& config, const std::string& file) {
  for (const char* key : {"quantization_config", "compression_config"}) {
    const auto outer = config.find(key);
    if (outer == config.end() || !outer->is_object()) continue;
    const auto sparsity = outer->find("sparsity_config");
    if (sparsity == outer->end() || !sparsity->is_object()) continue;
    const json format = sparsity->value("format", json("dense"));
    if (format != "dense" && format != "sparse-bitmask" && format != "sparse-24-bitmask")
      return bad_input(
          "{}: unknown sparse format (got {}; need dense, sparse-bitmask or sparse-24-bitmask).",
          file, format.dump());
  }
  return {};
}

bool fits_sparse24(const CompactMatrix& matrix) {
  return matrix.pattern == kTwoOfFour && matrix.columns % 4 == 0;
}

Result<std::vector<NamedTensor>> legacy_parts(const std::string& name, const CompactMatrix& matrix,
                                              Store store) {
  if (!std::string_view(name).ends_with(kWeight))
    return bad_input("weight \"{}\": {} holds weights of modules only (need a name in {}).", name,
                     store_name(store), kWeight);
  const std::string prefix = name.substr(0, name.size() - kWeight.size() + 1);
  const Tensor bitmask_shape{DType::kU8, {matrix.rows, matrix.bitmap_stride_bytes()}, {}};
  const auto part = [&](const char* suffix, DType dtype, Shape shape, Bytes bytes) {
    return NamedTensor{prefix + suffix, {dtype, std::move(shape), std::move(bytes)}};
  };
  const Bytes extents = Bytes::take(std::vector<int64_t>{matrix.rows, matrix.columns});
  if (store == Store::kSparse24Bitmask)
    return std::vector<NamedTensor>{
        part("bitmask", DType::kU8, bitmask_shape.shape, matrix.bitmap),
        part("compressed", matrix.values_dtype, {matrix.rows, matrix.columns / 2}, matrix.values),
        part("shape", DType::kI64, {2, 1}, extents)};
  LACUNA_TRY(const CompactMatrix kept,
             format::compress(format::expand(matrix), Pattern::unstructured()));
  const auto values = static_cast<int64_t>(kept.values.size() / size_bytes(kept.values_dtype));
  return std::vector<NamedTensor>{part("bitmask", DType::kU8, bitmask_shape.shape, kept.bitmap),
                                  part("compressed", kept.values_dtype, {values}, kept.values),
                                  part("row_offsets", DType::kI64, {kept.rows},
                                       Bytes::take(prefix_counts(kept, 1, /*with_total=*/false))),
                                  part("shape", DType::kI64, {2}, extents)};
}

json legacy_config(Store store, const std::vector<std::string>& weights, double sparsity) {
  json targets = json::array();
  for (const std::string& name : weights)
    targets.push_back(name.substr(0, name.size() - kWeight.size()));
  return {{"quant_method", "compressed-tensors"},
          {"version", kVersion},
          {"sparsity_config",
           {{"format", store_name(store)},
            {"targets", std::move(targets)},
            {"ignore", json::array()},
            {"global_sparsity", sparsity},
            {"sparsity_structure", store == Store::kSparse24Bitmask ? "2:4" : "unstructured"}}}};
}

}  // namespace lacuna::io
