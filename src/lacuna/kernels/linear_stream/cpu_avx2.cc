// A chunk is expanded into a buffer of 2 KiB, 8 mask bits at a time (a shuffle from a table), and
// meets every token there.
#include "lacuna/format/lanes_avx2.h"
#include "lacuna/kernels/linear_stream/cpu.h"

namespace lacuna::kernels::linear_stream {
namespace {

using stream::kValueBlocks;
using stream::kValueMaskBytes;

/// Blocks as words, lane r of block b: columns 2b and 2b + 1 of row r.
struct alignas(64) Buffer {
  uint16_t blocks[kValueBlocks][2 * kTileRows];
};

/// @return the chunk behind
LACUNA_INLINE const uint8_t* expand(const uint8_t* chunk, Buffer& out) {
  const uint8_t* next = chunk + kValueMaskBytes;
  auto* to = reinterpret_cast<__m128i*>(&out);
  for (int64_t i = 0; i < kValueMaskBytes; ++i) {
    const auto packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(next));
    stream::ask_near(next);
    _mm_store_si128(to + i, format::avx2::expand_u16(chunk[i], packed));
    next += 2 * static_cast<int64_t>(_mm_popcnt_u32(chunk[i]));
  }
  return next;
}

/// The even or the odd columns of 8 rows.
template <DType kType, bool kOdd>
LACUNA_INLINE __m256 columns(__m256i words) {
  if constexpr (kType == DType::kBF16) {
    if constexpr (kOdd)
      return _mm256_castsi256_ps(
          _mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
    return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
  } else {
    const __m256i halves =
        kOdd ? _mm256_srli_epi32(words, 16) : _mm256_and_si256(words, _mm256_set1_epi32(0xffff));
    return _mm256_cvtph_ps(
        _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1)));
  }
}

/// Even and odd sums of 16 rows with one token, between chunks.
struct alignas(64) Sums {
  float even[kTileRows], odd[kTileRows];
};

template <DType kType, int T>
LACUNA_INLINE void multiply(const Buffer& buffer, const float* x, int64_t x_stride, Sums* sums) {
  __m256 even[T][2], odd[T][2];
#pragma GCC unroll 2
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      even[t][h] = _mm256_load_ps(sums[t].even + 8 * h);
      odd[t][h] = _mm256_load_ps(sums[t].odd + 8 * h);
    }
  for (int64_t b = 0; b < kValueBlocks; ++b)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m256i words =
          _mm256_load_si256(reinterpret_cast<const __m256i*>(buffer.blocks[b] + 16 * h));
      const __m256 w_even = columns<kType, false>(words), w_odd = columns<kType, true>(words);
#pragma GCC unroll 2
      for (int t = 0; t < T; ++t) {
        const float* input = x + t * x_stride + 2 * b;
        even[t][h] = _mm256_fmadd_ps(w_even, _mm256_broadcast_ss(input), even[t][h]);
        odd[t][h] = _mm256_fmadd_ps(w_odd, _mm256_broadcast_ss(input + 1), odd[t][h]);
      }
    }
#pragma GCC unroll 2
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      _mm256_store_ps(sums[t].even + 8 * h, even[t][h]);
      _mm256_store_ps(sums[t].odd + 8 * h, odd[t][h]);
    }
}

template <DType kType>
void kernel(const format::RowsView& rows, int64_t tile, int64_t, const void* input, int64_t tokens,
            float* out) {
  const auto* x = static_cast<const float*>(input);
  const int64_t stride = x_stride(rows.columns);
  Sums sums[kMostTokens] = {};
  Buffer buffer;
  const uint8_t* next = rows.stream + rows.stream_offsets[tile];
  for (int64_t left = stream::chunk_count(rows.columns); left > 0; --left, x += kChunk) {
    next = expand(next, buffer);
    int64_t t = 0;
    for (; t + 2 <= tokens; t += 2) multiply<kType, 2>(buffer, x + t * stride, stride, sums + t);
    if (t < tokens) multiply<kType, 1>(buffer, x + t * stride, stride, sums + t);
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = 0; r < kTileRows; ++r)
      out[t * kTileRows + r] = sums[t].even[r] + sums[t].odd[r];
}

}  // namespace

const TileKernels kAvx2BufferFma = {kernel<DType::kBF16>, kernel<DType::kF16>};

}  // namespace lacuna::kernels::linear_stream
