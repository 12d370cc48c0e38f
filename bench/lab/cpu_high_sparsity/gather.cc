// What a non-zero of a very sparse row costs when everything lies in the nearest cache: 16 rows
// side by side, for the forms of stream and the numbers of tokens that kernels/linear_csr was
// chosen from.
//
//   g++ -std=c++20 -O3 -march=native -mprefer-vector-width=512 gather.cc -o gather && ./gather [K]
//
// Prints core cycles a step of 16 non-zeros, the least of 400 runs (a chain of additions tells the
// clock). Every variant's sums are compared with plain ones first.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

namespace {

constexpr int kLanes = 16, kMostTokens = 16;

/// The same 16 rows in each form, all of `steps` non-zeros.
struct Rows {
  int64_t steps = 0;
  std::vector<uint32_t> words;  // value (bf16) and column in 32 bits
  std::vector<uint8_t> gaps;    // 16 gaps of 8 bits, 16 values of bf16
  std::vector<float> apart;     // x [T][K]
  std::vector<float> pairs;     // x [T/2][K][2]
  std::vector<float> together;  // x [K][T]
  int64_t columns = 0;
};

uint64_t ticks() {
  unsigned core;
  return __rdtscp(&core);
}

struct Step {
  __m512i columns;
  __m512 values;
};

/// Walks the gaps.
class Gaps {
 public:
  explicit Gaps(const Rows& rows) : at_(rows.gaps.data()) {}
  Step next() {
    columns_ = _mm512_add_epi32(
        columns_, _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at_))));
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at_ + kLanes));
    at_ += 48;
    return {columns_, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
  }

 private:
  const uint8_t* at_;
  __m512i columns_ = _mm512_setzero_si512();
};

// Every variant writes sums[token * 16 + lane].

void words_gather(const Rows& rows, float* sums) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const __m512i low = _mm512_set1_epi32(0xffff);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t s = 0; s < rows.steps; ++s) {
    const __m512i word = _mm512_loadu_si512(rows.words.data() + kLanes * s);
    const __m512 x = _mm512_i32gather_ps(_mm512_and_si512(word, low), rows.apart.data(), 4);
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(word, high)), x, sum);
  }
  _mm512_storeu_ps(sums, sum);
}

template <int T>
void gaps_gather(const Rows& rows, float* sums) {
  __m512 sum[T] = {};
  Gaps gaps(rows);
  for (int64_t s = 0; s < rows.steps; ++s) {
    const Step step = gaps.next();
    for (int t = 0; t < T; ++t)
      sum[t] = _mm512_fmadd_ps(
          step.values, _mm512_i32gather_ps(step.columns, rows.apart.data() + t * rows.columns, 4),
          sum[t]);
  }
  for (int t = 0; t < T; ++t) _mm512_storeu_ps(sums + kLanes * t, sum[t]);
}

/// 64 bits a lane: x of two tokens.
template <int P>
void gaps_gather_pairs(const Rows& rows, float* sums) {
  const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  const __m512i twice_high = _mm512_add_epi32(twice, _mm512_set1_epi32(8));
  __m512 sum[P][2] = {};
  Gaps gaps(rows);
  for (int64_t s = 0; s < rows.steps; ++s) {
    const Step step = gaps.next();
    const __m512 low = _mm512_permutexvar_ps(twice, step.values);
    const __m512 high = _mm512_permutexvar_ps(twice_high, step.values);
    for (int p = 0; p < P; ++p) {
      const float* x = rows.pairs.data() + p * 2 * rows.columns;
      const auto gathered = [&](__m256i columns) {
        return _mm512_castpd_ps(_mm512_i32gather_pd(columns, x, 8));
      };
      sum[p][0] = _mm512_fmadd_ps(low, gathered(_mm512_castsi512_si256(step.columns)), sum[p][0]);
      sum[p][1] =
          _mm512_fmadd_ps(high, gathered(_mm512_extracti64x4_epi64(step.columns, 1)), sum[p][1]);
    }
  }
  for (int p = 0; p < P; ++p)
    for (int lane = 0; lane < kLanes; ++lane)
      for (int t = 0; t < 2; ++t)
        sums[(2 * p + t) * kLanes + lane] =
            reinterpret_cast<const float*>(&sum[p][lane / 8])[lane % 8 * 2 + t];
}

/// No gather: one load brings a column's x of 16 tokens, the lane's value is broadcast.
void gaps_broadcast_16(const Rows& rows, float* sums) {
  __m512 sum[kLanes] = {};
  Gaps gaps(rows);
  for (int64_t s = 0; s < rows.steps; ++s) {
    const Step step = gaps.next();
    alignas(64) uint32_t columns[kLanes];
    _mm512_store_si512(columns, step.columns);
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes; ++lane)
      sum[lane] = _mm512_fmadd_ps(
          _mm512_permutexvar_ps(_mm512_set1_epi32(lane), step.values),
          _mm512_loadu_ps(rows.together.data() + size_t{columns[lane]} * kMostTokens), sum[lane]);
  }
  for (int lane = 0; lane < kLanes; ++lane)
    for (int t = 0; t < kMostTokens; ++t)
      sums[t * kLanes + lane] = reinterpret_cast<const float*>(&sum[lane])[t];
}

void scalar(const Rows& rows, float* sums) {
  float sum[kLanes] = {};
  for (int64_t s = 0; s < rows.steps; ++s)
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint32_t word = rows.words[static_cast<size_t>(s * kLanes + lane)];
      const uint32_t bits = word & 0xffff0000u;
      float value;
      std::memcpy(&value, &bits, 4);
      sum[lane] += value * rows.apart[word & 0xffff];
    }
  std::copy(sum, sum + kLanes, sums);
}

Rows make(int64_t columns, double density) {
  std::mt19937 random(1);
  Rows rows;
  rows.steps = std::max<int64_t>(1, std::llround(density * static_cast<double>(columns)));
  rows.columns = columns;
  rows.words.resize(static_cast<size_t>(rows.steps * kLanes));
  rows.gaps.resize(static_cast<size_t>(rows.steps * 48));
  for (int lane = 0; lane < kLanes; ++lane) {
    std::vector<uint32_t> all(static_cast<size_t>(columns));
    std::iota(all.begin(), all.end(), 0u);
    // The first try without a gap over 255.
    std::vector<uint32_t> kept;
    for (bool fits = false; !fits;) {
      std::shuffle(all.begin(), all.end(), random);
      kept.assign(all.begin(), all.begin() + rows.steps);
      std::sort(kept.begin(), kept.end());
      fits = kept[0] <= 255;
      for (size_t i = 1; i < kept.size(); ++i) fits &= kept[i] - kept[i - 1] <= 255;
    }
    for (int64_t s = 0; s < rows.steps; ++s) {
      const auto i = static_cast<size_t>(s);
      const uint16_t value = static_cast<uint16_t>(0x3f80 + (random() & 0x807f));
      rows.words[i * kLanes + lane] = uint32_t{value} << 16 | kept[i];
      rows.gaps[i * 48 + lane] = static_cast<uint8_t>(kept[i] - (i ? kept[i - 1] : 0));
      std::memcpy(&rows.gaps[i * 48 + kLanes + 2 * lane], &value, 2);
    }
  }
  const size_t size = static_cast<size_t>(columns * kMostTokens);
  rows.apart.resize(size), rows.pairs.resize(size), rows.together.resize(size);
  for (int64_t k = 0; k < columns; ++k)
    for (int t = 0; t < kMostTokens; ++t) {
      const float x = static_cast<float>(random() % 17) - 8;
      rows.apart[static_cast<size_t>(t * columns + k)] = x;
      rows.pairs[static_cast<size_t>((t / 2 * columns + k) * 2 + t % 2)] = x;
      rows.together[static_cast<size_t>(k * kMostTokens + t)] = x;
    }
  return rows;
}

/// One product at a time, from the words.
bool right(const Rows& rows, int tokens, const float* sums) {
  for (int t = 0; t < tokens; ++t)
    for (int lane = 0; lane < kLanes; ++lane) {
      double sum = 0, size = 0;
      for (int64_t s = 0; s < rows.steps; ++s) {
        const uint32_t word = rows.words[static_cast<size_t>(s * kLanes + lane)];
        const uint32_t bits = word & 0xffff0000u;
        float value;
        std::memcpy(&value, &bits, 4);
        const double term =
            double{value} * rows.apart[static_cast<size_t>(t * rows.columns + (word & 0xffff))];
        sum += term;
        size += std::fabs(term);
      }
      const double n = static_cast<double>(rows.steps) * 0x1p-24;
      if (!(std::fabs(sums[t * kLanes + lane] - sum) <= n / (1 - n) * size)) return false;
    }
  return true;
}

double cycles_per_tick() {
  double best = 0;
  for (int i = 0; i < 20; ++i) {
    constexpr int kAdditions = 1000000;
    uint64_t chain = 1;
    const uint64_t start = ticks();
    for (int j = 0; j < kAdditions; ++j) asm volatile("add $1, %0" : "+r"(chain));
    best = std::max(best, kAdditions / static_cast<double>(ticks() - start));
  }
  return best;
}

struct Variant {
  const char* name;
  int tokens;
  void (*run)(const Rows& rows, float* sums);
};
const Variant kVariants[] = {{"words, scalar loads", 1, scalar},
                             {"words, gather", 1, words_gather},
                             {"gaps, gather", 1, gaps_gather<1>},
                             {"gaps, gather", 2, gaps_gather<2>},
                             {"gaps, gather", 4, gaps_gather<4>},
                             {"gaps, gather pairs", 2, gaps_gather_pairs<1>},
                             {"gaps, gather pairs", 4, gaps_gather_pairs<2>},
                             {"gaps, gather pairs", 8, gaps_gather_pairs<4>},
                             {"gaps, broadcast", 16, gaps_broadcast_16}};

}  // namespace

int main(int argc, char** argv) {
  const int64_t columns = argc > 1 ? std::atoll(argv[1]) : 4096;
  if (columns < 256 || columns > 65536) return std::fprintf(stderr, "K: 256 to 65536\n"), 2;
  const double scale = cycles_per_tick();
  for (const double density : {0.2, 0.1, 0.05}) {
    const Rows rows = make(columns, density);
    for (const Variant& variant : kVariants) {
      std::vector<float> sums(kLanes * kMostTokens);
      variant.run(rows, sums.data());
      if (!right(rows, variant.tokens, sums.data()))
        return std::fprintf(stderr, "%s: wrong sums\n", variant.name), 1;
      uint64_t least = ~uint64_t{0};
      for (int run = 0; run < 400; ++run) {
        const uint64_t start = ticks();
        variant.run(rows, sums.data());
        least = std::min(least, ticks() - start);
      }
      std::printf("K %lld, %2.0f %% kept  %-20s T=%-2d %6.1f cycles a step\n",
                  static_cast<long long>(columns), 100 * density, variant.name, variant.tokens,
                  scale * static_cast<double>(least) / static_cast<double>(rows.steps));
    }
  }
}
