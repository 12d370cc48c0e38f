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

/// One row as the stream wants it: masks of its chunks and a byte for each kept code.
struct RowCodes {
  std::vector<uint64_t> masks;
  std::vector<uint8_t> codes;  // two's complement
  const uint8_t* next = nullptr;
};

void read_row(const CompactMatrix& matrix, format::RowWalk& walk, RowCodes& row) {
  std::fill(row.masks.begin(), row.masks.end(), 0);
  std::memcpy(row.masks.data(), walk.bitmap(), static_cast<size_t>(matrix.bitmap_stride_bytes()));
  row.codes.resize(static_cast<size_t>(walk.codes()));
  format::read_codes(matrix, walk, row.codes.data());
  if (matrix.quantization.code == Code::kInt4)
    for (uint8_t& code : row.codes) code = static_cast<uint8_t>(code - format::kInt4Zero);
  row.next = row.codes.data();
}

/// Bytes of codes that a chunk takes, given how many each row keeps.
int64_t chunk_code_bytes(Code code, const int64_t (&kept)[kTileRows]) {
  return code == Code::kInt8 ? kept[0] + kept[1] + kept[2] + kept[3]
                             : std::max(kept[0], kept[1]) + std::max(kept[2], kept[3]);
}

}  // namespace

Result<Stream> Stream::pack(const CompactMatrix& matrix, const Executor& executor) {
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
  s.masked_ = matrix.pattern.kind != format::PatternKind::kDense;
  const int64_t tiles = format::ceil_div(matrix.rows, kTileRows), chunks = s.chunks();
  const int64_t sets = s.scale_sets(), groups = matrix.quantization.groups(matrix.columns);
  s.row_scales_.assign(static_cast<size_t>(tiles * kTileRows), 0);
  s.row_sums_.assign(static_cast<size_t>(tiles * kTileRows), 0);
  s.offsets_.assign(static_cast<size_t>(tiles) + 1, 0);

  // Rows are walked in runs of 64, whose beginnings the matrix knows; a run packs into its own
  // bytes, and the runs are then joined.
  const int64_t runs = format::ceil_div(matrix.rows, format::kRowGroup);
  std::vector<std::vector<uint8_t>> packed(static_cast<size_t>(runs));
  executor.parallel_for(runs, [&](int64_t run) {
    const int64_t first = run * format::kRowGroup;
    const int64_t last = std::min(first + format::kRowGroup, matrix.rows);
    format::RowWalk walk(matrix, first);
    std::vector<uint8_t>& out = packed[static_cast<size_t>(run)];
    RowCodes rows[kTileRows];
    for (RowCodes& row : rows) row.masks.resize(static_cast<size_t>(chunks));
    const uint8_t* scales = reinterpret_cast<const uint8_t*>(matrix.scales.data());
    const auto scale_bits = [&](int64_t row, int64_t group) {
      return row < matrix.rows && group < groups
                 ? read_unaligned<uint16_t>(scales + (row * groups + group) * 2)
                 : uint16_t{0};
    };
    for (int64_t top = first; top < last; top += kTileRows) {
      const size_t begin = out.size();
      for (int64_t r = 0; r < kTileRows; ++r) {
        if (top + r < last) {
          read_row(matrix, walk, rows[r]);
          if (top + r + 1 < matrix.rows) walk.next();
        } else {
          std::fill(rows[r].masks.begin(), rows[r].masks.end(), 0);
        }
        if (!s.grouped()) s.row_scales_[top + r] = bf16_to_float(scale_bits(top + r, 0));
      }
      double sums[kTileRows] = {};
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        int64_t kept[kTileRows];
        for (int64_t r = 0; r < kTileRows; ++r)
          kept[r] = s.masked_ ? std::popcount(rows[r].masks[chunk]) : kChunk;
        size_t at = out.size();
        out.resize(at + (s.masked_ ? kTileRows * 8 : 0) + kTileRows * 2 * sets +
                   chunk_code_bytes(code, kept));
        for (int64_t r = 0; s.masked_ && r < kTileRows; ++r, at += 8)
          std::memcpy(&out[at], &rows[r].masks[chunk], 8);
        for (int64_t set = 0; set < sets; ++set)
          for (int64_t r = 0; r < kTileRows; ++r, at += 2) {
            const uint16_t bits = scale_bits(
                top + r, (chunk * kChunk + set * (kChunk / sets)) / matrix.quantization.group);
            std::memcpy(&out[at], &bits, 2);
          }
        for (int64_t r = 0; r < kTileRows; ++r) {
          const auto count = static_cast<int64_t>(std::popcount(rows[r].masks[chunk]));
          uint64_t mask = rows[r].masks[chunk];
          for (int64_t i = 0; i < count; ++i, mask &= mask - 1) {
            const auto q = static_cast<int8_t>(rows[r].next[i]);
            const int64_t column = chunk * kChunk + std::countr_zero(mask);
            sums[r] += s.grouped() ? double{bf16_to_float(
                                         scale_bits(top + r, column / matrix.quantization.group))} *
                                         q
                                   : q;
            if (code == Code::kInt8) {
              out[at + i] = static_cast<uint8_t>(q);
            } else {
              out[at + i] |= static_cast<uint8_t>(r % 2 == 0 ? q & 15 : q << 4);
            }
          }
          rows[r].next += count;
          if (code == Code::kInt8) {
            at += kept[r];
          } else if (r % 2 == 1) {
            at += std::max(kept[r - 1], kept[r]);
          }
        }
      }
      for (int64_t r = 0; r < kTileRows; ++r) s.row_sums_[top + r] = sums[r];
      s.offsets_[top / kTileRows + 1] = static_cast<int64_t>(out.size() - begin);
    }
  });
  for (int64_t tile = 0; tile < tiles; ++tile) s.offsets_[tile + 1] += s.offsets_[tile];
  s.data_ = LargeBlock(static_cast<size_t>(s.offsets_[tiles] + 2 * kMargin));
  size_t at = kMargin;
  for (std::vector<uint8_t>& run : packed) {
    if (!run.empty()) std::memcpy(s.data_.data() + at, run.data(), run.size());
    at += run.size();
    run = {};
  }
  return s;
}

void Stream::expand_tile(int64_t tile, float* out) const {
  std::fill(out, out + kTileRows * columns_, 0.0f);
  ChunkWalk walk(*this, tile);
  const int64_t sets = scale_sets();
  for (int64_t chunk = 0; chunk < chunks(); ++chunk, walk.next()) {
    const int64_t first = chunk * kChunk, width = std::min(kChunk, columns_ - first);
    for (int64_t r = 0; r < kTileRows; ++r) {
      uint64_t mask = walk.mask(r);
      if (width < kChunk) mask &= (uint64_t{1} << width) - 1;
      float* row = out + r * columns_ + first;
      for (int64_t n = 0; mask != 0; ++n, mask &= mask - 1) {
        const int64_t column = std::countr_zero(mask);
        const float scale =
            sets ? walk.scale(r, column * sets / kChunk) : row_scales_[tile * kTileRows + r];
        row[column] = scale * static_cast<float>(walk.code(r, n));
      }
    }
  }
}

ChunkWalk::ChunkWalk(const Stream& stream, int64_t tile) : stream_(stream), at_(stream.tile(tile)) {
  enter();
}

void ChunkWalk::enter() {
  for (int64_t r = 0; r < kTileRows; ++r)
    kept_[r] = stream_.masked() ? std::popcount(read_unaligned<uint64_t>(at_ + 8 * r)) : kChunk;
  codes_ = at_ + (stream_.masked() ? kTileRows * 8 : 0) + kTileRows * 2 * stream_.scale_sets();
}

void ChunkWalk::next() {
  at_ = codes_ + chunk_code_bytes(stream_.code(), kept_);
  enter();
}

uint64_t ChunkWalk::mask(int64_t row) const {
  return stream_.masked() ? read_unaligned<uint64_t>(at_ + 8 * row) : kAllKept;
}

float ChunkWalk::scale(int64_t row, int64_t set) const {
  return bf16_to_float(read_unaligned<uint16_t>(at_ + (stream_.masked() ? kTileRows * 8 : 0) +
                                                (set * kTileRows + row) * 2));
}

int ChunkWalk::code(int64_t row, int64_t n) const {
  if (stream_.code() == Code::kInt8) {
    for (int64_t r = 0; r < row; ++r) n += kept_[r];
    return static_cast<int8_t>(codes_[n]);
  }
  if (row >= 2) n += std::max(kept_[0], kept_[1]);
  const uint8_t pair = codes_[n];
  return static_cast<int8_t>(row % 2 == 0 ? pair << 4 : pair & 0xf0) >> 4;
}

}  // namespace lacuna::kernels::linear_coded
