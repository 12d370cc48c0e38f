#include "lacuna/format/codes.h"

#include <array>
#include <cstring>
#include <numeric>

#include "lacuna/core/half.h"

namespace lacuna::format {
namespace {

constexpr int64_t kChunkBytes = kCodeChunk / 8;  // of a bitmap

/// Ones in a word, without an instruction for them.
inline uint64_t count_word(uint64_t x) {
  x -= x >> 1 & 0x5555555555555555;
  x = (x & 0x3333333333333333) + (x >> 2 & 0x3333333333333333);
  x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0f;
  x += x >> 8;  // no product: most vectors have none of 64 bits
  x += x >> 16;
  return (x + (x >> 32)) & 0x7f;
}

/// Calls f(chunk, kept) for each chunk of a row, the last one maybe short; loops over it may become
/// vector code.
template <class F>
inline void for_each_chunk(const uint8_t* bitmap, int64_t columns, F&& f) {
  const int64_t bytes = ceil_div(columns, 8), whole = bytes / kChunkBytes;
  for (int64_t chunk = 0; chunk < whole; ++chunk)
    f(chunk, count_word(read_unaligned<uint64_t>(bitmap + chunk * kChunkBytes)));
  if (bytes % kChunkBytes == 0) return;
  uint64_t last = 0;
  std::memcpy(&last, bitmap + whole * kChunkBytes, static_cast<size_t>(bytes % kChunkBytes));
  f(whole, count_word(last));
}

/// The most codes that columns [first, last) of a keep:of row can keep. Exact when no group sticks
/// out of them.
int64_t most_codes(const Pattern& pattern, int64_t first, int64_t last) {
  int64_t codes = 0;
  for (int64_t group = first / pattern.of; group * pattern.of < last; ++group) {
    const int64_t from = std::max(group * pattern.of, first);
    const int64_t to = std::min((group + 1) * pattern.of, last);
    codes += std::min<int64_t>(pattern.keep, to - from);
  }
  return codes;
}

/// Bytes of a keep:of row of 4-bit codes: what its chunks take at most. How chunks and groups fall
/// repeats every lcm(64, of) columns, so that a row of any length costs the same.
int64_t int4_row_bytes(const Pattern& pattern, int64_t columns) {
  const auto of_columns = [&](int64_t count) {
    int64_t bytes = 0;
    for (int64_t first = 0; first < count; first += kCodeChunk)
      bytes +=
          code_bytes(Code::kInt4, most_codes(pattern, first, std::min(first + kCodeChunk, count)));
    return bytes;
  };
  const int64_t period = std::lcm(kCodeChunk, int64_t{pattern.of});
  const int64_t whole = columns / period;
  return (whole > 0 ? whole * of_columns(period) : 0) + of_columns(columns % period);
}

/// Rounds to the nearest integer, ties to even; |x| < 2^51. Without a call, so that loops over it
/// become vector code.
double round_even(double x) { return (x + 0x1.8p52) - 0x1.8p52; }

const std::array<float, 256>& fp8_values() {
  static const std::array<float, 256> values = [] {
    std::array<float, 256> all{};
    for (size_t i = 0; i < all.size(); ++i) all[i] = f8e4m3_to_float(static_cast<uint8_t>(i));
    return all;
  }();
  return values;
}

}  // namespace

DType stored_dtype(Code code) {
  return code == Code::kInt4 ? DType::kU8 : code == Code::kFP8 ? DType::kF8E4M3 : DType::kI8;
}

int64_t row_code_bytes(Code code, const uint8_t* bitmap, int64_t columns) {
  if (code != Code::kInt4) return count_bits(bitmap, ceil_div(columns, 8));
  uint64_t bytes = 0;
  for_each_chunk(bitmap, columns, [&](int64_t, uint64_t codes) { bytes += (codes + 1) / 2; });
  return static_cast<int64_t>(bytes);
}

int64_t CompactMatrix::values_row_bytes() const {
  const auto width = static_cast<int64_t>(lacuna::size_bytes(values_dtype));
  const auto bytes = [&](int64_t slots) {
    return quantization.none() ? slots * width : code_bytes(quantization.code, slots);
  };
  switch (pattern.kind) {
    case PatternKind::kDense:
      return bytes(columns);
    case PatternKind::kKeepOf:
      return quantization.code == Code::kInt4 ? int4_row_bytes(pattern, columns)
                                              : bytes(values_per_row());
    case PatternKind::kBlock:
      return bytes(pattern.block_columns);
    case PatternKind::kUnstructured:
      break;
  }
  return 0;
}

RowWalk::RowWalk(const CompactMatrix& matrix, int64_t first_row)
    : matrix_(matrix), row_(first_row), row_bytes_(matrix.values_row_bytes()) {
  if (first_row >= matrix.rows) return;
  const PatternKind kind = matrix.pattern.kind;
  const int64_t stride = matrix.bitmap_stride_bytes();
  if (kind == PatternKind::kDense) {
    made_up_.assign(static_cast<size_t>(stride), 0xff);
    if (matrix.columns % 8 != 0)
      made_up_.back() = static_cast<uint8_t>((1u << (matrix.columns % 8)) - 1);
  } else if (kind == PatternKind::kUnstructured) {
    const int64_t group = first_row / kRowGroup;
    next_byte_ = read_unaligned<int64_t>(matrix.offsets.as<int64_t>() + group);
    for (int64_t row = group * kRowGroup; row < first_row; ++row)
      next_byte_ += row_code_bytes(matrix.quantization.code,
                                   matrix.bitmap.as<uint8_t>() + row * stride, matrix.columns);
  }
  enter();
}

void RowWalk::next() {
  ++row_;
  enter();
}

void RowWalk::enter() {
  runs_.clear();
  bitmap_ = nullptr;
  first_byte_ = next_byte_;
  codes_ = bytes_ = 0;
  if (row_ >= matrix_.rows) return;
  if (matrix_.pattern.kind == PatternKind::kBlock) return enter_row_of_blocks();
  bitmap_ = matrix_.pattern.kind == PatternKind::kDense
                ? made_up_.data()
                : matrix_.bitmap.as<uint8_t>() + row_ * matrix_.bitmap_stride_bytes();
  codes_ = -1;
  if (matrix_.pattern.kind == PatternKind::kUnstructured) {
    bytes_ = row_code_bytes(matrix_.quantization.code, bitmap_, matrix_.columns);
    next_byte_ += bytes_;
  } else {
    first_byte_ = row_ * row_bytes_;
    bytes_ = row_bytes_;
  }
}

int64_t RowWalk::codes() const {
  if (codes_ < 0) codes_ = count_bits(bitmap_, matrix_.bitmap_stride_bytes());
  return codes_;
}

std::span<const CodeRun> RowWalk::runs() const {
  if (runs_.empty() && bytes_ > 0) divide();
  return runs_;
}

void RowWalk::divide() const {
  int64_t next = first_byte_;
  if (matrix_.quantization.code != Code::kInt4) {  // nothing between the codes of a row
    runs_.push_back({0, next, codes(), codes()});
    next += codes();
  } else {
    runs_.resize(static_cast<size_t>(ceil_div(matrix_.columns, kCodeChunk)));
    for_each_chunk(bitmap_, matrix_.columns, [&](int64_t chunk, uint64_t kept) {
      const auto codes = static_cast<int64_t>(kept);
      const int64_t bytes = code_bytes(Code::kInt4, codes);
      runs_[static_cast<size_t>(chunk)] = {chunk * kCodeChunk, next, bytes, codes};
      next += bytes;
    });
  }
  // What pads a keep:of row belongs to its last run.
  runs_.back().bytes += first_byte_ + bytes_ - next;
}

void RowWalk::enter_row_of_blocks() {
  const int64_t height = matrix_.pattern.block_rows, width = matrix_.pattern.block_columns;
  const int64_t* offsets = matrix_.block_offsets.as<int64_t>() + row_ / height;
  const int64_t end = read_unaligned<int64_t>(offsets + 1);
  for (int64_t block = read_unaligned<int64_t>(offsets); block < end; ++block) {
    const int64_t left =
        int64_t{read_unaligned<int32_t>(matrix_.block_columns.as<int32_t>() + block)} * width;
    const int64_t right = std::min(left + width, matrix_.columns);
    runs_.push_back(
        {left, (block * height + row_ % height) * row_bytes_, row_bytes_, right - left});
    codes_ += right - left;
  }
}

const uint8_t* RowWalk::bitmap() const {
  if (bitmap_ != nullptr) return bitmap_;
  made_up_.assign(static_cast<size_t>(matrix_.bitmap_stride_bytes()), 0);
  for (const CodeRun& run : runs_)
    for (int64_t column = run.first_column; column < run.first_column + run.codes; ++column)
      made_up_[static_cast<size_t>(column / 8)] |= static_cast<uint8_t>(1u << (column % 8));
  return bitmap_ = made_up_.data();
}

namespace {

/// Whether the first half bytes of a row without a code are 0, by a loop without branches: which
/// chunks have one is as good as random.
bool half_bytes_are_zero(const CompactMatrix& matrix, const RowWalk& walk, int64_t& end) {
  const auto* values = matrix.values.as<uint8_t>();
  const int64_t first = walk.first_byte();
  uint64_t last_bytes = 0;
  end = first;
  for_each_chunk(walk.bitmap(), matrix.columns, [&](int64_t, uint64_t codes) {
    end += static_cast<int64_t>((codes + 1) / 2);
    last_bytes |= (codes & 1) * values[std::max(end - 1, first)];
  });
  return (last_bytes & 0xf0) == 0;
}

bool all_zero(const std::byte* begin, const std::byte* end) {
  return std::all_of(begin, end, [](std::byte b) { return b == std::byte{}; });
}

}  // namespace

bool padding_is_zero(const CompactMatrix& matrix, const RowWalk& walk) {
  const std::byte* values = matrix.values.data();
  const Code code = matrix.quantization.code;
  if (matrix.pattern.kind == PatternKind::kBlock)
    return std::ranges::all_of(walk.runs(), [&](const CodeRun& run) {
      const std::byte* begin = values + run.first_byte;
      const int64_t used = code_bytes(code, run.codes);
      const bool half = code == Code::kInt4 && run.codes % 2 != 0;
      return (!half || (begin[used - 1] & std::byte{0xf0}) == std::byte{}) &&
             all_zero(begin + used, begin + run.bytes);
    });
  if (walk.bytes() == 0) return true;
  int64_t end = walk.first_byte();
  if (code != Code::kInt4)
    end += walk.codes();
  else if (!half_bytes_are_zero(matrix, walk, end))
    return false;
  return all_zero(values + end, values + walk.first_byte() + walk.bytes());
}

void read_codes(const CompactMatrix& matrix, const RowWalk& walk, uint8_t* out) {
  const auto* values = matrix.values.as<uint8_t>();
  for (const CodeRun& run : walk.runs()) {
    const uint8_t* from = values + run.first_byte;
    if (matrix.quantization.code == Code::kInt4) {
      for (int64_t i = 0; i < run.codes; ++i)
        out[i] = static_cast<uint8_t>(from[i / 2] >> (i % 2 * 4) & 0xf);
    } else if (run.codes > 0) {
      std::memcpy(out, from, static_cast<size_t>(run.codes));
    }
    out += run.codes;
  }
}

void write_codes(Code code, const RowWalk& walk, const uint8_t* codes, uint8_t* values) {
  for (const CodeRun& run : walk.runs()) {
    uint8_t* to = values + run.first_byte;
    if (code == Code::kInt4) {
      for (int64_t i = 0; i < run.codes; ++i)
        to[i / 2] = static_cast<uint8_t>(to[i / 2] | codes[i] << (i % 2 * 4));
    } else if (run.codes > 0) {
      std::memcpy(to, codes, static_cast<size_t>(run.codes));
    }
    codes += run.codes;
  }
}

float CodeScale::value(uint8_t bits) const {
  switch (code) {
    case Code::kInt8:
      return scale * static_cast<float>(static_cast<int8_t>(bits));
    case Code::kInt4:
      return scale * static_cast<float>(int{bits} - zero);
    case Code::kFP8:
      return scale * fp8_values()[bits];
    case Code::kNone:
      break;
  }
  return 0;
}

uint8_t CodeScale::nearest(double weight) const {
  if (code == Code::kFP8) {
    const uint8_t bits = scale > 0 ? float_to_f8e4m3(static_cast<float>(weight / scale)) : 0;
    return bits == 0x80 ? uint8_t{0} : bits;  // one zero is enough
  }
  constexpr double kFar = 1 << 20;
  const double steps = scale > 0 ? round_even(std::clamp(weight / scale, -kFar, kFar)) : 0.0;
  if (code == Code::kInt8)
    return static_cast<uint8_t>(static_cast<int8_t>(std::clamp(steps, -127.0, 127.0)));
  return static_cast<uint8_t>(std::clamp(steps + zero, 0.0, 15.0));
}

CodeScale scale_of(const CompactMatrix& matrix, int64_t row, int64_t group) {
  const Code code = matrix.quantization.code;
  const int64_t at = row * matrix.quantization.groups(matrix.columns) + group;
  const bool own_zero = !matrix.zero_points.empty();
  return {code, bf16_to_float(read_unaligned<uint16_t>(matrix.scales.as<uint16_t>() + at)),
          own_zero              ? int{matrix.zero_points.as<int8_t>()[at]}
          : code == Code::kInt4 ? kInt4Zero
                                : 0};
}

}  // namespace lacuna::format
