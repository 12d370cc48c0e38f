// Decode on the CPU: y = x W^T for few tokens, dense against bitmap and keep:of, every candidate.
//
//   decode N K T THREADS ROUNDS   one table row per (weight, candidate)
//
// Each kind of weight is copied until its copies pass 1.5 GB together, and the copies take turns,
// so no cache serves them. In a round every row runs once, one after the other; the ratio of a row
// is the median over rounds of (fastest dense candidate of that round / the row). All outputs are
// compared with the dense float32-sum candidate before anything is timed.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <memory>
#include <string>
#include <vector>

#include "lacuna/core/half.h"
#include "lacuna/core/random.h"
#include "lacuna/kernels/linear_bitmap/linear_bitmap.h"
#include "lacuna/kernels/linear_dense/linear_dense.h"
#include "lacuna/kernels/linear_nm/linear_nm.h"

using namespace lacuna;  // NOLINT

namespace {

/// LACUNA_LAB_ROTATE overrides it: 0 keeps one copy, to see the loop without the memory.
const double kRotatedBytes =
    std::getenv("LACUNA_LAB_ROTATE") ? std::atof(std::getenv("LACUNA_LAB_ROTATE")) : 1.5e9;

struct Kind {
  std::string name;
  std::vector<Tensor> dense;
  std::vector<format::CompactRows> compact;
  std::vector<format::RowsView> views;
  double bytes = 0;
};

/// bf16 normals; `kept(row, column)` decides what stays.
template <class Kept>
Tensor random_weight(int64_t n, int64_t k, Kept kept) {
  std::vector<uint16_t> bits(static_cast<size_t>(n * k));
  for (int64_t i = 0; i < n * k; ++i)
    if (kept(i))
      bits[static_cast<size_t>(i)] = float_to_bf16(
          static_cast<float>(random_uniform(1, 0, static_cast<uint64_t>(i)) - 0.5) + 1e-3f);
  return {DType::kBF16, {n, k}, Bytes::take(std::move(bits))};
}

Bytes copy_of(const Bytes& bytes) {
  return Bytes::take(std::vector<std::byte>(bytes.span().begin(), bytes.span().end()));
}

Kind make_kind(const std::string& name, int64_t n, int64_t k) {
  Kind kind{.name = name};
  if (name == "dense") {
    const Tensor weight = random_weight(n, k, [](int64_t) { return true; });
    kind.bytes = static_cast<double>(weight.bytes.size());
    do {
      kind.dense.push_back({weight.dtype, weight.shape, copy_of(weight.bytes)});
      kind.views.push_back(format::dense_rows(kind.dense.back().bytes.data(), DType::kBF16, n, k));
    } while (static_cast<double>(kind.dense.size()) * kind.bytes < kRotatedBytes);
    return kind;
  }
  const bool two_four = name == "2:4";
  const double sparsity = two_four ? 0.5 : std::atof(name.c_str());
  const Tensor weight = random_weight(n, k, [&](int64_t i) {
    if (two_four) {  // two different columns of the four
      const uint64_t r = random_bits(3, 0, static_cast<uint64_t>(i / 4)) % 12;
      const auto first = static_cast<int64_t>(r / 3);
      const int64_t second = (first + 1 + static_cast<int64_t>(r % 3)) % 4;
      return i % 4 == first || i % 4 == second;
    }
    return random_uniform(2, 0, static_cast<uint64_t>(i)) >= sparsity;
  });
  const auto pattern = two_four ? format::Pattern::keep_of(2, 4) : format::Pattern::unstructured();
  const auto matrix = format::compress(weight, pattern).value();
  kind.bytes = static_cast<double>(matrix.size_bytes());
  do {
    format::CompactMatrix copy = matrix;
    copy.bitmap = copy_of(matrix.bitmap);
    copy.values = copy_of(matrix.values);
    kind.compact.push_back(format::CompactRows::make(std::move(copy)).value());
    kind.views.push_back(kind.compact.back().view());
  } while (static_cast<double>(kind.compact.size()) * kind.bytes < kRotatedBytes);
  return kind;
}

struct Entry {
  const Kind* kind;
  const kernels::LinearCandidate* candidate;
  std::vector<double> ms;
};

/// Milliseconds. One thread counts its own time on the CPU, which what else runs there disturbs
/// less.
double now_ms(bool own_time) {
  timespec time{};
  clock_gettime(own_time ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) * 1e3 + static_cast<double>(time.tv_nsec) / 1e6;
}

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 6) return std::fprintf(stderr, "usage: decode N K T THREADS ROUNDS [KIND...]\n"), 2;
  const int64_t n = std::atoll(argv[1]), k = std::atoll(argv[2]), tokens = std::atoll(argv[3]);
  const int threads = std::atoi(argv[4]), rounds = std::atoi(argv[5]);
  std::vector<std::string> names(argv + 6, argv + argc);
  if (names.empty()) names = {"dense", "0.5", "0.6", "0.7", "0.8", "2:4"};
  ThreadPool pool(threads);
  const Executor executor = threads == 1 ? Executor::serial() : pool.executor();

  std::vector<uint16_t> x(static_cast<size_t>(tokens * k)), y(static_cast<size_t>(tokens * n));
  for (size_t i = 0; i < x.size(); ++i)
    x[i] = float_to_bf16(static_cast<float>(random_normal(7, 0, i)));
  const format::RowProduct product{.dtype = DType::kBF16,
                                   .tokens = tokens,
                                   .x = x.data(),
                                   .x_stride = k,
                                   .y = y.data(),
                                   .y_stride = n};
  std::vector<std::byte> workspace;

  std::vector<std::unique_ptr<Kind>> kinds;
  std::vector<Entry> entries;
  for (const std::string& name : names) {
    kinds.push_back(std::make_unique<Kind>(make_kind(name, n, k)));
    const auto& list = name == "dense" ? kernels::linear_dense::candidates()
                       : name == "2:4" ? kernels::linear_nm::candidates()
                                       : kernels::linear_bitmap::candidates();
    const kernels::Problem problem{.values = kernels::Values::kBF16,
                                   .activations = DType::kBF16,
                                   .outputs = n,
                                   .inputs = k,
                                   .tokens = tokens,
                                   .pattern = name == "dense" ? format::Pattern{}
                                              : name == "2:4" ? format::Pattern::keep_of(2, 4)
                                                              : format::Pattern::unstructured()};
    std::vector<double> want(y.size()), sums(y.size());
    format::reference_row_product(kinds.back()->views[0], product, want.data(), sums.data());
    for (const auto& candidate : list) {
      if (candidate.name == "reference" || candidate.name == "cpu_portable" ||
          !candidate.supports(problem, kernels::Device::this_cpu()))
        continue;
      workspace.resize(std::max(workspace.size(), candidate.workspace_bytes(problem)));
      candidate.run(kinds.back()->views[0], product, workspace.data(), executor);
      for (size_t i = 0; i < y.size(); ++i)
        if (!(std::fabs(bf16_to_float(y[i]) - want[i]) <=
              0x1p-8 * std::fabs(want[i]) + 1e-4 * sums[i]))
          return std::fprintf(stderr, "%s %s: wrong output %zu\n", name.c_str(),
                              candidate.name.c_str(), i),
                 1;
      entries.push_back({kinds.back().get(), &candidate, {}});
    }
  }
  for (int round = -2; round < rounds; ++round)
    for (Entry& entry : entries) {
      const auto& views = entry.kind->views;
      // Several products a sample, each on another copy.
      constexpr int kRepeat = 4;
      const double start = now_ms(threads == 1);
      for (int i = 0; i < kRepeat; ++i)
        entry.candidate->run(views[static_cast<size_t>((round + 2) * kRepeat + i) % views.size()],
                             product, workspace.data(), executor);
      if (round >= 0) entry.ms.push_back((now_ms(threads == 1) - start) / kRepeat);
    }
  std::vector<double> dense(static_cast<size_t>(rounds), 1e9);
  for (const Entry& entry : entries)
    if (entry.kind->name == "dense")
      for (size_t i = 0; i < dense.size(); ++i) dense[i] = std::min(dense[i], entry.ms[i]);
  std::printf("%ldx%ld T=%ld, %d thread(s), %d rounds, bf16\n", n, k, tokens, threads, rounds);
  for (const Entry& entry : entries) {
    std::vector<double> ratio;
    for (size_t i = 0; i < dense.size(); ++i) ratio.push_back(dense[i] / entry.ms[i]);
    const double ms = median(entry.ms);
    std::printf("  %-6s %-24s %8.3f ms %6.1f GB/s  %5.2fx of dense (bytes allow %.2f)\n",
                entry.kind->name.c_str(), entry.candidate->name.c_str(), ms,
                entry.kind->bytes / ms / 1e6, median(ratio),
                static_cast<double>(n * k * 2) / entry.kind->bytes);
  }
}
