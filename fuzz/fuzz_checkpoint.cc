// A model folder from anywhere, as config.json, byte 0, safetensors: refused with a message, or
// every weight that can be read is sound, expands and follows its pattern. Covers the compact store
// with values and with codes, the exchange formats, and both stores of compressed-tensors.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <nlohmann/json.hpp>
#include <vector>

#include "lacuna/format/quantize.h"
#include "lacuna/io/checkpoint.h"
#include "lacuna/io/json.h"

namespace {

using lacuna::Bytes;
using lacuna::Tensor;
using lacuna::format::CompactMatrix;
using lacuna::format::PatternKind;
using lacuna::io::Checkpoint;
using lacuna::io::SafetensorsFile;
using nlohmann::json;

// A few bytes of empty blocks stand for any dense size, and one kept weight for a whole block.
constexpr int64_t kMostElements = 1 << 20;

void require(bool holds) {
  if (!holds) std::abort();
}

bool is_small(const lacuna::io::WeightInfo& info) {
  const auto& [kind, keep, of, block_rows, block_columns] = info.pattern;
  lacuna::Shape padded = info.shape;
  if (kind == PatternKind::kBlock && padded.size() == 2) {
    padded[0] += block_rows;
    padded[1] += block_columns;
  }
  return lacuna::element_count(padded).value_or(kMostElements) < kMostElements;
}

void exercise(const CompactMatrix& matrix) {
  require(lacuna::format::validate(matrix).empty());
  const Tensor dense = lacuna::format::expand(matrix);
  require(lacuna::format::check_pattern(dense, matrix.pattern).empty());
  require(lacuna::format::count_zeros(matrix) == lacuna::format::count_zeros(dense));
  if (matrix.rows > 2) {
    const size_t row_bytes = static_cast<size_t>(matrix.columns) * size_bytes(matrix.values_dtype);
    std::vector<std::byte> rows(row_bytes * static_cast<size_t>(matrix.rows - 2));
    lacuna::format::expand_rows(matrix, 1, matrix.rows - 1, rows.data());
    require(rows.empty() ||
            std::memcmp(rows.data(), dense.bytes.data() + row_bytes, rows.size()) == 0);
  }
  const int64_t dropped = matrix.rows * matrix.columns - lacuna::format::count_kept(matrix);
  require(dropped >= 0 && dropped <= lacuna::format::count_zeros(matrix));
  if (matrix.pattern.kind == PatternKind::kDense) return;
  const auto again = lacuna::format::compress(dense, matrix.pattern);
  require(again.ok() && lacuna::format::validate(*again).empty());
  // Codes anew, of what these values or codes stand for; NaN and infinities are refused.
  const auto coded = lacuna::format::quantize(
      *again, {.code = lacuna::format::Code::kInt4, .group = 32, .zero_points = true});
  require(!coded.ok() || (lacuna::format::validate(*coded).empty() &&
                          lacuna::format::check_codes(*coded, dense).empty()));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto* end = static_cast<const uint8_t*>(std::memchr(data, 0, size));
  if (end == nullptr) return 0;
  const auto config = lacuna::io::parse_json(
      {reinterpret_cast<const char*>(data), static_cast<size_t>(end - data)}, "fuzz");
  if (!config.ok()) return 0;
  const auto file =
      SafetensorsFile::parse(Bytes::take(std::vector<uint8_t>(end + 1, data + size)), "fuzz");
  if (!file.ok()) return 0;
  const auto checkpoint = Checkpoint::from_files(*config, {*file}, "fuzz");
  if (!checkpoint.ok()) return 0;
  size_t bytes = 0;
  for (const auto& [name, info] : checkpoint->weights()) {
    bytes += info.bytes;
    if (!is_small(info)) continue;
    const auto weight = checkpoint->weight(name);
    if (!weight.ok()) continue;
    if (const auto* matrix = std::get_if<CompactMatrix>(&*weight)) exercise(*matrix);
    const auto dense = checkpoint->dense(name);
    require(dense.ok() && dense->shape == info.shape && dense->dtype == info.dtype);
  }
  require(bytes == checkpoint->total_bytes());
  return 0;
}
