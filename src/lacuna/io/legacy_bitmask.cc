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

/// A vector is compressed as a matrix of one row.
CompactMatrix one_row_or_matrix(const WeightInfo& info) {
  CompactMatrix matrix;
  matrix.pattern = info.store == Store::kSparse24Bitmask ? kTwoOfFour : Pattern::unstructured();
  matrix.rows = info.shape.size() == 2 ? info.shape[0] : 1;
  matrix.columns = info.shape.back();
  matrix.values_dtype = info.dtype;
  return matrix;
}

/// The dense shape, which is itself the content of a tensor.
Result<Shape> read_shape(const StoredTensors& tensors, const std::string& name) {
  const auto found = tensors.find(name);
  const int64_t rank = found == tensors.end() ? 2 : found->second.tensor.elements();
  LACUNA_TRY(const StoredTensor stored,
             expect_tensor(tensors, name, DType::kI64,
                           found != tensors.end() && found->second.tensor.shape.size() == 2
                               ? Shape{2, 1}
                               : Shape{rank == 1 ? 1 : 2}));
  Shape shape;
  for (int64_t i = 0; i < rank; ++i)
    shape.push_back(read_unaligned<int64_t>(stored.tensor.bytes.as<int64_t>() + i));
  constexpr int64_t kLargestExtent = (int64_t{1} << 31) - 1;
  for (const int64_t extent : shape)
    if (extent < 0 || extent > kLargestExtent)
      return bad_input(
          "{}: tensor \"{}\" holds an impossible shape (got {}; need sizes below 2^31).",
          stored.file, name, shape_text(shape));
  return shape;
}

Result<WeightInfo> describe(const std::string& prefix, const StoredTensors& tensors) {
  WeightInfo info;
  const bool whole_name = prefix.ends_with(".weight.") || prefix.ends_with(".bias.");
  info.name = whole_name ? prefix.substr(0, prefix.size() - 1) : prefix + "weight";
  info.parts = {prefix + "bitmask", prefix + "compressed", prefix + "shape"};
  const auto values = tensors.find(info.parts[1]);
  if (values == tensors.end())
    return bad_input("{}: tensor \"{}\" is missing (need it beside {}). Get the model again.",
                     tensors.at(info.parts[0]).file, info.parts[1], info.parts[0]);
  const auto& [compressed, file, mapped] = values->second;
  info.dtype = compressed.dtype;
  if (info.dtype != DType::kF32 && info.dtype != DType::kBF16 && info.dtype != DType::kF16)
    return bad_input("{}: tensor \"{}\" has an unsupported type (got {}; need F32, BF16 or F16).",
                     file, info.parts[1], safetensors_name(info.dtype));
  LACUNA_TRY(info.shape, read_shape(tensors, info.parts[2]));
  const bool vector = info.shape.size() == 1;
  const bool two_of_four = compressed.shape.size() == 2;
  info.store = two_of_four ? Store::kSparse24Bitmask : Store::kSparseBitmask;
  const CompactMatrix matrix = one_row_or_matrix(info);
  if (!vector) info.pattern = matrix.pattern;
  if (two_of_four && (vector || matrix.columns % 4 != 0))
    return bad_input("{}: tensor \"{}\" says {} (need a matrix, columns in fours, for 2:4).", file,
                     info.parts[2], shape_text(info.shape));
  const int64_t stride = matrix.bitmap_stride_bytes();
  LACUNA_CHECK(expect_tensor(tensors, info.parts[0], DType::kU8,
                             vector ? Shape{stride} : Shape{matrix.rows, stride}));
  LACUNA_CHECK(expect_tensor(tensors, info.parts[1], info.dtype,
                             two_of_four ? Shape{matrix.rows, matrix.columns / 2} : Shape{-1}));
  if (tensors.contains(prefix + "row_offsets")) {
    info.parts.push_back(prefix + "row_offsets");
    LACUNA_CHECK(expect_tensor(tensors, info.parts.back(), DType::kI64,
                               vector ? Shape{} : Shape{matrix.rows}));
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

Result<Weight> read_legacy(const WeightInfo& info, const StoredTensors& tensors) {
  const auto& [bitmask, file, mapped] = tensors.at(info.parts[0]);
  const std::string where = fmt::format("{}: weight \"{}\"", file, info.name);
  CompactMatrix matrix = one_row_or_matrix(info);
  matrix.bitmap = bitmask.bytes;
  matrix.values = tensors.at(info.parts[1]).tensor.bytes;
  if (info.store == Store::kSparseBitmask)
    matrix.offsets = Bytes::take(prefix_counts(matrix, format::kRowGroup, /*with_total=*/true));
  LACUNA_CHECK(check_sound(matrix, where));
  if (info.parts.size() > 3) {
    const Bytes stored = tensors.at(info.parts[3]).tensor.bytes;
    const auto counts = prefix_counts(matrix, 1, /*with_total=*/false);
    for (int64_t row = 0; row < matrix.rows; ++row)
      if (const auto got = read_unaligned<int64_t>(stored.as<int64_t>() + row); got != counts[row])
        return bad_input(
            "{}: row {} of \"{}\" says {} values before it (need {}). The file is damaged: get it "
            "again.",
            where, row, info.parts[3], got, counts[row]);
  }
  Tensor dense = format::expand(matrix);
  if (info.shape.size() == 1) {
    dense.shape = info.shape;
    return Weight(std::move(dense));
  }
  // Which zeros of a group are stored is open here; ours have one form only.
  auto canonical = format::compress(dense, info.pattern);
  if (!canonical.ok()) return bad_input("{}: {}", where, canonical.error().message);
  return Weight(std::move(canonical).value());
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
  LACUNA_CHECK(check_no_codes(name, matrix, store_name(store)));
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
