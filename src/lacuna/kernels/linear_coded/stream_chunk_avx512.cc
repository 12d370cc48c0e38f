// A chunk in 16 registers: every row's codes are expanded to their columns (vpexpandb), the 16 by
// 16 lanes of 32 bits transposed, so that a register is a block, and each block is compressed again
// (vpcompressb). Four-bit codes are taken apart before and put together after, 64 at a time.
// g++ 12 warns of its own "undefined" operands inside its intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include <cstring>

#include "lacuna/format/codes.h"
#include "lacuna/format/lanes_avx512.h"
#include "lacuna/kernels/linear_coded/stream_chunk.h"
#include "lacuna/kernels/stream_lanes_avx512.h"
#include "lacuna/kernels/stream_masks_x86.h"

namespace lacuna::kernels::linear_coded {
namespace {

using format::Code;

LACUNA_INLINE int64_t count(uint64_t mask) { return static_cast<int64_t>(_mm_popcnt_u64(mask)); }

/// The codes of a row's chunk in its columns; dropped ones 0. Moves `codes` on.
template <Code kCode>
LACUNA_INLINE __m512i take_row(uint64_t mask, const uint8_t*& codes) {
  const int64_t kept = count(mask);
  __m512i packed;
  if constexpr (kCode == Code::kInt8) {
    packed = _mm512_loadu_si512(codes);
    codes += kept;
  } else {
    const __m512i bytes =
        _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    const __m512i apart = _mm512_and_si512(_mm512_or_si512(bytes, _mm512_slli_epi16(bytes, 4)),
                                           _mm512_set1_epi16(0x0f0f));
    packed = _mm512_sub_epi8(apart, _mm512_set1_epi8(format::kInt4Zero));
    codes += (kept + 1) / 2;
  }
  return _mm512_maskz_expand_epi8(mask, packed);
}

/// Appends the codes that a mask marks; writes 64 bytes.
LACUNA_INLINE uint8_t* append(uint8_t* out, uint64_t mask, __m512i codes) {
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi8(mask, codes));
  return out + count(mask);
}

/// Two codes a byte, the first one low.
LACUNA_INLINE __m512i together(__m512i low, __m512i high) {
  const __m512i mine = _mm512_and_si512(low, _mm512_set1_epi8(15));
  const __m512i shifted =
      _mm512_and_si512(_mm512_slli_epi16(high, 4), _mm512_set1_epi8(static_cast<char>(0xf0)));
  return _mm512_or_si512(mine, shifted);
}

template <Code kCode, Masks kKind>
LACUNA_INLINE int64_t pack(ChunkRows& rows, uint8_t* masks, uint8_t* const out, ChunkSums& sums) {
  __m512i blocks[kBlocks];
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) blocks[r] = take_row<kCode>(rows.masks[r], rows.codes[r]);
  stream::transpose_lanes(blocks);
  __m512i low_sums = _mm512_setzero_si512(), high_sums = _mm512_setzero_si512();
  const __m512i ones = _mm512_set1_epi8(1);
#pragma GCC unroll 8
  for (int pair = 0; pair < kPairs; ++pair) {
    low_sums = _mm512_dpbusd_epi32(low_sums, ones, blocks[pair]);
    high_sums = _mm512_dpbusd_epi32(high_sums, ones, blocks[pair + kPairs]);
  }
  _mm512_storeu_si512(sums[0], low_sums);
  _mm512_storeu_si512(sums[1], high_sums);

  alignas(64) uint64_t kept[kBlocks];
  if constexpr (kKind != Masks::kNone) stream::transpose_masks(rows.masks, kept);
  if constexpr (kKind == Masks::kOwn) std::memcpy(masks, kept, sizeof(kept));
  uint8_t* next = out;
  if constexpr (kCode == Code::kInt8) {
#pragma GCC unroll 8
    for (int pair = 0; pair < kPairs; ++pair)
      for (const int b : {pair, pair + static_cast<int>(kPairs)}) {
        if constexpr (kKind == Masks::kNone) {
          _mm512_storeu_si512(next, blocks[b]);
          next += kBlockWeights;
        } else {
          next = append(next, kept[b], blocks[b]);
        }
      }
    return next - out;
  } else if constexpr (kKind == Masks::kOwn) {
    alignas(64) uint8_t codes[2][kPairs * kBlockWeights + 64];
    uint8_t *low = codes[0], *high = codes[1];
#pragma GCC unroll 8
    for (int pair = 0; pair < kPairs; ++pair) {
      low = append(low, kept[pair], blocks[pair]);
      high = append(high, kept[pair + kPairs], blocks[pair + kPairs]);
    }
    const int64_t lows = low - codes[0], highs = high - codes[1];
    const int64_t bytes = lows > highs ? lows : highs;
    // Half bytes without a code are 0.
    for (int64_t at = lows; at < bytes; at += 64)
      _mm512_storeu_si512(codes[0] + at, _mm512_setzero_si512());
    for (int64_t at = highs; at < bytes; at += 64)
      _mm512_storeu_si512(codes[1] + at, _mm512_setzero_si512());
    for (int64_t at = 0; at < bytes; at += 64)
      _mm512_storeu_si512(
          out + at, together(_mm512_load_si512(codes[0] + at), _mm512_load_si512(codes[1] + at)));
    return bytes;
  } else {
#pragma GCC unroll 8
    for (int pair = 0; pair < kPairs; ++pair) {
      const __m512i both = together(blocks[pair], blocks[pair + kPairs]);
      if constexpr (kKind == Masks::kNone) {
        _mm512_storeu_si512(next, both);
        next += kBlockWeights;
      } else {
        const uint64_t mask = kept[pair] | kept[pair + kPairs];
        std::memcpy(masks + 8 * pair, &mask, 8);
        next = append(next, mask, both);
      }
    }
    return next - out;
  }
}

}  // namespace

int64_t pack_chunk_avx512(Code code, Masks kind, ChunkRows& rows, uint8_t* masks, uint8_t* codes,
                          ChunkSums& sums) {
  if (code == Code::kInt8)
    return kind == Masks::kNone ? pack<Code::kInt8, Masks::kNone>(rows, masks, codes, sums)
                                : pack<Code::kInt8, Masks::kOwn>(rows, masks, codes, sums);
  if (kind == Masks::kNone) return pack<Code::kInt4, Masks::kNone>(rows, masks, codes, sums);
  return kind == Masks::kOwn ? pack<Code::kInt4, Masks::kOwn>(rows, masks, codes, sums)
                             : pack<Code::kInt4, Masks::kShared>(rows, masks, codes, sums);
}

}  // namespace lacuna::kernels::linear_coded
