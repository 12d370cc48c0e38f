#include "lacuna/format/quantize.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <optional>

#include "lacuna/core/half.h"
#include "lacuna/format/codes.h"
#include "lacuna/format/scale_chooser.h"

namespace lacuna::format {
namespace {

float to_float(uint32_t bits, DType) { return std::bit_cast<float>(bits); }
float to_float(uint16_t bits, DType dtype) {
  return dtype == DType::kBF16 ? bf16_to_float(bits) : f16_to_float(bits);
}

/// The kept weights of dense rows, one row after another.
class KeptRows {
 public:
  KeptRows(const std::byte* rows, DType dtype, int64_t columns)
      : rows_(rows), dtype_(dtype), columns_(columns) {}

  /// Of row `index`, in column order. @return the first column whose weight is no number, or -1
  int64_t read(int64_t index, const uint8_t* bitmap, std::vector<float>& out) const {
    out.clear();
    int64_t broken = -1;
    with_bits(dtype_, [&](auto sample) {
      using U = decltype(sample);
      const std::byte* row = rows_ + index * columns_ * static_cast<int64_t>(sizeof(U));
      for (int64_t column = 0; column < columns_; ++column) {
        if (!(bitmap[column / 8] >> (column % 8) & 1)) continue;
        out.push_back(
            to_float(read_unaligned<U>(row + column * static_cast<int64_t>(sizeof(U))), dtype_));
        if (broken < 0 && !std::isfinite(out.back())) broken = column;
      }
    });
    return broken;
  }

 private:
  const std::byte* rows_;
  DType dtype_;
  int64_t columns_;
};

/// Bytes of codes before each group of 64 rows, and of all.
std::vector<int64_t> byte_offsets(const CompactMatrix& matrix, Code code) {
  std::vector<int64_t> offsets;
  int64_t bytes = 0;
  const int64_t stride = matrix.bitmap_stride_bytes();
  for (int64_t row = 0; row < matrix.rows; ++row) {
    if (row % kRowGroup == 0) offsets.push_back(bytes);
    bytes += row_code_bytes(code, matrix.bitmap.as<uint8_t>() + row * stride, matrix.columns);
  }
  offsets.push_back(bytes);
  return offsets;
}

/// Bytes of all codes of a matrix whose mask and offsets are set.
int64_t values_bytes(const CompactMatrix& matrix) {
  switch (matrix.pattern.kind) {
    case PatternKind::kUnstructured:
      return read_unaligned<int64_t>(matrix.offsets.data() + matrix.offsets.size() - 8);
    case PatternKind::kBlock:
      return static_cast<int64_t>(matrix.block_columns.size() / 4) * matrix.pattern.block_rows *
             matrix.values_row_bytes();
    default:
      return matrix.rows * matrix.values_row_bytes();
  }
}

Status check_request(const Quantization& quantization) {
  const auto known = Quantization::parse(quantization.text());
  if (!quantization.none() && known.ok() && *known == quantization) return {};
  return usage_error("quantize: nothing to do, or impossible (got {}, groups of {}; need a code).",
                     quantization.text(), quantization.group);
}

/// Where fill() takes weights and their scales from.
template <class ReadRows, class ScaleOf>
struct Source {
  DType dtype;         ///< of the rows
  ReadRows read_rows;  ///< called with a run of rows and room for them, dense
  ScaleOf scale_of;    ///< called with row, group and its kept weights
  bool exact = false;  ///< a kept weight is what its code stands for, bit by bit
};
// Older compilers deduce nothing for an aggregate by themselves.
template <class ReadRows, class ScaleOf>
Source(DType, ReadRows, ScaleOf) -> Source<ReadRows, ScaleOf>;
template <class ReadRows, class ScaleOf>
Source(DType, ReadRows, ScaleOf, bool) -> Source<ReadRows, ScaleOf>;

/// Fills in codes, scales and zero points of `out`, whose sizes, mask and quantization are set.
template <class ReadRows, class ScaleOf>
Result<CompactMatrix> fill(CompactMatrix out, const Executor& executor,
                           const Source<ReadRows, ScaleOf>& source) {
  const Quantization& quantization = out.quantization;
  const auto groups = static_cast<size_t>(quantization.groups(out.columns));
  std::vector<uint8_t> values(static_cast<size_t>(values_bytes(out)));
  std::vector<uint16_t> scales(static_cast<size_t>(out.rows) * groups);
  std::vector<int8_t> zeros(quantization.zero_points ? scales.size() : 0);
  const int64_t tiles = ceil_div(out.rows, kRowGroup);
  std::vector<std::optional<Error>> broken(static_cast<size_t>(tiles));
  executor.parallel_for(tiles, [&](int64_t tile) {
    const int64_t first = tile * kRowGroup, last = std::min(first + kRowGroup, out.rows);
    std::vector<std::byte> dense(static_cast<size_t>((last - first) * out.columns) *
                                 size_bytes(source.dtype));
    source.read_rows(first, last, dense.data());
    const KeptRows rows(dense.data(), source.dtype, out.columns);
    std::vector<float> weights;
    std::vector<uint8_t> codes;
    for (RowWalk walk(out, first); walk.row() < last; walk.next()) {
      const int64_t column = rows.read(walk.row() - first, walk.bitmap(), weights);
      if (column >= 0) {
        broken[static_cast<size_t>(tile)] = bad_input(
            "quantize: row {}, column {} is not a finite number (need finite weights). Repair or "
            "download the model again.",
            walk.row(), column);
        return;
      }
      codes.resize(weights.size());
      bool exact = true;
      for_each_scale_group(
          quantization, walk, out.columns, [&](int64_t group, int64_t begin, int64_t end) {
            const CodeScale scale =
                source.scale_of(walk.row(), group,
                                std::span<const float>(weights).subspan(
                                    static_cast<size_t>(begin), static_cast<size_t>(end - begin)));
            for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i) {
              codes[i] = scale.nearest(weights[i]);
              exact = exact && scale.value(codes[i]) == weights[i];
            }
            const size_t at = static_cast<size_t>(walk.row()) * groups + static_cast<size_t>(group);
            scales[at] = float_to_bf16(scale.scale);
            if (!zeros.empty()) zeros[at] = static_cast<int8_t>(scale.zero);
          });
      if (source.exact && !exact) {
        broken[static_cast<size_t>(tile)] = check_failed(
            "encode: row {} holds a kept weight that no code of its group stands for.", walk.row());
        return;
      }
      write_codes(quantization.code, walk, codes.data(), values.data());
    }
  });
  for (const auto& error : broken)
    if (error) return *error;
  out.values = Bytes::take(std::move(values));
  out.scales = Bytes::take(std::move(scales));
  if (quantization.zero_points) out.zero_points = Bytes::take(std::move(zeros));
  return out;
}

/// The mask of an unquantised matrix, and room for codes.
CompactMatrix without_values(const CompactMatrix& matrix, const Quantization& quantization) {
  CompactMatrix out = matrix;
  out.quantization = quantization;
  if (out.pattern.kind == PatternKind::kUnstructured)
    out.offsets = Bytes::take(byte_offsets(matrix, quantization.code));
  return out;
}

/// Copies rows of a dense matrix.
auto rows_of(const Tensor& dense) {
  return [&dense, row_bytes = static_cast<size_t>(dense.shape[1]) * size_bytes(dense.dtype)](
             int64_t first, int64_t last, std::byte* rows) {
    const size_t size = static_cast<size_t>(last - first) * row_bytes;
    if (size > 0)
      std::memcpy(rows, dense.bytes.data() + static_cast<size_t>(first) * row_bytes, size);
  };
}

bool is_matrix(const Tensor& dense) {
  return dense.shape.size() == 2 && storable(dense.dtype) && element_count(dense.shape) &&
         dense.bytes.size() == static_cast<size_t>(dense.elements()) * size_bytes(dense.dtype);
}

/// Scales that are chosen for the weights of each group.
auto chosen(const ScaleChooser& chooser) {
  return [&chooser](int64_t, int64_t, std::span<const float> weights) {
    return chooser.choose(weights);
  };
}

}  // namespace

Result<CompactMatrix> quantize(const CompactMatrix& matrix, const Quantization& quantization,
                               const Executor& executor) {
  LACUNA_CHECK(check_request(quantization));
  if (!matrix.quantization.none())
    return bad_input("quantize: the values are codes already (got {}). Expand them first.",
                     matrix.quantization.text());
  const ScaleChooser chooser(quantization, matrix.values_dtype);
  const auto read = [&](int64_t first, int64_t last, std::byte* rows) {
    expand_rows(matrix, first, last, rows);
  };
  return fill(without_values(matrix, quantization), executor,
              Source{matrix.values_dtype, read, chosen(chooser)});
}

Result<CompactMatrix> quantize(const Tensor& dense, const Quantization& quantization,
                               const Executor& executor) {
  LACUNA_CHECK(check_request(quantization));
  if (!is_matrix(dense))
    return bad_input("quantize: needs a matrix of float32, bfloat16 or float16 (got {} {}).",
                     long_name(dense.dtype), shape_text(dense.shape));
  CompactMatrix out;
  out.rows = dense.shape[0];
  out.columns = dense.shape[1];
  out.values_dtype = dense.dtype;
  out.quantization = quantization;
  const ScaleChooser chooser(quantization, dense.dtype);
  return fill(std::move(out), executor, Source{dense.dtype, rows_of(dense), chosen(chooser)});
}

Result<CompactMatrix> encode(const CompactMatrix& mask, const Quantization& quantization,
                             const Tensor& weights, std::span<const CodeScale> scales,
                             const Executor& executor) {
  LACUNA_CHECK(check_request(quantization));
  const int64_t groups = quantization.groups(mask.columns);
  if (!mask.quantization.none() || !is_matrix(weights) || weights.dtype != DType::kF32 ||
      weights.shape != Shape{mask.rows, mask.columns} ||
      scales.size() != static_cast<size_t>(mask.rows * groups))
    return bad_input("encode: mask, weights (got {} {}) and scales (got {}) don't fit together.",
                     long_name(weights.dtype), shape_text(weights.shape), scales.size());
  const auto given = [&](int64_t row, int64_t group, std::span<const float>) {
    return scales[static_cast<size_t>(row * groups + group)];
  };
  return fill(without_values(mask, quantization), executor,
              Source{DType::kF32, rows_of(weights), given, /*exact=*/true});
}

std::vector<Violation> check_codes(const CompactMatrix& matrix, const Tensor& dense, size_t limit) {
  std::vector<Violation> found;
  const auto add = [&](int64_t row, int64_t column, std::string what) {
    if (found.size() < limit) found.push_back({row, column, std::move(what)});
  };
  if (dense.shape != Shape{matrix.rows, matrix.columns} || dense.dtype != matrix.values_dtype) {
    add(-1, -1,
        fmt::format("{} {} differs from the dense {} {}", long_name(matrix.values_dtype),
                    shape_text({matrix.rows, matrix.columns}), long_name(dense.dtype),
                    shape_text(dense.shape)));
    return found;
  }
  const std::vector<uint8_t> all(static_cast<size_t>(matrix.bitmap_stride_bytes()), 0xff);
  const KeptRows rows(dense.bytes.data(), dense.dtype, matrix.columns);
  std::vector<float> weights;
  std::vector<uint8_t> codes;
  std::vector<CodeScale> scales(static_cast<size_t>(matrix.quantization.groups(matrix.columns)));
  const int64_t group = matrix.quantization.group > 0 ? matrix.quantization.group
                                                      : std::max<int64_t>(matrix.columns, 1);
  for (RowWalk walk(matrix, 0); walk.row() < matrix.rows && found.size() < limit; walk.next()) {
    const int64_t row = walk.row();
    rows.read(row, all.data(), weights);
    codes.resize(static_cast<size_t>(walk.codes()));
    read_codes(matrix, walk, codes.data());
    for (size_t g = 0; g < scales.size(); ++g)
      scales[g] = scale_of(matrix, row, static_cast<int64_t>(g));
    size_t next = 0;
    for (int64_t column = 0; column < matrix.columns; ++column) {
      const double weight = weights[static_cast<size_t>(column)];
      if (!(walk.bitmap()[column / 8] >> (column % 8) & 1)) {
        if (weight != 0) add(row, column, fmt::format("{} was dropped", weight));
        continue;
      }
      const uint8_t code = codes[next++];
      if (weight == 0 && matrix.pattern.kind == PatternKind::kUnstructured) {
        add(row, column, "a zero is kept");
        continue;
      }
      const CodeScale& scale = scales[static_cast<size_t>(column / group)];
      const auto distance = [&](uint8_t of) { return std::abs(weight - double{scale.value(of)}); };
      if (!(distance(code) <= distance(scale.nearest(weight)) * (1 + 1e-6)))
        add(row, column,
            fmt::format("{} became {} (need {})", weight, scale.value(code),
                        scale.value(scale.nearest(weight))));
    }
  }
  return found;
}

}  // namespace lacuna::format
