// Without vpexpandb: 8 bits of a mask choose a shuffle from a table of 256, which spreads the next
// codes to their places. A chunk of a tile is expanded so into 1 KiB, 8 bytes at a time, before it
// is read back in whole registers (a load can't wait for four smaller stores), 8 rows by 4 columns
// each, and meets every token.
//
// Products of bytes: vpdpbusd where AVX-VNNI has it. Else vpmaddubsw adds two in 16 bits, which may
// not overflow: four-bit codes are small enough for 8 blocks in a row; int8 codes give their sign
// to x (127 · 127 · 2 fits), which needs x with its own sign, so 128 times the codes' sum is added.
#include <immintrin.h>

#include <array>

#include "lacuna/kernels/linear_coded/cpu.h"

namespace lacuna::kernels::linear_coded {
namespace {

using format::Code;

/// How far ahead of its chunk a kernel asks for lines.
constexpr int64_t kAhead = 2048;

/// For each 8 mask bits: where each of 8 bytes comes from; 0x80 makes it 0.
constexpr std::array<std::array<uint8_t, 8>, 256> kSpread = [] {
  std::array<std::array<uint8_t, 8>, 256> table{};
  for (size_t mask = 0; mask < 256; ++mask) {
    uint8_t next = 0;
    for (size_t i = 0; i < 8; ++i) table[mask][i] = mask >> i & 1 ? next++ : 0x80;
  }
  return table;
}();

/// One block as bytes, 0 where dropped. @return past its codes
const uint8_t* expand_block(const uint8_t* mask, const uint8_t* codes, uint8_t* out) {
  for (int i = 0; i < 8; ++i) {
    const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
    const __m128i spread =
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kSpread[mask[i]].data()));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out + 8 * i), _mm_shuffle_epi8(packed, spread));
    codes += _mm_popcnt_u32(mask[i]);
  }
  return codes;
}

/// A chunk as dot() wants it: bytes of the two blocks of pair 0, of pair 1, ...; or one block a
/// pair that holds both in its halves.
struct Expanded {
  const uint8_t* bytes;
  const uint8_t* next;  // the chunk behind
};

Expanded expand_chunk(const Stream& stream, const uint8_t* at, uint8_t* buffer) {
  const uint8_t* const masks = at;
  const uint8_t* codes = at + stream.mask_bytes() + 2 * kTileRows * stream.scale_sets();
  const bool int8 = stream.code() == Code::kInt8;
  if (stream.masks() == Masks::kNone)
    return {codes, codes + (int8 ? kBlocks : kPairs) * kBlockWeights};
  if (stream.masks() == Masks::kShared) {
    for (int64_t pair = 0; pair < kPairs; ++pair)
      codes = expand_block(masks + 8 * pair, codes, buffer + kBlockWeights * pair);
    return {buffer, codes};
  }
  const uint8_t* high = codes;
  for (int64_t pair = 0; pair < kPairs; ++pair) {
    uint8_t* const out = buffer + 2 * kBlockWeights * pair;
    codes = expand_block(masks + 8 * pair, codes, out);
    const uint8_t*& other = int8 ? codes : high;
    other = expand_block(masks + 8 * (pair + kPairs), other, out + kBlockWeights);
  }
  return {buffer, codes > high ? codes : high};
}

/// 32 codes as bytes with sign.
template <Code kCode, int kHalf>
inline __m256i codes_of(__m256i bytes) {
  if constexpr (kCode == Code::kInt8) {
    return bytes;
  } else {
    const __m256i signs = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1));
    const __m256i half = kHalf == 0 ? bytes : _mm256_srli_epi16(bytes, 4);
    return _mm256_shuffle_epi8(signs, _mm256_and_si256(half, _mm256_set1_epi8(15)));
  }
}

/// Sums of one half of a chunk's columns: for 8 rows from `bytes`, each token.
/// @tparam kTwo  pairs are two blocks
template <Code kCode, bool kTwo, bool kVnni, int kHalf, int T>
inline void dot_half(const uint8_t* bytes, const uint8_t* x, int64_t x_stride, __m256i (&sums)[T]) {
  const __m256i ones16 = _mm256_set1_epi16(1);
  __m256i code_sums = _mm256_setzero_si256();  // int8 without VNNI
  for (int t = 0; t < T; ++t) sums[t] = _mm256_setzero_si256();
  for (int64_t pair = 0; pair < kPairs; ++pair) {
    const uint8_t* block = bytes + kBlockWeights * (kTwo ? 2 * pair + kHalf : pair);
    const __m256i w =
        codes_of<kCode, kHalf>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(block)));
    const __m256i magnitude = _mm256_abs_epi8(w);
    if constexpr (kCode == Code::kInt8 && !kVnni)
      code_sums = _mm256_add_epi16(code_sums, _mm256_maddubs_epi16(_mm256_set1_epi8(1), w));
    for (int t = 0; t < T; ++t) {
      const __m256i input = _mm256_set1_epi32(
          read_unaligned<int32_t>(x + t * x_stride + kChunk / 2 * kHalf + kBlockColumns * pair));
      if constexpr (kVnni) {
        asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums[t]) : "x"(input), "x"(w));
      } else if constexpr (kCode == Code::kInt4) {
        sums[t] = _mm256_add_epi16(sums[t], _mm256_maddubs_epi16(input, w));
      } else {
        const __m256i with_sign =
            _mm256_sign_epi8(_mm256_xor_si256(input, _mm256_set1_epi8(-128)), w);
        sums[t] = _mm256_add_epi32(
            sums[t], _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, with_sign), ones16));
      }
    }
  }
  if constexpr (!kVnni) {
    const __m256i offset = _mm256_slli_epi32(_mm256_madd_epi16(code_sums, ones16), 7);
    for (int t = 0; t < T; ++t)
      sums[t] = kCode == Code::kInt4 ? _mm256_madd_epi16(sums[t], ones16)
                                     : _mm256_add_epi32(sums[t], offset);
  }
}

inline __m256 scales_of(const uint8_t* scales) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

template <Code kCode, bool kTwo, bool kVnni, int T>
void tile_of(const Stream& stream, int64_t tile, const uint8_t* x, int64_t x_stride, float* sums) {
  alignas(32) uint8_t buffer[kBlocks * kBlockWeights];
  const int64_t chunks = stream.chunks(), sets = stream.scale_sets();
  __m256i whole[2][T];
  __m256 scaled[2][T];
  for (int rows = 0; rows < 2; ++rows)
    for (int t = 0; t < T; ++t) {
      whole[rows][t] = _mm256_setzero_si256();
      scaled[rows][t] = _mm256_setzero_ps();
    }
  const uint8_t* at = stream.chunks_of(tile);
  for (int64_t chunk = 0; chunk < chunks; ++chunk, x += kChunk) {
    const uint8_t* const scales = at + stream.mask_bytes();
    for (int line = 0; line < (kCode == Code::kInt8 ? 16 : 8); ++line)
      _mm_prefetch(reinterpret_cast<const char*>(at) + kAhead + 64 * line, _MM_HINT_T0);
    const Expanded expanded = expand_chunk(stream, at, buffer);
    for (int rows = 0; rows < 2; ++rows) {
      const uint8_t* const bytes = expanded.bytes + 32 * rows;
      __m256i low[T], high[T];
      dot_half<kCode, kTwo, kVnni, 0>(bytes, x, x_stride, low);
      dot_half<kCode, kTwo, kVnni, 1>(bytes, x, x_stride, high);
      const auto scale = [&](int64_t set) {
        return scales_of(scales + 2 * (kTileRows * set + 8 * rows));
      };
      for (int t = 0; t < T; ++t) {
        const __m256i both = _mm256_add_epi32(low[t], high[t]);
        if (sets == 0) {
          whole[rows][t] = _mm256_add_epi32(whole[rows][t], both);
        } else {
          scaled[rows][t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sets == 2 ? low[t] : both), scale(0),
                                            scaled[rows][t]);
          if (sets == 2)
            scaled[rows][t] =
                _mm256_fmadd_ps(_mm256_cvtepi32_ps(high[t]), scale(1), scaled[rows][t]);
        }
      }
    }
    at = expanded.next;
  }
  for (int t = 0; t < T; ++t)
    for (int64_t r = 0; r < kTileRows; ++r) {
      alignas(32) int32_t integers[8];
      alignas(32) float floats[8];
      _mm256_store_si256(reinterpret_cast<__m256i*>(integers), whole[r / 8][t]);
      _mm256_store_ps(floats, scaled[r / 8][t]);
      sums[t * kTileRows + r] =
          without_offset(stream, tile, r, sets ? double{floats[r % 8]} : integers[r % 8]);
    }
}

template <Code kCode, bool kTwo, bool kVnni>
void tile_for(const Stream& stream, int64_t tile, const uint8_t* x, int64_t x_stride,
              int64_t tokens, float* sums) {
  // One or four tokens at a time: more sums than that don't fit the 16 registers.
  for (; tokens >= 4; tokens -= 4, x += 4 * x_stride, sums += 4 * kTileRows)
    tile_of<kCode, kTwo, kVnni, 4>(stream, tile, x, x_stride, sums);
  for (; tokens >= 2; tokens -= 2, x += 2 * x_stride, sums += 2 * kTileRows)
    tile_of<kCode, kTwo, kVnni, 2>(stream, tile, x, x_stride, sums);
  if (tokens > 0) tile_of<kCode, kTwo, kVnni, 1>(stream, tile, x, x_stride, sums);
}

template <bool kVnni>
void tile(const Stream& stream, int64_t index, const uint8_t* x, int64_t x_stride, int64_t tokens,
          float* sums) {
  if (stream.code() == Code::kInt8)
    return tile_for<Code::kInt8, true, kVnni>(stream, index, x, x_stride, tokens, sums);
  return stream.masks() == Masks::kOwn
             ? tile_for<Code::kInt4, true, kVnni>(stream, index, x, x_stride, tokens, sums)
             : tile_for<Code::kInt4, false, kVnni>(stream, index, x, x_stride, tokens, sums);
}

}  // namespace

void tile_avx2_buffer_dot(const Stream& stream, int64_t index, const uint8_t* x, int64_t x_stride,
                          int64_t tokens, float* sums) {
  tile<false>(stream, index, x, x_stride, tokens, sums);
}

void tile_avx2_vnni_buffer_dot(const Stream& stream, int64_t index, const uint8_t* x,
                               int64_t x_stride, int64_t tokens, float* sums) {
  tile<true>(stream, index, x, x_stride, tokens, sums);
}

}  // namespace lacuna::kernels::linear_coded
