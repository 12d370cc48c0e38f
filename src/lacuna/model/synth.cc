#include "lacuna/model/synth.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numbers>
#include <set>

#include "lacuna/core/half.h"
#include "lacuna/core/random.h"
#include "lacuna/core/version.h"
#include "lacuna/io/decoder_spec.h"
#include "lacuna/model/torch.h"

namespace lacuna::model {
namespace {

using format::Pattern;
using format::PatternKind;

constexpr double kDeviation = 0.02;
constexpr int64_t kRowsAtOnce = 64;
constexpr uint64_t kMaskStreams = uint64_t{1} << 32;  // above every tensor's number

/// x with P(standard normal < x) = p, by bisection: the table below is made once.
double normal_quantile(double p) {
  double low = -9, high = 9;
  for (int i = 0; i < 60; ++i) {
    const double middle = (low + high) / 2;
    (0.5 * std::erfc(-middle / std::numbers::sqrt2) < p ? low : high) = middle;
  }
  return (low + high) / 2;
}

template <class T>
T encode(double value, DType dtype) {
  const auto narrow = static_cast<float>(value);
  if constexpr (sizeof(T) == 4)
    return narrow;
  else
    return dtype == DType::kBF16 ? float_to_bf16(narrow) : float_to_f16(narrow);
}

/// The centres of 2^16 equally likely slices of the normal distribution: 16 random bits give a
/// weight for the price of a look-up, four weights a hash.
template <class T>
class NormalTable {
 public:
  explicit NormalTable(DType dtype) : values_(size_t{1} << 16) {
    const size_t half = values_.size() / 2;
    for (size_t i = 0; i < half; ++i) {
      const double value = kDeviation * normal_quantile((static_cast<double>(i) + 0.5) / 65536);
      values_[i] = encode<T>(value, dtype);
      values_[values_.size() - 1 - i] = encode<T>(-value, dtype);
    }
  }
  T at(uint64_t bits) const { return values_[bits & 0xffff]; }

 private:
  std::vector<T> values_;
};

/// A stream of 32-bit random numbers for one row of one mask.
class RowRandom {
 public:
  RowRandom(uint64_t seed, uint64_t stream, int64_t row)
      : seed_(seed), stream_(stream), index_(static_cast<uint64_t>(row) << 32) {}
  /// Uniform in 0 .. n-1.
  int64_t below(int64_t n) {
    if (!half_used_) bits_ = random_bits(seed_, stream_, index_++);
    half_used_ = !half_used_;
    const uint64_t lane = half_used_ ? bits_ & 0xffffffffu : bits_ >> 32;
    return static_cast<int64_t>((lane * static_cast<uint64_t>(n)) >> 32);
  }

 private:
  uint64_t seed_, stream_, index_, bits_ = 0;
  bool half_used_ = false;
};

/// Calls drop(i) for exactly total - keep of 0 .. total-1, every choice equally likely (Knuth's
/// algorithm S).
template <class Drop>
void drop_randomly(int64_t keep, int64_t total, RowRandom& random, Drop&& drop) {
  for (int64_t i = 0; i < total; ++i) {
    if (random.below(total - i) < keep)
      --keep;
    else
      drop(i);
  }
}

int64_t kept_of(int64_t total, double sparsity) {
  return total - std::llround(sparsity * static_cast<double>(total));
}

/// Zeros rows [first, last) of a matrix by the pattern; `first` is a multiple of a block's rows.
template <class T>
void mask_rows(T* rows, int64_t first, int64_t last, int64_t columns, const Pattern& pattern,
               double sparsity, uint64_t seed, uint64_t stream) {
  if (pattern.kind == PatternKind::kBlock) {
    const int64_t across = (columns + pattern.block_columns - 1) / pattern.block_columns;
    for (int64_t top = first; top < last; top += pattern.block_rows) {
      RowRandom random(seed, stream, top / pattern.block_rows);
      const int64_t bottom = std::min<int64_t>(top + pattern.block_rows, last);
      drop_randomly(kept_of(across, sparsity), across, random, [&](int64_t block) {
        const int64_t left = block * pattern.block_columns;
        const int64_t right = std::min<int64_t>(left + pattern.block_columns, columns);
        for (int64_t r = top; r < bottom; ++r)
          std::fill(rows + (r - first) * columns + left, rows + (r - first) * columns + right, T{});
      });
    }
    return;
  }
  for (int64_t r = first; r < last; ++r) {
    T* row = rows + (r - first) * columns;
    RowRandom random(seed, stream, r);
    if (pattern.kind == PatternKind::kUnstructured) {
      drop_randomly(kept_of(columns, sparsity), columns, random, [&](int64_t i) { row[i] = T{}; });
      continue;
    }
    for (int64_t group = 0; group < columns; group += pattern.of) {
      const int64_t size = std::min<int64_t>(pattern.of, columns - group);
      drop_randomly(std::min<int64_t>(pattern.keep, size), size, random,
                    [&](int64_t i) { row[group + i] = T{}; });
    }
  }
}

/// One normal matrix [rows, columns], with zeros by the pattern (dense: none).
template <class T>
Tensor random_matrix(const Shape& shape, DType dtype, const NormalTable<T>& table,
                     const Pattern& pattern, double sparsity, uint64_t seed, uint64_t stream) {
  const int64_t rows = shape[0], columns = shape[1];
  std::vector<T> values(static_cast<size_t>(rows * columns));
  const int64_t hashes = (columns + 3) / 4;  // a row
  const int64_t step =
      pattern.kind == PatternKind::kBlock
          ? (kRowsAtOnce + pattern.block_rows - 1) / pattern.block_rows * pattern.block_rows
          : kRowsAtOnce;
  torch_executor().parallel_for((rows + step - 1) / step, [&](int64_t tile) {
    const int64_t first = tile * step, last = std::min(first + step, rows);
    T* tile_rows = values.data() + first * columns;
    for (int64_t r = first; r < last; ++r) {
      T* row = tile_rows + (r - first) * columns;
      for (int64_t h = 0; h < hashes; ++h) {
        uint64_t bits = random_bits(seed, stream, static_cast<uint64_t>(r * hashes + h));
        const int64_t end = std::min(4 * h + 4, columns);
        for (int64_t c = 4 * h; c < end; ++c, bits >>= 16) row[c] = table.at(bits);
      }
    }
    if (pattern.kind != PatternKind::kDense)
      mask_rows(tile_rows, first, last, columns, pattern, sparsity, seed, stream + kMaskStreams);
  });
  return {dtype, shape, Bytes::take(std::move(values))};
}

template <class T>
Tensor constant(const Shape& shape, DType dtype, double value) {
  return {dtype, shape,
          Bytes::take(std::vector<T>(static_cast<size_t>(shape[0]), encode<T>(value, dtype)))};
}

template <class T>
Status write_tensors(const SynthOptions& options, const io::DecoderSpec& spec,
                     const std::set<std::string>& sparse, io::CheckpointWriter& writer) {
  const NormalTable<T> table(options.dtype);
  uint64_t stream = 0;
  for (const auto& [name, shape] : spec.tensors()) {
    ++stream;
    if (shape.size() == 1) {  // norms are 1, biases 0
      const double value = name.ends_with(".weight") ? 1.0 : 0.0;
      LACUNA_CHECK(writer.add(name, constant<T>(shape, options.dtype, value)));
      continue;
    }
    const bool is_sparse = sparse.count(name) > 0;
    const Pattern pattern = is_sparse ? options.pattern : Pattern{};
    const Tensor dense =
        random_matrix(shape, options.dtype, table, pattern, options.sparsity, options.seed, stream);
    if (!is_sparse) {
      LACUNA_CHECK(writer.add(name, dense));
      continue;
    }
    LACUNA_TRY(const auto compact, format::compress(dense, pattern));
    LACUNA_CHECK(writer.add(name, compact));
  }
  return {};
}

}  // namespace

Result<SynthReport> synth(const SynthOptions& options, const std::filesystem::path& out) {
  if (options.dtype != DType::kF32 && options.dtype != DType::kF16 && options.dtype != DType::kBF16)
    return usage_error(
        "synth: weights of this type can't be made (got {}; need float32, float16 "
        "or bfloat16).",
        long_name(options.dtype));
  if (options.sparsity < 0 || options.sparsity > 1)
    return usage_error("synth: sparsity must lie in [0, 1] (got {}).", options.sparsity);
  LACUNA_TRY(const std::string text, synth_config(options.like));
  auto config = nlohmann::json::parse(text);
  config["dtype"] = long_name(options.dtype);
  LACUNA_TRY(const auto spec, io::decoder_spec(config, nullptr, options.like));
  std::set<std::string> sparse;
  if (options.pattern.kind != PatternKind::kDense)
    for (const auto& weight : spec.block_weights()) sparse.insert(weight.name);

  LACUNA_TRY(auto writer, io::CheckpointWriter::create(out, {.store = options.store}));
  LACUNA_CHECK(options.dtype == DType::kF32
                   ? write_tensors<float>(options, spec, sparse, writer)
                   : write_tensors<uint16_t>(options, spec, sparse, writer));
  config["lacuna"] = {{"method", "synth"}, {"seed", options.seed}, {"tool_version", kVersion}};
  LACUNA_CHECK(writer.finish(config));
  LACUNA_TRY(const auto written, io::Checkpoint::open(out));
  return SynthReport{spec.parameters(), written.total_bytes()};
}

}  // namespace lacuna::model
