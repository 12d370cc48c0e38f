// A step of 16 rows is one addition of gaps, one gather of x and one multiply-add; no sum runs
// across lanes.
//
//   step     |16 gaps |16 values          |    48 bytes, read front to back
//   columns  += gaps                           16 x 32 bits
//   x        gathered, 4 bytes each            two tokens: 8 bytes each, in two gathers of 8 lanes
//
// Bytes: 3 a non-zero, from memory once. Cycles: 9.4 a step at one token and 10 for each pair of
// several, as many as the gathers take; bench/lab/cpu_high_sparsity says what else was tried.
// g++ 12 warns of its own "undefined" operands inside its intrinsics.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "lacuna/format/lanes_avx512.h"
#include "lacuna/kernels/linear_csr/cpu.h"

namespace lacuna::kernels::linear_csr {
namespace {

template <DType kType>
LACUNA_INLINE __m512 load_values(const uint8_t* at) {
  if constexpr (kType == DType::kF32) {
    return _mm512_loadu_ps(at);
  } else {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    if constexpr (kType == DType::kF16) return _mm512_cvtph_ps(raw);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
  }
}

/// The steps of a slice.
template <DType kType>
class Walk {
 public:
  static constexpr int64_t kStep = kLanes * (kType == DType::kF32 ? 5 : 3);
  Walk(const format::RowsView& rows, int64_t slice)
      : at_(rows.slices + rows.slice_steps[slice] * kStep),
        end_(rows.slices + rows.slice_steps[slice + 1] * kStep) {}
  LACUNA_INLINE_MEMBER bool next(__m512i& columns, __m512& values) {
    if (at_ == end_) return false;
    _mm_prefetch(at_ + kAheadBytes, _MM_HINT_T0);
    columns = _mm512_add_epi32(
        columns, _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at_))));
    values = load_values<kType>(at_ + kLanes);
    at_ += kStep;
    return true;
  }

 private:
  const uint8_t *at_, *end_;
};

template <DType kType>
void one_token(const format::RowsView& rows, int64_t slice, const float* x, float* sums) {
  Walk<kType> walk(rows, slice);
  __m512i columns = _mm512_setzero_si512();
  __m512 sum = _mm512_setzero_ps(), w;
  while (walk.next(columns, w)) sum = _mm512_fmadd_ps(w, _mm512_i32gather_ps(columns, x, 4), sum);
  _mm512_storeu_ps(sums, sum);
}

/// Lanes 0..7 and 8..15 apart: their x of two tokens fill a register.
template <DType kType, int P>
void pairs(const format::RowsView& rows, int64_t slice, const PreparedX& x, float* sums) {
  const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  const __m512i twice_high = _mm512_add_epi32(twice, _mm512_set1_epi32(8));
  Walk<kType> walk(rows, slice);
  __m512i columns = _mm512_setzero_si512();
  __m512 low[P], high[P], w;
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) low[p] = high[p] = _mm512_setzero_ps();
  while (walk.next(columns, w)) {
    const __m512 w_low = _mm512_permutexvar_ps(twice, w);
    const __m512 w_high = _mm512_permutexvar_ps(twice_high, w);
    const __m256i c_low = _mm512_castsi512_si256(columns);
    const __m256i c_high = _mm512_extracti64x4_epi64(columns, 1);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const float* from = x.data + p * x.pair_stride;
      low[p] =
          _mm512_fmadd_ps(w_low, _mm512_castpd_ps(_mm512_i32gather_pd(c_low, from, 8)), low[p]);
      high[p] =
          _mm512_fmadd_ps(w_high, _mm512_castpd_ps(_mm512_i32gather_pd(c_high, from, 8)), high[p]);
    }
  }
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
    _mm512_storeu_ps(sums + 2 * p * kLanes, _mm512_permutex2var_ps(low[p], even, high[p]));
    _mm512_storeu_ps(sums + (2 * p + 1) * kLanes, _mm512_permutex2var_ps(low[p], odd, high[p]));
  }
}

template <DType kType>
void kernel(const format::RowsView& rows, int64_t slice, const PreparedX& x, int64_t tokens,
            float* sums) {
  switch (tokens) {
    case 1:
      return one_token<kType>(rows, slice, x.data, sums);
    case 2:
      return pairs<kType, 1>(rows, slice, x, sums);
    case 4:
      return pairs<kType, 2>(rows, slice, x, sums);
    case 6:
      return pairs<kType, 3>(rows, slice, x, sums);
    default:
      return pairs<kType, 4>(rows, slice, x, sums);
  }
}

}  // namespace

const SliceKernels kAvx512Gather = {kernel<DType::kF32>, kernel<DType::kBF16>, kernel<DType::kF16>};

}  // namespace lacuna::kernels::linear_csr
