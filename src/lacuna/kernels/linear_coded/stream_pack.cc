// Packing a weight into its stream: tile by tile, on all threads, each tile where it will stay.
#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "lacuna/core/cpu.h"
#include "lacuna/core/half.h"
#include "lacuna/format/codes.h"
#include "lacuna/kernels/linear_coded/stream_chunk.h"
#include "lacuna/kernels/linear_coded/stream_codes.h"

namespace lacuna::kernels::linear_coded {
namespace {

using format::Code;
using format::CompactMatrix;
using format::RowWalk;

/// Past the last tile: the widest read of a kernel.
constexpr size_t kMargin = 64;

/// Sharing masks takes more bytes (5 % at 20 % kept, 12 % at 30 %) and half the expansions. Below
/// this share of kept weights it is faster where vpexpandb expands, and always where several
/// shuffles do (bench/lab/cpu_coded).
constexpr double kSharedBelow = 0.25;

/// What the stream's codes are. With a zero point z of its own for each group, q - z of a 4-bit q
/// lies in -15..15: it takes a byte, and nothing is left of z.
Code streamed_code(const format::Quantization& quantization) {
  return quantization.zero_points ? Code::kInt8 : quantization.code;
}

Masks masks_for(const CompactMatrix& matrix, std::optional<Masks> wanted) {
  if (matrix.pattern.kind == format::PatternKind::kDense) return Masks::kNone;
  if (streamed_code(matrix.quantization) == Code::kInt8) return Masks::kOwn;
  if (wanted) return *wanted;
  if (!cpu_features().avx512_vbmi2) return Masks::kShared;
  const auto weights = static_cast<double>(matrix.rows) * static_cast<double>(matrix.columns);
  const bool few = static_cast<double>(format::count_kept(matrix)) < kSharedBelow * weights;
  return few ? Masks::kShared : Masks::kOwn;
}

/// Ones in the lower and the upper halves of 16 words, counted side by side in bytes, without calls
/// for single words. @param words  [16], each taken by pick(word)
template <class Pick>
std::pair<int64_t, int64_t> count_halves(const uint64_t* words, const Pick& pick) {
  uint64_t bytes = 0;  // each of them at most 128
  for (int64_t r = 0; r < kTileRows; ++r) {
    uint64_t x = pick(words[r]);
    x -= x >> 1 & 0x5555555555555555;
    x = (x & 0x3333333333333333) + (x >> 2 & 0x3333333333333333);
    bytes += (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0f;
  }
  const uint64_t shorts = (bytes & 0x00ff00ff00ff00ff) + (bytes >> 8 & 0x00ff00ff00ff00ff);
  const uint64_t halves = shorts + (shorts >> 16);
  return {halves & 0xffff, halves >> 32 & 0xffff};
}

/// Bytes that a chunk's codes will take. @param masks  [16], of its rows
int64_t code_bytes_of(Code code, Masks kind, const uint64_t* masks) {
  if (kind == Masks::kNone) return format::code_bytes(code, kBlocks * kBlockWeights);
  if (kind == Masks::kShared)
    return count_halves(masks, [](uint64_t mask) { return mask | mask >> 32; }).first;
  const auto [low, high] = count_halves(masks, [](uint64_t mask) { return mask; });
  return code == Code::kInt8 ? low + high : std::max(low, high);
}

/// The rows of one tile: which columns they keep, and where their codes lie.
class TileRows {
 public:
  explicit TileRows(const CompactMatrix& matrix)
      : matrix_(matrix),
        code_(streamed_code(matrix.quantization)),
        chunks_(format::ceil_div(matrix.columns, kChunk)),
        masks_(static_cast<size_t>(chunks_ * kTileRows)) {}

  /// Takes the next 16 rows, or what is left, from a walk.
  void take(RowWalk& walk) {
    std::fill(masks_.begin(), masks_.end(), 0);
    for (int64_t r = 0; r < kTileRows; ++r) {
      rows_.codes[r] = nothing_;
      if (walk.row() >= matrix_.rows) continue;
      take_masks(r, walk.bitmap());
      take_codes(r, walk);
      walk.next();
    }
  }
  /// The rows of a chunk; good until the next call. In order, each chunk packed before the next.
  ChunkRows& chunk(int64_t index) {
    rows_.masks = masks(index);
    return rows_;
  }
  const uint64_t* masks(int64_t chunk) const { return masks_.data() + chunk * kTileRows; }

 private:
  void take_masks(int64_t r, const uint8_t* bitmap) {
    const int64_t stride = matrix_.bitmap_stride_bytes(), whole = stride / 8;
    for (int64_t i = 0; i < whole; ++i)
      masks_[static_cast<size_t>(i * kTileRows + r)] = read_unaligned<uint64_t>(bitmap + 8 * i);
    if (stride % 8 != 0)
      std::memcpy(&masks_[static_cast<size_t>(whole * kTileRows + r)], bitmap + 8 * whole,
                  static_cast<size_t>(stride % 8));
  }

  /// Codes are read where they lie. Those of blocks lie apart, those with zero points change, and
  /// the last ones have no room behind them: they are copied.
  void take_codes(int64_t r, const RowWalk& walk) {
    const auto* values = matrix_.values.as<uint8_t>();
    const bool made =
        matrix_.pattern.kind == format::PatternKind::kBlock || matrix_.quantization.zero_points;
    const int64_t begin = walk.first_byte(), end = begin + walk.bytes();
    if (!made && begin == end) return;
    if (!made && end + kCodeRoom <= static_cast<int64_t>(matrix_.values.size())) {
      rows_.codes[r] = values + begin;
      return;
    }
    std::vector<uint8_t>& copy = copies_[r];
    if (made) {
      codes_.resize(static_cast<size_t>(walk.codes()));
      format::read_codes(matrix_, walk, codes_.data());
      if (matrix_.quantization.zero_points) take_zero_points_off(walk);
      copy.assign(static_cast<size_t>(matrix_.columns + kCodeRoom), 0);
      join(r, copy.data());
    } else {
      copy.assign(static_cast<size_t>(end - begin + kCodeRoom), 0);
      std::memcpy(copy.data(), values + begin, static_cast<size_t>(end - begin));
    }
    rows_.codes[r] = copy.data();
  }

  void take_zero_points_off(const RowWalk& walk) {
    format::for_each_scale_group(
        matrix_.quantization, walk, matrix_.columns,
        [&](int64_t group, int64_t begin, int64_t end) {
          const int zero = format::scale_of(matrix_, walk.row(), group).zero;
          for (int64_t i = begin; i < end; ++i)
            codes_[static_cast<size_t>(i)] =
                static_cast<uint8_t>(codes_[static_cast<size_t>(i)] - zero);
        });
  }

  /// The codes of a row, a byte each until now, as they would lie in a row without blocks.
  void join(int64_t r, uint8_t* out) const {
    const uint8_t* next = codes_.data();
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      const int64_t count = std::popcount(masks(chunk)[r]);
      for (int64_t i = 0; i < count; ++i, ++next)
        if (code_ == Code::kInt8)
          out[i] = *next;
        else
          out[i / 2] = static_cast<uint8_t>(out[i / 2] | *next << (i % 2 * 4));
      out += format::code_bytes(code_, count);
    }
  }

  const CompactMatrix& matrix_;
  const Code code_;
  int64_t chunks_;
  std::vector<uint64_t> masks_;  // [chunks][16]
  ChunkRows rows_{};
  uint8_t nothing_[kCodeRoom] = {};
  std::vector<uint8_t> copies_[kTileRows], codes_;
};

/// The scales of one chunk of a tile, as the stream has them.
class ChunkScales {
 public:
  /// @param sets  that a chunk meets; 0: scales belong to rows, and set 0 is theirs
  ChunkScales(const CompactMatrix& matrix, int64_t tile, int64_t sets)
      : matrix_(matrix),
        top_(tile * kTileRows),
        count_(std::min(kTileRows, matrix.rows - top_)),
        groups_(matrix.quantization.groups(matrix.columns)),
        sets_(std::max<int64_t>(sets, 1)) {}
  void read(int64_t chunk) {
    const int64_t width = matrix_.quantization.group;
    for (int64_t set = 0; set < sets_; ++set) {
      const int64_t group = width == 0 ? 0 : (chunk * kChunk + set * (kChunk / sets_)) / width;
      for (int64_t r = 0; r < kTileRows; ++r)
        bits_[set][r] = r < count_ && group < groups_ ? bits(r, group) : uint16_t{0};
    }
  }
  /// bf16 [sets][16]; 0 past the last
  const uint16_t* bits() const { return bits_[0]; }
  float value(int64_t row, int64_t half) const {
    return bf16_to_float(bits_[half * (sets_ - 1)][row]);
  }

 private:
  uint16_t bits(int64_t row, int64_t group) const {
    return read_unaligned<uint16_t>(matrix_.scales.as<uint16_t>() + (top_ + row) * groups_ + group);
  }
  const CompactMatrix& matrix_;
  int64_t top_, count_, groups_, sets_;
  uint16_t bits_[2][kTileRows] = {};
};

/// How a matrix becomes the tiles of a stream.
class TilePacker {
 public:
  TilePacker(const CompactMatrix& matrix, const Stream& stream)
      : matrix_(matrix), stream_(stream) {}

  /// Calls f(tile, rows) for every tile. Rows are walked in runs of 64, whose beginnings the matrix
  /// knows.
  template <class F>
  void for_each_tile(const Executor& executor, F&& f) const {
    executor.parallel_for(format::ceil_div(matrix_.rows, format::kRowGroup), [&](int64_t run) {
      const int64_t first = run * format::kRowGroup;
      const int64_t last = std::min(first + format::kRowGroup, matrix_.rows);
      RowWalk walk(matrix_, first);
      TileRows rows(matrix_);
      while (walk.row() < last) {
        const int64_t tile = walk.row() / kTileRows;
        rows.take(walk);
        f(tile, rows);
      }
    });
  }

  int64_t bytes_of(const TileRows& rows) const {
    int64_t bytes = stream_.head_bytes() + stream_.chunks() * before_codes();
    for (int64_t chunk = 0; chunk < stream_.chunks(); ++chunk)
      bytes += code_bytes_of(stream_.code(), stream_.masks(), rows.masks(chunk));
    return bytes;
  }

  void pack(int64_t tile, TileRows& rows, uint8_t* const out) const {
    ChunkScales scales(matrix_, tile, stream_.scale_sets());
    double row_sums[kTileRows] = {};
    uint8_t* next = out + stream_.head_bytes();
    for (int64_t index = 0; index < stream_.chunks(); ++index) {
      uint8_t chunk[kMostBytes];
      ChunkSums sums;
      scales.read(index);
      std::memcpy(chunk + stream_.mask_bytes(), scales.bits(), static_cast<size_t>(scale_bytes()));
      const int64_t bytes =
          before_codes() + packer_.pack(stream_.code(), stream_.masks(), rows.chunk(index), chunk,
                                        chunk + before_codes(), sums);
      std::memcpy(next, chunk, static_cast<size_t>(bytes));
      next += bytes;
      const bool by_row = stream_.scale_sets() == 0;
      for (int64_t r = 0; r < kTileRows; ++r)
        for (int64_t half = 0; half < 2; ++half)
          row_sums[r] += sums[half][r] * (by_row ? 1.0 : double{scales.value(r, half)});
    }
    std::memcpy(out, row_sums, sizeof(row_sums));
    if (stream_.scale_sets() > 0) return;
    scales.read(0);
    for (int64_t r = 0; r < kTileRows; ++r) {
      const float scale = scales.value(r, 0);
      std::memcpy(out + sizeof(row_sums) + r * 4, &scale, 4);
    }
  }

 private:
  static constexpr int64_t kMostBytes = kBlocks * 8 + 2 * kTileRows * 2 + kMostCodeBytes;
  int64_t scale_bytes() const { return 2 * kTileRows * stream_.scale_sets(); }
  int64_t before_codes() const { return stream_.mask_bytes() + scale_bytes(); }

  const CompactMatrix& matrix_;
  const Stream& stream_;
  const ChunkPacker& packer_ = chunk_packer();
};

}  // namespace

Result<Stream> Stream::pack(const CompactMatrix& matrix, const Executor& executor,
                            std::optional<Masks> masks) {
  const Code code = matrix.quantization.code;
  if (code != Code::kInt8 && code != Code::kInt4)
    return not_possible("linear_coded: values are {} (need int8 or int4).",
                        matrix.quantization.text());
  Stream s;
  s.rows_ = matrix.rows;
  s.columns_ = matrix.columns;
  s.code_ = streamed_code(matrix.quantization);
  s.masks_ = masks_for(matrix, masks);
  const int64_t group = matrix.quantization.group;
  s.scale_sets_ = group == 0       ? (s.code() == Code::kInt4 ? 1 : 0)
                  : group < kChunk ? kChunk / group
                                   : 1;

  // The masks say how long every tile is, so that each is packed where it stays.
  const TilePacker packer(matrix, s);
  const int64_t tiles = format::ceil_div(matrix.rows, kTileRows);
  s.tile_offsets_.assign(static_cast<size_t>(tiles) + 1, 0);
  packer.for_each_tile(executor, [&](int64_t tile, const TileRows& rows) {
    s.tile_offsets_[tile + 1] = packer.bytes_of(rows);
  });
  for (int64_t tile = 0; tile < tiles; ++tile) s.tile_offsets_[tile + 1] += s.tile_offsets_[tile];
  s.block_ = LargeBlock(static_cast<size_t>(s.tile_offsets_[tiles]) + kMargin);
  s.data_ = s.block_.data();
  s.offsets_ = s.tile_offsets_.data();
  packer.for_each_tile(executor, [&](int64_t tile, TileRows& rows) {
    packer.pack(tile, rows, s.block_.data() + s.offsets_[tile]);
  });
  return s;
}

}  // namespace lacuna::kernels::linear_coded
