// Without vpexpandb: 16 bits of a mask choose a shuffle, as the sum of two rows from tables of 256,
// which spreads the next codes to their places. One token meets them at once, 8 rows by 4 columns a
// register. For more, whose sums leave no registers, a chunk of a tile is expanded into 1 KiB and
// read back in whole registers (a load can't wait for two smaller stores).
//
// Products of bytes: vpdpbusd where AVX-VNNI has it. Else vpmaddubsw adds two in 16 bits, which may
// not overflow: four-bit codes are small enough for 8 blocks in a row; int8 codes give their sign
// to x (127 · 127 · 2 fits), which needs x with its own sign, so 128 times the codes' sum is added.
#include <immintrin.h>

#include <algorithm>

#include "lacuna/kernels/linear_coded/cpu.h"

namespace lacuna::kernels::linear_coded {
namespace {

using format::Code;

/// Shuffle controls that spread the next codes over 16 places are a sum, first[low mask byte] +
/// second[high mask byte]: where each byte comes from, past what the low mask keeps in the upper
/// half. From 0x80 on the result is 0.
struct Spread {
  alignas(64) uint8_t first[256][16];
  alignas(64) uint8_t second[256][16];
};

constexpr Spread kSpread = [] {
  Spread table{};
  for (size_t mask = 0; mask < 256; ++mask) {
    uint8_t next = 0;
    for (size_t i = 0; i < 8; ++i)
      table.first[mask][i] = table.second[mask][8 + i] = mask >> i & 1 ? next++ : 0x80;
    for (size_t i = 0; i < 8; ++i) table.first[mask][8 + i] = next;
  }
  return table;
}();

inline __m128i load16(const uint8_t* at) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
}

/// The next 16 weights of a block as bytes, 0 where dropped. Moves on both.
inline __m128i expand16(const uint8_t*& mask, const uint8_t*& codes) {
  const uint32_t bits = read_unaligned<uint16_t>(mask);
  const __m128i from = _mm_add_epi8(load16(kSpread.first[0] + (bits << 4 & 0xff0)),
                                    load16(kSpread.second[0] + (bits >> 4 & 0xff0)));
  const __m128i spread = _mm_shuffle_epi8(load16(codes), from);
  mask += 2;
  codes += _mm_popcnt_u32(bits);
  return spread;
}

inline __m256i expand32(const uint8_t*& mask, const uint8_t*& codes) {
  const __m128i low = expand16(mask, codes);
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), expand16(mask, codes), 1);
}

/// One block. @return past its codes
inline const uint8_t* expand_block(const uint8_t* mask, const uint8_t* codes, uint8_t* out) {
  for (int64_t i = 0; i < kBlockWeights; i += 16)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), expand16(mask, codes));
  return codes;
}

/// Asks for as many lines some way behind `at`.
inline void ask_ahead(const uint8_t* at, int64_t lines = 1) {
  for (int64_t line = 0; line < lines; ++line) {
    stream::ask_near(at + 64 * line);
    stream::ask_far(at + 64 * line);
  }
}

/// A chunk as dot_half() wants it: bytes of the two blocks of pair 0, of pair 1, ...; or one block
/// a pair that holds both in its halves.
struct Expanded {
  const uint8_t* bytes;
  const uint8_t* next;  // the chunk behind
};

Expanded expand_chunk(const Stream& stream, const uint8_t* at, uint8_t* buffer) {
  const uint8_t* const masks = at;
  const uint8_t* codes = at + stream.mask_bytes() + 2 * kTileRows * stream.scale_sets();
  const bool int8 = stream.code() == Code::kInt8;
  if (stream.masks() == Masks::kNone) {
    const int64_t lines = int8 ? kBlocks : kPairs;
    ask_ahead(codes, lines);
    return {codes, codes + lines * kBlockWeights};
  }
  ask_ahead(masks, stream.mask_bytes() / 64);
  if (stream.masks() == Masks::kShared) {
    for (int64_t pair = 0; pair < kPairs; ++pair) {
      ask_ahead(codes);
      codes = expand_block(masks + 8 * pair, codes, buffer + kBlockWeights * pair);
    }
    return {buffer, codes};
  }
  const uint8_t* high = codes;
  for (int64_t pair = 0; pair < kPairs; ++pair) {
    uint8_t* const out = buffer + 2 * kBlockWeights * pair;
    ask_ahead(codes, int8 ? 2 : 1);
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

/// Four bytes of x beside every four codes.
template <Code kCode, bool kVnni>
inline __m256i input_of(const uint8_t* x) {
  const __m256i input = _mm256_set1_epi32(read_unaligned<int32_t>(x));
  return kCode == Code::kInt8 && !kVnni ? _mm256_xor_si256(input, _mm256_set1_epi8(-128)) : input;
}

/// Adds products, four neighbours together; four-bit codes without VNNI: two, in 16 bits.
template <Code kCode, bool kVnni>
inline void add_products(__m256i& sum, __m256i w, __m256i input) {
  if constexpr (kVnni) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(input), "x"(w));
  } else if constexpr (kCode == Code::kInt4) {
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(input, w));
  } else {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(input, w));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
}

/// Adds codes, two neighbours together in 16 bits, for offset_of().
inline void add_codes(__m256i& sum, __m256i w) {
  sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(_mm256_set1_epi8(1), w));
}

/// What 128 more in every x would have added.
inline __m256i offset_of(__m256i code_sums) {
  return _mm256_slli_epi32(_mm256_madd_epi16(code_sums, _mm256_set1_epi16(1)), 7);
}

/// Sums of add_products() in 32 bits.
template <Code kCode, bool kVnni>
inline __m256i whole_of(__m256i sum) {
  return kCode == Code::kInt4 && !kVnni ? _mm256_madd_epi16(sum, _mm256_set1_epi16(1)) : sum;
}

/// Sums of one half of a chunk's columns: for 8 rows from `bytes`, each token.
/// @tparam kTwo  pairs are two blocks
template <Code kCode, bool kTwo, bool kVnni, int kHalf, int T>
inline void dot_half(const uint8_t* bytes, const uint8_t* x, int64_t x_stride, __m256i (&sums)[T]) {
  __m256i code_sums = _mm256_setzero_si256();
  for (int t = 0; t < T; ++t) sums[t] = _mm256_setzero_si256();
  for (int64_t pair = 0; pair < kPairs; ++pair) {
    const uint8_t* block = bytes + kBlockWeights * (kTwo ? 2 * pair + kHalf : pair);
    const __m256i w =
        codes_of<kCode, kHalf>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(block)));
    if constexpr (kCode == Code::kInt8 && !kVnni) add_codes(code_sums, w);
    for (int t = 0; t < T; ++t)
      add_products<kCode, kVnni>(
          sums[t], w,
          input_of<kCode, kVnni>(x + t * x_stride + kChunk / 2 * kHalf + kBlockColumns * pair));
  }
  for (int t = 0; t < T; ++t) {
    sums[t] = whole_of<kCode, kVnni>(sums[t]);
    if constexpr (kCode == Code::kInt8 && !kVnni)
      sums[t] = _mm256_add_epi32(sums[t], offset_of(code_sums));
  }
}

inline __m256 scales_of(const uint8_t* scales) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

/// A chunk's sums of eight rows put to the rows': as integers, or times the scales of their group.
inline void add_chunk(const uint8_t* scales, int64_t sets, int rows, __m256i low, __m256i high,
                      __m256i& whole, __m256& scaled) {
  const auto add = [&](int64_t set, __m256i sum) {
    scaled = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum),
                             scales_of(scales + 2 * (kTileRows * set + 8 * rows)), scaled);
  };
  if (sets == 2) {
    add(0, low);
    add(1, high);
    return;
  }
  const __m256i both = _mm256_add_epi32(low, high);
  if (sets == 1) {
    add(0, both);
  } else {
    whole = _mm256_add_epi32(whole, both);
  }
}

/// The 16 rows' sums of one token.
inline void hand_on(const Stream& stream, int64_t tile, const __m256i (&whole)[2],
                    const __m256 (&scaled)[2], float* sums) {
  alignas(32) int32_t integers[kTileRows];
  alignas(32) float floats[kTileRows];
  for (int rows = 0; rows < 2; ++rows) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(integers + 8 * rows), whole[rows]);
    _mm256_store_ps(floats + 8 * rows, scaled[rows]);
  }
  for (int64_t r = 0; r < kTileRows; ++r)
    sums[r] = without_offset(stream, tile, r,
                             stream.scale_sets() ? double{floats[r]} : double(integers[r]));
}

template <Code kCode, bool kTwo, bool kVnni, int T>
void tile_of(const Stream& stream, int64_t tile, const uint8_t* x, int64_t x_stride, float* sums) {
  alignas(32) uint8_t buffer[kBlocks * kBlockWeights];
  const int64_t chunks = stream.chunks(), sets = stream.scale_sets();
  __m256i whole[T][2];
  __m256 scaled[T][2];
  for (int t = 0; t < T; ++t)
    for (int rows = 0; rows < 2; ++rows) {
      whole[t][rows] = _mm256_setzero_si256();
      scaled[t][rows] = _mm256_setzero_ps();
    }
  const uint8_t* at = stream.chunks_of(tile);
  for (int64_t chunk = 0; chunk < chunks; ++chunk, x += kChunk) {
    const uint8_t* const scales = at + stream.mask_bytes();
    const Expanded expanded = expand_chunk(stream, at, buffer);
    for (int rows = 0; rows < 2; ++rows) {
      const uint8_t* const bytes = expanded.bytes + 32 * rows;
      __m256i low[T], high[T];
      dot_half<kCode, kTwo, kVnni, 0>(bytes, x, x_stride, low);
      dot_half<kCode, kTwo, kVnni, 1>(bytes, x, x_stride, high);
      for (int t = 0; t < T; ++t)
        add_chunk(scales, sets, rows, low[t], high[t], whole[t][rows], scaled[t][rows]);
    }
    at = expanded.next;
  }
  for (int t = 0; t < T; ++t) hand_on(stream, tile, whole[t], scaled[t], sums + t * kTileRows);
}

/// A chunk's codes 32 at a time, in the order of use: of each pair the lower columns' 16 rows, then
/// the upper ones'.
template <Code kCode, Masks kMasks>
class ChunkCodesInOrder {
 public:
  ChunkCodesInOrder(const uint8_t* masks, const uint8_t* codes)
      : masks_(masks), more_masks_(masks + 8 * kPairs), codes_(codes), more_codes_(codes) {}

  /// low[i], high[i]: rows 8 i .. 8 i + 7 of a pair's two halves.
  inline void take(__m256i (&low)[2], __m256i (&high)[2]) {
    ask_ahead(codes_, kCode == Code::kInt8 ? 2 : 1);  // what a pair takes at most
    if constexpr (kCode == Code::kInt4 && kMasks != Masks::kOwn) {
      for (int i = 0; i < 2; ++i) {
        const __m256i both = next(masks_, codes_);
        low[i] = codes_of<kCode, 0>(both);
        high[i] = codes_of<kCode, 1>(both);
      }
    } else {
      for (int i = 0; i < 2; ++i) low[i] = codes_of<kCode, 0>(next(masks_, codes_));
      const uint8_t*& others = kCode == Code::kInt4 ? more_codes_ : codes_;
      for (int i = 0; i < 2; ++i) high[i] = codes_of<kCode, 1>(next(more_masks_, others));
    }
  }
  const uint8_t* end() const { return std::max(codes_, more_codes_); }

 private:
  static inline __m256i next(const uint8_t*& masks, const uint8_t*& codes) {
    if constexpr (kMasks != Masks::kNone) return expand32(masks, codes);
    codes += 32;
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes - 32));
  }

  const uint8_t *masks_, *more_masks_, *codes_, *more_codes_;
};

/// One token: codes meet x as soon as they are expanded, in registers.
template <Code kCode, Masks kMasks, bool kVnni>
void tile_of_one(const Stream& stream, int64_t tile, const uint8_t* x, float* sums) {
  constexpr bool kOffset = kCode == Code::kInt8 && !kVnni;
  const int64_t chunks = stream.chunks(), sets = stream.scale_sets();
  const __m256i zero = _mm256_setzero_si256();
  __m256i whole[2] = {zero, zero};
  __m256 scaled[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  const uint8_t* at = stream.chunks_of(tile);
  for (int64_t chunk = 0; chunk < chunks; ++chunk, x += kChunk) {
    const uint8_t* const scales = at + stream.mask_bytes();
    ask_ahead(at, stream.mask_bytes() / 64);
    ChunkCodesInOrder<kCode, kMasks> codes(at, scales + 2 * kTileRows * sets);
    __m256i low[2] = {zero, zero}, high[2] = {zero, zero};
    __m256i low_codes[2] = {zero, zero}, high_codes[2] = {zero, zero};
    for (int64_t pair = 0; pair < kPairs; ++pair) {
      const __m256i low_x = input_of<kCode, kVnni>(x + kBlockColumns * pair);
      const __m256i high_x = input_of<kCode, kVnni>(x + kChunk / 2 + kBlockColumns * pair);
      __m256i low_w[2], high_w[2];
      codes.take(low_w, high_w);
      for (int i = 0; i < 2; ++i) {
        add_products<kCode, kVnni>(low[i], low_w[i], low_x);
        add_products<kCode, kVnni>(high[i], high_w[i], high_x);
        if constexpr (kOffset) {
          add_codes(low_codes[i], low_w[i]);
          add_codes(high_codes[i], high_w[i]);
        }
      }
    }
    for (int i = 0; i < 2; ++i) {
      low[i] = whole_of<kCode, kVnni>(low[i]);
      high[i] = whole_of<kCode, kVnni>(high[i]);
      if constexpr (kOffset) {
        low[i] = _mm256_add_epi32(low[i], offset_of(low_codes[i]));
        high[i] = _mm256_add_epi32(high[i], offset_of(high_codes[i]));
      }
      add_chunk(scales, sets, i, low[i], high[i], whole[i], scaled[i]);
    }
    at = codes.end();
  }
  hand_on(stream, tile, whole, scaled, sums);
}

template <Code kCode, Masks kMasks, bool kVnni>
void tile_for(const Stream& stream, int64_t tile, const uint8_t* x, int64_t x_stride,
              int64_t tokens, float* sums) {
  constexpr bool kTwo = kCode == Code::kInt8 || kMasks == Masks::kOwn;
  // Four tokens at a time: more sums than that don't fit the 16 registers.
  for (; tokens >= 4; tokens -= 4, x += 4 * x_stride, sums += 4 * kTileRows)
    tile_of<kCode, kTwo, kVnni, 4>(stream, tile, x, x_stride, sums);
  for (; tokens >= 2; tokens -= 2, x += 2 * x_stride, sums += 2 * kTileRows)
    tile_of<kCode, kTwo, kVnni, 2>(stream, tile, x, x_stride, sums);
  if (tokens > 0) tile_of_one<kCode, kMasks, kVnni>(stream, tile, x, sums);
}

template <Code kCode, bool kVnni>
void tile_of_masks(const Stream& stream, int64_t tile, const uint8_t* x, int64_t x_stride,
                   int64_t tokens, float* sums) {
  switch (stream.masks()) {
    case Masks::kNone:
      return tile_for<kCode, Masks::kNone, kVnni>(stream, tile, x, x_stride, tokens, sums);
    case Masks::kShared:
      return tile_for<kCode, Masks::kShared, kVnni>(stream, tile, x, x_stride, tokens, sums);
    case Masks::kOwn:
      return tile_for<kCode, Masks::kOwn, kVnni>(stream, tile, x, x_stride, tokens, sums);
  }
}

template <bool kVnni>
void tile(const Stream& stream, int64_t index, const uint8_t* x, int64_t x_stride, int64_t tokens,
          float* sums) {
  if (stream.code() == Code::kInt8)
    return tile_of_masks<Code::kInt8, kVnni>(stream, index, x, x_stride, tokens, sums);
  return tile_of_masks<Code::kInt4, kVnni>(stream, index, x, x_stride, tokens, sums);
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
