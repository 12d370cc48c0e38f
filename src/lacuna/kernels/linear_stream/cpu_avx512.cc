// A block of 16 rows by 2 columns becomes one register (vpexpandw) and meets x of its two columns,
// in every lane: a row's sums grow in its lane.
//
//   stream  |masks of 32 blocks|values|masks ...          read front to back
//   block   |r0: c0 c1|r1: c0 c1| ... |r15: c0 c1|        after expanding
//   even    c0 of every row as float32, times x0          from memory to every lane, which no port
//   odd     c1 of every row as float32, times x1          minds
//
// Bytes: 1/8 + 2 density a weight, each from memory once, in order. What was tried and what lost:
// bench/lab/cpu_linear.
// g++ 12 warns of its own "undefined" operands inside its intrinsics.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "lacuna/kernels/linear_stream/cpu.h"
#include "lacuna/kernels/stream_lanes_avx512.h"

namespace lacuna::kernels::linear_stream {
namespace {

/// Blocks of one turn of the inner loop.
constexpr int kUnrolled = 8;

using stream::ask_far;
using stream::ask_near;
using stream::kValueBlocks;
using stream::kValueMaskBytes;

template <DType kType>
LACUNA_INLINE __m512 even_columns(__m512i block) {
  if constexpr (kType == DType::kF16) return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(block));
  return _mm512_castsi512_ps(_mm512_slli_epi32(block, 16));
}
template <DType kType>
LACUNA_INLINE __m512 odd_columns(__m512i block) {
  if constexpr (kType == DType::kF16)
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(block, 16)));
  return _mm512_castsi512_ps(
      _mm512_and_si512(block, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

/// Three sums a row and token, which its columns meet in turn: with two, the latency of a fused
/// multiply-add is the time of a block; four would not be room for 8 tokens.
constexpr int kSums = 3;

template <DType kType, int T>
void tile_of(const format::RowsView& rows, int64_t tile, const float* x, int64_t stride,
             float* sums) {
  __m512 sum[T][kSums];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 3
    for (int i = 0; i < kSums; ++i) sum[t][i] = _mm512_setzero_ps();
  const uint8_t* next = rows.stream + rows.stream_offsets[tile];
  for (int64_t left = stream::chunk_count(rows.columns); left > 0; --left) {
    const uint8_t* mask = next;
    next += kValueMaskBytes;
    for (int64_t line = 0; line < kValueMaskBytes; line += 64) {
      ask_near(mask + line);
      ask_far(mask + line);
    }
    for (int64_t group = 0; group < kValueBlocks; group += kUnrolled) {
#pragma GCC unroll 8
      for (int b = 0; b < kUnrolled; ++b) {
        if (b % 2 == 0) {  // half a line or less a block
          ask_near(next);
          ask_far(next);
        }
        const __m512i block = stream::take_values(mask + 4 * b, next);
        const __m512 even = even_columns<kType>(block), odd = odd_columns<kType>(block);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          const float* input = x + t * stride + 2 * b;
          __m512 &first = sum[t][2 * b % kSums], &second = sum[t][(2 * b + 1) % kSums];
          first = _mm512_fmadd_ps(even, _mm512_set1_ps(input[0]), first);
          second = _mm512_fmadd_ps(odd, _mm512_set1_ps(input[1]), second);
        }
      }
      mask += 4 * kUnrolled;
      x += 2 * kUnrolled;
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
    _mm512_storeu_ps(sums + t * kTileRows,
                     _mm512_add_ps(_mm512_add_ps(sum[t][0], sum[t][1]), sum[t][2]));
}

template <DType kType>
void kernel(const format::RowsView& rows, int64_t tile, int64_t, const void* input, int64_t tokens,
            float* sums) {
  const auto* x = static_cast<const float*>(input);
  const int64_t stride = x_stride(rows.columns);
  switch (tokens) {
    case 1:
      return tile_of<kType, 1>(rows, tile, x, stride, sums);
    case 2:
      return tile_of<kType, 2>(rows, tile, x, stride, sums);
    case 3:
      return tile_of<kType, 3>(rows, tile, x, stride, sums);
    case 4:
      return tile_of<kType, 4>(rows, tile, x, stride, sums);
    case 5:
      return tile_of<kType, 5>(rows, tile, x, stride, sums);
    case 6:
      return tile_of<kType, 6>(rows, tile, x, stride, sums);
    case 7:
      return tile_of<kType, 7>(rows, tile, x, stride, sums);
    default:
      return tile_of<kType, 8>(rows, tile, x, stride, sums);
  }
}

}  // namespace

const TileKernels kAvx512Fma = {kernel<DType::kBF16>, kernel<DType::kF16>};

}  // namespace lacuna::kernels::linear_stream
