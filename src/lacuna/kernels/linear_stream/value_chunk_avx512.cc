// Half a chunk in 16 registers: every row's values are expanded to their 32 columns (vpexpandw),
// the 16 by 16 lanes transposed, so that a register is a block, and each block is compressed again
// (vpcompressw); or all that backwards.
// g++ 12 warns of its own "undefined" operands inside its intrinsics.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "lacuna/kernels/linear_stream/value_chunk.h"
#include "lacuna/kernels/stream_lanes_avx512.h"
#include "lacuna/kernels/stream_masks_x86.h"

namespace lacuna::kernels::linear_stream {
namespace {

namespace avx512 = format::avx512;
using stream::kValueMaskBytes;

constexpr int kHalves = 2, kHalfColumns = kChunk / kHalves, kHalfBlocks = 16;

LACUNA_INLINE int64_t bytes_of(uint32_t mask) {
  return 2 * static_cast<int64_t>(_mm_popcnt_u32(mask));
}

/// Masks of 16 rows by 64 columns to those of 32 blocks.
LACUNA_INLINE void block_masks(const uint64_t* rows, uint32_t* blocks) {
  alignas(64) uint64_t fours[16];  // of 4 columns
  stream::transpose_masks(rows, fours);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    blocks[2 * i] = static_cast<uint32_t>(_pext_u64(fours[i], 0x3333333333333333));
    blocks[2 * i + 1] = static_cast<uint32_t>(_pext_u64(fours[i], 0xcccccccccccccccc));
  }
}

}  // namespace

int64_t pack_chunk_avx512(ChunkRows& rows, uint8_t* chunk) {
  uint32_t masks[kHalves * kHalfBlocks];
  block_masks(rows.masks, masks);
  std::memcpy(chunk, masks, sizeof(masks));
  uint8_t* next = chunk + kValueMaskBytes;
  for (int half = 0; half < kHalves; ++half) {
    __m512i blocks[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) {
      const auto mask = static_cast<uint32_t>(rows.masks[r] >> (kHalfColumns * half));
      blocks[r] = avx512::expand_u16(mask, _mm512_loadu_si512(rows.values[r]));
      rows.values[r] += bytes_of(mask);
    }
    stream::transpose_lanes(blocks);
#pragma GCC unroll 16
    for (int b = 0; b < kHalfBlocks; ++b) {
      const uint32_t mask = masks[kHalfBlocks * half + b];
      _mm512_storeu_si512(next, _mm512_maskz_compress_epi16(mask, blocks[b]));
      next += bytes_of(mask);
    }
  }
  return next - chunk;
}

int64_t unpack_chunk_avx512(const uint8_t* chunk, ChunkWeights& out) {
  const uint8_t *mask = chunk, *next = chunk + kValueMaskBytes;
  for (int half = 0; half < kHalves; ++half) {
    __m512i rows[16];
#pragma GCC unroll 16
    for (int b = 0; b < kHalfBlocks; ++b) rows[b] = stream::take_values(mask + 4 * b, next);
    mask += 4 * kHalfBlocks;
    stream::transpose_lanes(rows);
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) _mm512_storeu_si512(out[r] + kHalfColumns * half, rows[r]);
  }
  return next - chunk;
}

}  // namespace lacuna::kernels::linear_stream
