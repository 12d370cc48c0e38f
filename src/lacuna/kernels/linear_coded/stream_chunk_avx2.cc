// A chunk by bytes of its masks: the 8 codes that a byte may keep are spread to their columns by
// one shuffle, their two lanes of 32 bits stored where the blocks have them, and each block is
// closed up again by shuffles.
#include <cstring>

#include "lacuna/format/codes.h"
#include "lacuna/format/lanes_avx2.h"
#include "lacuna/kernels/linear_coded/stream_chunk.h"
#include "lacuna/kernels/stream_masks_x86.h"

namespace lacuna::kernels::linear_coded {
namespace {

using format::Code;

/// pshufb controls of a mask byte: where the next codes go (0x80: nowhere, 0), and the reverse.
struct ByteShuffles {
  alignas(64) uint8_t spread[256][8];
  alignas(64) uint8_t close[256][8];
};

constexpr ByteShuffles make_shuffles() {
  ByteShuffles shuffles{};
  for (int mask = 0; mask < 256; ++mask) {
    int rank = 0;
    for (int lane = 0; lane < 8; ++lane) shuffles.close[mask][lane] = 0x80;
    for (int lane = 0; lane < 8; ++lane) {
      const bool kept = mask >> lane & 1;
      shuffles.spread[mask][lane] = static_cast<uint8_t>(kept ? rank : 0x80);
      if (kept) shuffles.close[mask][rank++] = static_cast<uint8_t>(lane);
    }
  }
  return shuffles;
}
constexpr ByteShuffles kShuffles = make_shuffles();

LACUNA_INLINE int64_t count(uint64_t mask) { return static_cast<int64_t>(_mm_popcnt_u64(mask)); }

LACUNA_INLINE __m128i load8(const void* at) {
  return _mm_loadl_epi64(static_cast<const __m128i*>(at));
}

/// The codes of a row's chunk as bytes. @param room  [64]
template <Code kCode>
LACUNA_INLINE const uint8_t* as_bytes(const uint8_t* codes, uint8_t* room) {
  if constexpr (kCode == Code::kInt8) return codes;
  for (int half = 0; half < 2; ++half) {
    const __m256i bytes =
        _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16 * half)));
    const __m256i apart = _mm256_and_si256(_mm256_or_si256(bytes, _mm256_slli_epi16(bytes, 4)),
                                           _mm256_set1_epi16(0x0f0f));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(room + 32 * half),
                        _mm256_sub_epi8(apart, _mm256_set1_epi8(format::kInt4Zero)));
  }
  return room;
}

template <Code kCode>
LACUNA_INLINE void take_row(uint64_t mask, const uint8_t*& codes, int64_t row, ChunkCodes& blocks) {
  alignas(32) uint8_t room[kChunk];
  const uint8_t* next = as_bytes<kCode>(codes, room);
  for (int byte = 0; byte < 8; ++byte) {
    const auto bits = static_cast<uint8_t>(mask >> (8 * byte));
    const __m128i lanes = _mm_shuffle_epi8(load8(next), load8(kShuffles.spread[bits]));
    _mm_storeu_si32(&blocks[2 * byte][kBlockColumns * row], lanes);
    _mm_storeu_si32(&blocks[2 * byte + 1][kBlockColumns * row], _mm_srli_epi64(lanes, 32));
    next += count(bits);
  }
  const int64_t kept = count(mask);
  codes += kCode == Code::kInt8 ? kept : (kept + 1) / 2;
}

/// Appends the codes of a block that a mask marks; writes up to 7 bytes more.
LACUNA_INLINE uint8_t* append(uint8_t* out, uint64_t mask, const int8_t* block) {
  for (int byte = 0; byte < 8; ++byte) {
    const auto bits = static_cast<uint8_t>(mask >> (8 * byte));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out),
                     _mm_shuffle_epi8(load8(block + 8 * byte), load8(kShuffles.close[bits])));
    out += count(bits);
  }
  return out;
}

LACUNA_INLINE __m256i load32(const void* at) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(at));
}

/// Two codes a byte, the first one low: out [bytes], rounded up to 32.
LACUNA_INLINE void together(const void* low, const void* high, int64_t bytes, void* out) {
  for (int64_t at = 0; at < bytes; at += 32) {
    const __m256i mine =
        _mm256_and_si256(load32(static_cast<const uint8_t*>(low) + at), _mm256_set1_epi8(15));
    const __m256i other =
        _mm256_and_si256(_mm256_slli_epi16(load32(static_cast<const uint8_t*>(high) + at), 4),
                         _mm256_set1_epi8(static_cast<char>(0xf0)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint8_t*>(out) + at),
                        _mm256_or_si256(mine, other));
  }
}

/// Sums of the 4 codes in each lane of blocks [first, first + kPairs).
LACUNA_INLINE void add_lanes(const ChunkCodes& blocks, int64_t first, int32_t* sums) {
  const __m256i bytes = _mm256_set1_epi8(1), words = _mm256_set1_epi16(1);
  for (int half = 0; half < 2; ++half) {
    __m256i sum = _mm256_setzero_si256();
    for (int64_t b = first; b < first + kPairs; ++b)
      sum = _mm256_add_epi32(
          sum,
          _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, load32(blocks[b] + 32 * half)), words));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + 8 * half), sum);
  }
}

template <Code kCode>
LACUNA_INLINE int64_t pack(Masks kind, ChunkRows& rows, uint8_t* masks, uint8_t* const out,
                           ChunkSums& sums) {
  alignas(32) ChunkCodes blocks;
  for (int64_t r = 0; r < kTileRows; ++r) take_row<kCode>(rows.masks[r], rows.codes[r], r, blocks);
  add_lanes(blocks, 0, sums[0]);
  add_lanes(blocks, kPairs, sums[1]);
  uint64_t kept[kBlocks];
  stream::transpose_masks(rows.masks, kept);
  if (kind == Masks::kOwn) std::memcpy(masks, kept, sizeof(kept));
  uint8_t* next = out;
  if constexpr (kCode == Code::kInt8) {
    for (int64_t pair = 0; pair < kPairs; ++pair)
      for (const int64_t b : {pair, pair + kPairs}) {
        if (kind != Masks::kNone) {
          next = append(next, kept[b], blocks[b]);
        } else {
          std::memcpy(next, blocks[b], kBlockWeights);
          next += kBlockWeights;
        }
      }
    return next - out;
  }
  if (kind == Masks::kOwn) {
    uint8_t codes[2][kPairs * kBlockWeights + 32];
    uint8_t *low = codes[0], *high = codes[1];
    for (int64_t pair = 0; pair < kPairs; ++pair) {
      low = append(low, kept[pair], blocks[pair]);
      high = append(high, kept[pair + kPairs], blocks[pair + kPairs]);
    }
    const int64_t lows = low - codes[0], highs = high - codes[1];
    const int64_t bytes = lows > highs ? lows : highs;
    // Half bytes without a code are 0.
    std::memset(low, 0, static_cast<size_t>(bytes - lows));
    std::memset(high, 0, static_cast<size_t>(bytes - highs));
    together(codes[0], codes[1], bytes, out);
    return bytes;
  }
  for (int64_t pair = 0; pair < kPairs; ++pair) {
    alignas(32) int8_t both[kBlockWeights];
    together(blocks[pair], blocks[pair + kPairs], kBlockWeights, both);
    if (kind == Masks::kShared) {
      const uint64_t mask = kept[pair] | kept[pair + kPairs];
      std::memcpy(masks + 8 * pair, &mask, 8);
      next = append(next, mask, both);
    } else {
      std::memcpy(next, both, kBlockWeights);
      next += kBlockWeights;
    }
  }
  return next - out;
}

}  // namespace

int64_t pack_chunk_avx2(Code code, Masks kind, ChunkRows& rows, uint8_t* masks, uint8_t* codes,
                        ChunkSums& sums) {
  return code == Code::kInt8 ? pack<Code::kInt8>(kind, rows, masks, codes, sums)
                             : pack<Code::kInt4>(kind, rows, masks, codes, sums);
}

}  // namespace lacuna::kernels::linear_coded
