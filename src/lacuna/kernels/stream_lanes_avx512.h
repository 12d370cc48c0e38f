// Streams in AVX-512 registers (stream.h has the layout).
#pragma once

#include "lacuna/format/lanes_avx512.h"
#include "lacuna/kernels/stream.h"

namespace lacuna::kernels::stream {

/// A block of 16-bit values, and on to the next block's. The mask goes from memory straight into
/// its register: over a general register it takes half as long again.
LACUNA_INLINE __m512i take_values(const uint8_t* mask, const uint8_t*& values) {
  __mmask32 lanes;
  asm("kmovd %1, %0" : "=k"(lanes) : "m"(*reinterpret_cast<const uint32_t*>(mask)));
  const __m512i block = format::avx512::expand_u16(lanes, _mm512_loadu_si512(values));
  values += 2 * static_cast<int64_t>(_mm_popcnt_u32(format::avx512::load_mask(mask)));
  return block;
}

/// Between 16 rows and 16 blocks.

/// Lane c of register r becomes lane r of register c.
LACUNA_INLINE void transpose_lanes(__m512i (&v)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  // v[4q + j]: in quarter p, lane 4p + j of rows 4q .. 4q+3.
#pragma GCC unroll 4
  for (int q = 0; q < 16; q += 4) {
    v[q] = _mm512_unpacklo_epi64(t[q], t[q + 2]);
    v[q + 1] = _mm512_unpackhi_epi64(t[q], t[q + 2]);
    v[q + 2] = _mm512_unpacklo_epi64(t[q + 1], t[q + 3]);
    v[q + 3] = _mm512_unpackhi_epi64(t[q + 1], t[q + 3]);
  }
  // A transposed 4 by 4 matrix of quarters for each j.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(v[j], v[j + 4], 0x44);
    const __m512i b = _mm512_shuffle_i32x4(v[j], v[j + 4], 0xee);
    const __m512i c = _mm512_shuffle_i32x4(v[j + 8], v[j + 12], 0x44);
    const __m512i d = _mm512_shuffle_i32x4(v[j + 8], v[j + 12], 0xee);
    t[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    t[j + 4] = _mm512_shuffle_i32x4(a, c, 0xdd);
    t[j + 8] = _mm512_shuffle_i32x4(b, d, 0x88);
    t[j + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = t[i];
}

}  // namespace lacuna::kernels::stream
