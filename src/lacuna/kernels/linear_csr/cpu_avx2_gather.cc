// As in AVX-512, with 8 rows in a register: lanes 0..7 and 8..15 step side by side. A pair of
// tokens takes four gathers of 4 lanes.
#include "lacuna/format/lanes_avx2.h"
#include "lacuna/kernels/linear_csr/cpu.h"

namespace lacuna::kernels::linear_csr {
namespace {

LACUNA_INLINE __m128i load128(const uint8_t* at) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
}

template <DType kType>
LACUNA_INLINE __m256 load_values(const uint8_t* at) {
  if constexpr (kType == DType::kF32) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(at));
  } else {
    const __m128i raw = load128(at);
    if constexpr (kType == DType::kF16) return _mm256_cvtph_ps(raw);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
  }
}

/// One step: columns and values of lanes 0..7 and 8..15.
struct Step {
  __m256i columns[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
  __m256 values[2];
};

template <DType kType>
class Walk {
 public:
  static constexpr int64_t kWidth = kType == DType::kF32 ? 4 : 2;
  static constexpr int64_t kStep = kLanes * (1 + kWidth);
  Walk(const format::RowsView& rows, int64_t slice)
      : at_(rows.slices + rows.slice_steps[slice] * kStep),
        end_(rows.slices + rows.slice_steps[slice + 1] * kStep) {}
  LACUNA_INLINE_MEMBER bool next(Step& step) {
    if (at_ == end_) return false;
    _mm_prefetch(at_ + kAheadBytes, _MM_HINT_T0);
    const __m128i gaps = load128(at_);
    step.columns[0] = _mm256_add_epi32(step.columns[0], _mm256_cvtepu8_epi32(gaps));
    step.columns[1] =
        _mm256_add_epi32(step.columns[1], _mm256_cvtepu8_epi32(_mm_srli_si128(gaps, 8)));
    step.values[0] = load_values<kType>(at_ + kLanes);
    step.values[1] = load_values<kType>(at_ + kLanes + 8 * kWidth);
    at_ += kStep;
    return true;
  }

 private:
  const uint8_t *at_, *end_;
};

template <DType kType>
void one_token(const format::RowsView& rows, int64_t slice, const float* x, float* sums) {
  Walk<kType> walk(rows, slice);
  Step step;
  __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  while (walk.next(step))
    for (int half = 0; half < 2; ++half)
      sum[half] = _mm256_fmadd_ps(step.values[half], _mm256_i32gather_ps(x, step.columns[half], 4),
                                  sum[half]);
  for (int half = 0; half < 2; ++half) _mm256_storeu_ps(sums + 8 * half, sum[half]);
}

/// Two tokens, four lanes in a register.
template <DType kType>
void pair(const format::RowsView& rows, int64_t slice, const float* x, float* sums) {
  const __m256i twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
  const __m256i twice_high = _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7);
  const auto* doubles = reinterpret_cast<const double*>(x);
  Walk<kType> walk(rows, slice);
  Step step;
  __m256 sum[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(),
                   _mm256_setzero_ps()};
  while (walk.next(step))
#pragma GCC unroll 4
    for (int quarter = 0; quarter < 4; ++quarter) {
      const __m256i columns = step.columns[quarter / 2];
      const __m128i four =
          quarter % 2 == 0 ? _mm256_castsi256_si128(columns) : _mm256_extracti128_si256(columns, 1);
      const __m256 w =
          _mm256_permutevar8x32_ps(step.values[quarter / 2], quarter % 2 == 0 ? twice : twice_high);
      sum[quarter] =
          _mm256_fmadd_ps(w, _mm256_castpd_ps(_mm256_i32gather_pd(doubles, four, 8)), sum[quarter]);
    }
  alignas(32) float out[4][8];
  for (int quarter = 0; quarter < 4; ++quarter) _mm256_store_ps(out[quarter], sum[quarter]);
  for (int64_t lane = 0; lane < kLanes; ++lane)
    for (int64_t t = 0; t < 2; ++t) sums[t * kLanes + lane] = out[lane / 4][lane % 4 * 2 + t];
}

template <DType kType>
void kernel(const format::RowsView& rows, int64_t slice, const PreparedX& x, int64_t tokens,
            float* sums) {
  if (tokens == 1) return one_token<kType>(rows, slice, x.data, sums);
  for (int64_t t = 0; t < tokens; t += 2)
    pair<kType>(rows, slice, x.data + t / 2 * x.pair_stride, sums + t * kLanes);
}

}  // namespace

const SliceKernels kAvx2Gather = {kernel<DType::kF32>, kernel<DType::kBF16>, kernel<DType::kF16>};

}  // namespace lacuna::kernels::linear_csr
