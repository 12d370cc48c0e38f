#include "lacuna/kernels/linear_coded/stream.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "lacuna/core/half.h"
#include "lacuna/format/codes.h"

namespace lacuna::kernels::linear_coded {
namespace {

using format::Code;
using format::CompactMatrix;

constexpr uint64_t kAllKept = ~uint64_t{0};
/// Past the last tile: the widest read of a kernel.
constexpr size_t kMargin = 64;

/// Sharing masks takes more bytes (5 % at 20 % kept, 12 % at 30 %) and half the expansions. Below
/// this share of kept weights it is faster (bench/lab/cpu_coded).
constexpr double kSharedBelow = 0.25;

Masks masks_for(const CompactMatrix& matrix, std::optional<Masks> wanted) {
  if (matrix.pattern.kind == format::PatternKind::kDense) return Masks::kNone;
  if (matrix.quantization.code == Code::kInt8) return Masks::kOwn;
  if (wanted) return *wanted;
  const auto weights = static_cast<double>(matrix.rows) * static_cast<double>(matrix.columns);
  const bool few = static_cast<double>(format::count_kept(matrix)) < kSharedBelow * weights;
  return few ? Masks::kShared : Masks::kOwn;
}

/// One row as the matrix has it: which columns it keeps, and a byte for each kept code.
struct RowCodes {
  std::vector<uint64_t> masks;
  std::vector<uint8_t> codes;  // two's complement
  const uint8_t* next = nullptr;
};

void read_row(const CompactMatrix& matrix, const format::RowWalk& walk, RowCodes& row) {
  std::fill(row.masks.begin(), row.masks.end(), 0);
  std::memcpy(row.masks.data(), walk.bitmap(), static_cast<size_t>(matrix.bitmap_stride_bytes()));
  row.codes.resize(static_cast<size_t>(walk.codes()));
  format::read_codes(matrix, walk, row.codes.data());
  if (matrix.quantization.code == Code::kInt4)
    for (uint8_t& code : row.codes) code = static_cast<uint8_t>(code - format::kInt4Zero);
  row.next = row.codes.data();
}

/// One chunk of a tile: what its blocks keep, and all codes in their places.
struct Chunk {
  uint64_t masks[kBlocks];
  ChunkCodes codes;
};

/// Takes the codes of one chunk from the rows; sums[row][column half] gets their sums.
void gather_chunk(RowCodes (&rows)[kTileRows], int64_t index, Chunk& chunk,
                  int (&sums)[kTileRows][2]) {
  std::memset(&chunk, 0, sizeof(chunk));
  std::memset(sums, 0, sizeof(sums));
  for (int64_t r = 0; r < kTileRows; ++r) {
    const uint64_t mask = rows[r].masks[index];
    for (int64_t b = 0; b < kBlocks; ++b)
      chunk.masks[b] |= (mask >> (kBlockColumns * b) & 15) << (kBlockColumns * r);
    for (uint64_t left = mask; left != 0; left &= left - 1) {
      const int64_t column = std::countr_zero(left);
      const auto code = static_cast<int8_t>(*rows[r].next++);
      chunk.codes[column / kBlockColumns][kBlockColumns * r + column % kBlockColumns] = code;
      sums[r][column / (kChunk / 2)] += code;
    }
  }
}

/// Calls f(code) for those that a mask marks, in order.
template <class Codes, class F>
void for_each_kept(Codes&& codes, uint64_t mask, F&& f) {
  if (mask == kAllKept) {
    for (int64_t i = 0; i < kBlockWeights; ++i) f(codes[i]);
    return;
  }
  for (; mask != 0; mask &= mask - 1) f(codes[std::countr_zero(mask)]);
}

/// The chunk's codes as the stream has them. @return past the last
uint8_t* write_codes(const Chunk& chunk, Code code, Masks masks, uint8_t* out) {
  const auto mask = [&](int64_t block) {
    return masks == Masks::kNone ? kAllKept : chunk.masks[block];
  };
  if (code == Code::kInt8) {
    for (int64_t pair = 0; pair < kPairs; ++pair)
      for (const int64_t block : {pair, pair + kPairs})
        for_each_kept(chunk.codes[block], mask(block),
                      [&](int8_t q) { *out++ = static_cast<uint8_t>(q); });
    return out;
  }
  uint8_t *low = out, *high = out;
  for (int64_t pair = 0; pair < kPairs; ++pair) {
    const int64_t other = pair + kPairs;
    const bool shared = masks == Masks::kShared;
    const uint64_t both = mask(pair) | mask(other);
    for_each_kept(chunk.codes[pair], shared ? both : mask(pair), [&](int8_t q) {
      *low = static_cast<uint8_t>((*low & 0xf0) | (q & 15));
      ++low;
    });
    for_each_kept(chunk.codes[other], shared ? both : mask(other), [&](int8_t q) {
      *high = static_cast<uint8_t>((*high & 15) | (q << 4));
      ++high;
    });
  }
  return std::max(low, high);
}

}  // namespace

Result<Stream> Stream::pack(const CompactMatrix& matrix, const Executor& executor,
                            std::optional<Masks> masks) {
  const Code code = matrix.quantization.code;
  if (code != Code::kInt8 && code != Code::kInt4)
    return not_possible("linear_coded: values are {} (need int8 or int4).",
                        matrix.quantization.text());
  if (matrix.quantization.zero_points)
    return not_possible("linear_coded: int4 with zero points isn't multiplied as it is.");
  Stream s;
  s.rows_ = matrix.rows;
  s.columns_ = matrix.columns;
  s.quantization_ = matrix.quantization;
  s.masks_ = masks_for(matrix, masks);
  const int64_t group = matrix.quantization.group, groups = matrix.quantization.groups(s.columns_);
  s.scale_sets_ = group == 0 ? (code == Code::kInt4 ? 1 : 0) : group < kChunk ? kChunk / group : 1;
  const int64_t tiles = format::ceil_div(matrix.rows, kTileRows), chunks = s.chunks();
  s.offsets_.assign(static_cast<size_t>(tiles) + 1, 0);
  const uint8_t* scales = reinterpret_cast<const uint8_t*>(matrix.scales.data());
  const auto scale_bits = [&](int64_t row, int64_t column) {
    const int64_t index = group == 0 ? 0 : column / group;
    return row < matrix.rows && index < groups
               ? read_unaligned<uint16_t>(scales + (row * groups + index) * 2)
               : uint16_t{0};
  };

  // Rows are walked in runs of 64, whose beginnings the matrix knows; a run packs into its own
  // bytes, and the runs are then joined.
  const int64_t runs = format::ceil_div(matrix.rows, format::kRowGroup);
  const size_t most_bytes = static_cast<size_t>(kBlocks * (8 + kBlockWeights) + 4 * kTileRows);
  std::vector<std::vector<uint8_t>> packed(static_cast<size_t>(runs));
  executor.parallel_for(runs, [&](int64_t run) {
    const int64_t first = run * format::kRowGroup;
    const int64_t last = std::min(first + format::kRowGroup, matrix.rows);
    format::RowWalk walk(matrix, first);
    std::vector<uint8_t>& out = packed[static_cast<size_t>(run)];
    size_t size = 0;
    RowCodes rows[kTileRows];
    for (RowCodes& row : rows) row.masks.resize(static_cast<size_t>(chunks));
    for (int64_t top = first; top < last; top += kTileRows) {
      const size_t begin = size;
      for (int64_t r = 0; r < kTileRows; ++r) {
        if (top + r < last) {
          read_row(matrix, walk, rows[r]);
          if (top + r + 1 < matrix.rows) walk.next();
        } else {
          std::fill(rows[r].masks.begin(), rows[r].masks.end(), 0);
        }
      }
      double row_sums[kTileRows] = {};
      size += static_cast<size_t>(s.head_bytes());
      out.resize(std::max(out.size(), size));
      for (int64_t index = 0; index < chunks; ++index) {
        Chunk chunk;
        int sums[kTileRows][2];
        gather_chunk(rows, index, chunk, sums);
        if (size + most_bytes > out.size()) out.resize((size + most_bytes) * 5 / 4);
        uint8_t* at = out.data() + size;
        std::memset(at, 0, most_bytes);
        for (int64_t i = 0; i < s.mask_bytes() / 8; ++i, at += 8) {
          const uint64_t mask =
              chunk.masks[i] | (s.masks_ == Masks::kShared ? chunk.masks[i + kPairs] : 0);
          std::memcpy(at, &mask, 8);
        }
        for (int64_t set = 0; set < s.scale_sets_; ++set)
          for (int64_t r = 0; r < kTileRows; ++r, at += 2) {
            const uint16_t bits =
                scale_bits(top + r, index * kChunk + set * (kChunk / s.scale_sets_));
            std::memcpy(at, &bits, 2);
          }
        for (int64_t r = 0; r < kTileRows; ++r)
          for (int64_t half = 0; half < 2; ++half)
            row_sums[r] +=
                sums[r][half] * (s.scale_sets_ == 0
                                     ? 1.0
                                     : double{bf16_to_float(scale_bits(
                                           top + r, index * kChunk + half * (kChunk / 2)))});
        size = static_cast<size_t>(write_codes(chunk, code, s.masks_, at) - out.data());
      }
      uint8_t* const head = out.data() + begin;
      std::memcpy(head, row_sums, sizeof(row_sums));
      for (int64_t r = 0; s.scale_sets_ == 0 && r < kTileRows; ++r) {
        const float scale = bf16_to_float(scale_bits(top + r, 0));
        std::memcpy(head + sizeof(row_sums) + r * 4, &scale, 4);
      }
      s.offsets_[top / kTileRows + 1] = static_cast<int64_t>(size - begin);
    }
    out.resize(size);
  });
  for (int64_t tile = 0; tile < tiles; ++tile) s.offsets_[tile + 1] += s.offsets_[tile];
  s.data_ = LargeBlock(static_cast<size_t>(s.offsets_[tiles]) + kMargin);
  size_t at = 0;
  for (std::vector<uint8_t>& run : packed) {
    if (!run.empty()) std::memcpy(s.data_.data() + at, run.data(), run.size());
    at += run.size();
    run = {};
  }
  return s;
}

void Stream::expand_tile(int64_t tile, float* out) const {
  ChunkWalk walk(*this, tile);
  ChunkCodes codes;
  for (int64_t chunk = 0; chunk < chunks(); ++chunk) {
    walk.take(codes);
    const int64_t first = chunk * kChunk, width = std::min(kChunk, columns_ - first);
    for (int64_t r = 0; r < kTileRows; ++r) {
      const float low = scale_sets_ ? walk.scale(r, 0) : row_scale(tile, r);
      const float high = scale_sets_ == 2 ? walk.scale(r, 1) : low;
      for (int64_t c = 0; c < width; ++c)
        out[r * columns_ + first + c] =
            (c < kChunk / 2 ? low : high) *
            static_cast<float>(codes[c / kBlockColumns][kBlockColumns * r + c % kBlockColumns]);
    }
  }
}

void ChunkWalk::take(ChunkCodes& codes) {
  const uint8_t* const masks = next_;
  scales_ = masks + stream_.mask_bytes();
  const uint8_t* low = scales_ + 2 * kTileRows * stream_.scale_sets();
  const uint8_t* high = low;
  std::memset(codes, 0, sizeof(codes));
  const auto mask = [&](int64_t block) {
    if (stream_.masks() == Masks::kNone) return kAllKept;
    return read_unaligned<uint64_t>(
        masks + 8 * (stream_.masks() == Masks::kShared ? block % kPairs : block));
  };
  for (int64_t pair = 0; pair < kPairs; ++pair) {
    const int64_t other = pair + kPairs;
    if (stream_.code() == Code::kInt8) {
      for_each_kept(codes[pair], mask(pair), [&](int8_t& q) { q = static_cast<int8_t>(*low++); });
      for_each_kept(codes[other], mask(other), [&](int8_t& q) { q = static_cast<int8_t>(*low++); });
    } else {
      for_each_kept(codes[pair], mask(pair), [&](int8_t& q) {
        q = static_cast<int8_t>(static_cast<int8_t>(*low++ << 4) >> 4);
      });
      for_each_kept(codes[other], mask(other),
                    [&](int8_t& q) { q = static_cast<int8_t>(static_cast<int8_t>(*high++) >> 4); });
    }
  }
  next_ = std::max(low, high);
}

float ChunkWalk::scale(int64_t row, int64_t set) const {
  return bf16_to_float(read_unaligned<uint16_t>(scales_ + (set * kTileRows + row) * 2));
}

}  // namespace lacuna::kernels::linear_coded
