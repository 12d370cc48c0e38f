// Core cycles for 64 weight positions of a coded stream that the second-level cache holds, for each
// candidate of this CPU:
//
//   cycles [TOKENS]
//
// The clock of the core is found from a chain of dependent additions, one a cycle.
#include <x86intrin.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "lacuna/core/half.h"
#include "lacuna/core/random.h"
#include "lacuna/format/quantize.h"
#include "lacuna/kernels/linear_coded/linear_coded.h"

using namespace lacuna;                         // NOLINT
using namespace lacuna::kernels::linear_coded;  // NOLINT

namespace {

/// Core cycles for each tick of rdtsc.
double cycles_per_tick() {
  double most = 0;
  for (int round = 0; round < 200; ++round) {
    const uint64_t start = __rdtsc();
    uint64_t sum = 1;
    for (int i = 0; i < 20000; ++i)
      asm volatile("add %0, %0\n add %0, %0\n add %0, %0\n add %0, %0" : "+r"(sum));
    most = std::max(most, 8e4 / static_cast<double>(__rdtsc() - start));
  }
  return most;
}

Stream stream_of(const char* code, double sparsity, bool two_four, Masks masks) {
  constexpr int64_t kRows = 128, kColumns = 4096;
  std::vector<uint16_t> bits(kRows * kColumns);
  for (size_t i = 0; i < bits.size(); ++i) {
    const bool kept = two_four ? i % 4 < 2 : random_uniform(2, 0, i) >= sparsity;
    bits[i] = kept ? float_to_bf16(static_cast<float>(random_uniform(3, 0, i) - 0.4995)) : 0;
  }
  const Tensor w{DType::kBF16, {kRows, kColumns}, Bytes::take(std::move(bits))};
  const auto quantization = *format::Quantization::parse(code);
  if (sparsity == 0) return Stream::pack(format::quantize(w, quantization).value()).value();
  const auto pattern = two_four ? format::Pattern::keep_of(2, 4) : format::Pattern::unstructured();
  const auto matrix = format::quantize(format::compress(w, pattern).value(), quantization).value();
  return Stream::pack(matrix, Executor::serial(), masks).value();
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t tokens = argc > 1 ? std::atoll(argv[1]) : 1;
  const double ratio = cycles_per_tick();
  const auto& cpu = kernels::Device::this_cpu();
  kernels::Problem problem;
  problem.operation = "linear_bitmap";
  problem.values = kernels::Values::kInt8;
  problem.tokens = 1;
  std::vector<uint8_t> x(static_cast<size_t>(tokens * (4096 + 64)), 130);
  std::printf("cycles for 64 positions and %d tokens, %.3f core cycles a tick\n%-14s %5s",
              static_cast<int>(tokens), ratio, "", "bits");
  for (const CodedCandidate& candidate : candidates()) std::printf("  %s", candidate.name.c_str());
  std::printf("\n");
  struct Case {
    const char *code, *name;
    double sparsity;
    Masks masks;
  };
  for (const Case& c :
       {Case{"int4", "0", 0, Masks::kNone}, Case{"int4", "0.5 own", 0.5, Masks::kOwn},
        Case{"int4", "0.6 own", 0.6, Masks::kOwn}, Case{"int4", "0.7 own", 0.7, Masks::kOwn},
        Case{"int4", "0.8 own", 0.8, Masks::kOwn}, Case{"int4", "0.6 shared", 0.6, Masks::kShared},
        Case{"int4", "0.7 shared", 0.7, Masks::kShared},
        Case{"int4", "0.8 shared", 0.8, Masks::kShared}, Case{"int4", "2:4 own", 0.5, Masks::kOwn},
        Case{"int8", "0", 0, Masks::kNone}, Case{"int8", "0.5", 0.5, Masks::kOwn},
        Case{"int8", "0.7", 0.7, Masks::kOwn}}) {
    const Stream stream = stream_of(c.code, c.sparsity, c.name[1] == ':', c.masks);
    const double blocks = static_cast<double>(stream.tiles() * stream.chunks() * kBlocks);
    std::printf("%s %-10s %4.2f", c.code, c.name,
                static_cast<double>(stream.bytes_before(stream.tiles())) / blocks / 8);
    for (const CodedCandidate& candidate : candidates()) {
      if (!candidate.supports(problem, cpu)) {
        std::printf("  %*s", static_cast<int>(candidate.name.size()), "-");
        continue;
      }
      float sums[16 * kTileRows];
      double least = 1e30;
      for (int round = 0; round < (candidate.name == "cpu_portable" ? 3 : 300); ++round) {
        const uint64_t start = __rdtsc();
        for (int64_t tile = 0; tile < stream.tiles(); ++tile)
          candidate.kernel(stream, tile, x.data(), 4096 + 64, tokens, sums);
        least = std::min(least, static_cast<double>(__rdtsc() - start));
      }
      std::printf("  %*.2f", static_cast<int>(candidate.name.size()), least * ratio / blocks);
    }
    std::printf("\n");
  }
}
