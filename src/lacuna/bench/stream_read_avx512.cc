#include <immintrin.h>

#include "lacuna/bench/stream_read.h"

namespace lacuna::bench {

uint64_t sum_words_avx512(const uint64_t* words, size_t count) {
  constexpr size_t kStep = 32;  // four cache lines, four sums that don't wait for each other
  __m512i sums[4] = {};
  size_t i = 0;
  for (; i + kStep <= count; i += kStep)
    for (int lane = 0; lane < 4; ++lane)
      sums[lane] = _mm512_add_epi64(sums[lane], _mm512_loadu_si512(words + i + 8 * lane));
  uint64_t lanes[8];
  _mm512_storeu_si512(lanes, _mm512_add_epi64(_mm512_add_epi64(sums[0], sums[1]),
                                              _mm512_add_epi64(sums[2], sums[3])));
  uint64_t sum = 0;
  for (const uint64_t lane : lanes) sum += lane;
  for (; i < count; ++i) sum += words[i];
  return sum;
}

}  // namespace lacuna::bench
