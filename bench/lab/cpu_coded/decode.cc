// Decode with quantised weights on the CPU: y = x W^T for few tokens, dense against sparse streams.
//
//   decode N K T THREADS ROUNDS [int8|int4 [avx2|avx2_vnni]]
//
// One table row per weight; LACUNA_LAB_ROTATE=0 keeps one copy. The last word leaves this CPU's
// other instructions out.
//
// Copies of each weight take turns so that no cache serves them; in a round every row runs once,
// and the lower quartile counts: what other processes take away is not the kernel's. Every result
// is compared with the portable kernel's, bit by bit.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "lacuna/core/half.h"
#include "lacuna/core/random.h"
#include "lacuna/format/quantize.h"
#include "lacuna/kernels/linear_coded/linear_coded.h"
#include "lacuna/kernels/linear_dense/linear_dense.h"

using namespace lacuna;  // NOLINT

int main(int argc, char** argv) {
  if (argc < 6) return 2;
  const int64_t n = std::atoll(argv[1]), k = std::atoll(argv[2]), t = std::atoll(argv[3]);
  const int threads = std::atoi(argv[4]), rounds = std::atoi(argv[5]);
  const std::string only = argc > 6 ? argv[6] : "";
  const char* rotate = std::getenv("LACUNA_LAB_ROTATE");
  const double rotated = rotate ? std::atof(rotate) : 6e8;
  ThreadPool pool(threads);
  const Executor executor = pool.executor();
  std::vector<float> x(static_cast<size_t>(t * k)), y(static_cast<size_t>(t * n));
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(random_normal(1, 2, i));
  struct Row {
    std::string name;
    std::vector<kernels::linear_coded::Stream> streams;
    std::vector<LargeBlock> dense;
    double bytes = 0;
    std::vector<double> us;
  };
  std::vector<Row> rows;
  const auto weight = [&](double sparsity, bool two_four) {
    std::vector<uint16_t> bits(static_cast<size_t>(n * k));
    for (int64_t i = 0; i < n * k; ++i) {
      const bool kept =
          two_four ? (i % 4 < 2) : random_uniform(2, 0, static_cast<uint64_t>(i)) >= sparsity;
      const auto r = static_cast<float>(random_uniform(3, 0, static_cast<uint64_t>(i)) - 0.5);
      bits[static_cast<size_t>(i)] = kept ? float_to_bf16(r + 1e-3f) : 0;
    }
    return Tensor{DType::kBF16, {n, k}, Bytes::take(std::move(bits))};
  };
  {
    Row row{"bf16 dense"};
    const Tensor w = weight(0, false);
    row.bytes = static_cast<double>(w.bytes.size());
    do {
      row.dense.emplace_back(w.bytes.size());
      std::memcpy(row.dense.back().data(), w.bytes.data(), w.bytes.size());
    } while (static_cast<double>(row.dense.size()) * row.bytes < rotated);
    rows.push_back(std::move(row));
  }
  for (const char* code : {"int8", "int4"}) {
    if (!only.empty() && only != code) continue;
    for (const char* sparsity :
         {"0", "0.5", "0.6", "0.7", "0.8", "2:4", "0.6 shared", "0.7 shared", "0.8 own"}) {
      const char* const space = std::strchr(sparsity, ' ');
      if (space && std::strcmp(code, "int8") == 0) continue;
      std::optional<kernels::linear_coded::Masks> masks;
      if (space)
        masks = space[1] == 'o' ? kernels::linear_coded::Masks::kOwn
                                : kernels::linear_coded::Masks::kShared;
      const bool two_four = std::string(sparsity) == "2:4";
      const Tensor w = weight(std::atof(sparsity), two_four);
      const auto q = *format::Quantization::parse(code);
      const auto matrix =
          std::string(sparsity) == "0"
              ? format::quantize(w, q, executor).value()
              : format::quantize(format::compress(w, two_four ? format::Pattern::keep_of(2, 4)
                                                              : format::Pattern::unstructured())
                                     .value(),
                                 q, executor)
                    .value();
      Row row{std::string(code) + " " + sparsity};
      row.streams.push_back(kernels::linear_coded::Stream::pack(matrix, executor, masks).value());
      row.bytes = static_cast<double>(row.streams[0].size_bytes());
      while (static_cast<double>(row.streams.size()) * row.bytes < rotated)
        row.streams.push_back(kernels::linear_coded::Stream::pack(matrix, executor, masks).value());
      rows.push_back(std::move(row));
    }
  }
  std::vector<std::byte> workspace(size_t{1} << 24);
  const format::RowProduct product{.dtype = DType::kF32,
                                   .tokens = t,
                                   .x = x.data(),
                                   .x_stride = k,
                                   .y = y.data(),
                                   .y_stride = n};
  kernels::Problem problem{.operation = "linear_dense",
                           .values = kernels::Values::kBF16,
                           .activations = DType::kBF16,
                           .outputs = n,
                           .inputs = k,
                           .tokens = t};
  std::vector<uint16_t> x16(x.size()), y16(y.size());
  for (size_t i = 0; i < x.size(); ++i) x16[i] = float_to_bf16(x[i]);
  format::RowProduct half = product;
  half.dtype = DType::kBF16;
  half.x = x16.data();
  half.y = y16.data();
  kernels::Device device = kernels::Device::this_cpu();
  if (argc > 7) {
    device.cpu.avx512_vbmi2 = device.cpu.avx512_vnni = device.cpu.avx512_bf16 = false;
    device.cpu.avx_vnni &= std::string(argv[7]) == "avx2_vnni";
  }
  const auto dense_plan = kernels::linear_dense::plan(problem, device).value();
  problem.values = kernels::Values::kInt8;
  problem.activations = DType::kF32;
  const auto plan = kernels::linear_coded::plan(problem, device).value();
  const auto run_once = [&](Row& row, size_t turn) {
    if (!row.dense.empty()) {
      const void* const weight = row.dense[turn % row.dense.size()].data();
      kernels::linear_dense::run(dense_plan, format::dense_rows(weight, DType::kBF16, n, k), half,
                                 workspace.data(), executor);
    } else {
      kernels::linear_coded::run(plan, row.streams[turn % row.streams.size()], product,
                                 workspace.data(), executor);
    }
  };
  for (Row& row : rows) {
    if (!row.dense.empty()) continue;
    run_once(row, 0);
    const std::vector<float> found = y;
    const auto portable = kernels::linear_coded::plan_for(
        *kernels::linear_coded::candidates().find("cpu_portable"), problem);
    kernels::linear_coded::run(portable, row.streams[0], product, workspace.data(), executor);
    if (y != found) {
      std::printf("%s: %s differs from cpu_portable\n", row.name.c_str(),
                  plan.candidate->name.c_str());
      return 1;
    }
  }
  for (int round = 0; round <= rounds; ++round)
    for (Row& row : rows) {
      constexpr int kRepeat = 8;
      const auto start = std::chrono::steady_clock::now();
      for (int i = 0; i < kRepeat; ++i) run_once(row, static_cast<size_t>(round * kRepeat + i));
      const std::chrono::duration<double, std::micro> took =
          std::chrono::steady_clock::now() - start;
      if (round > 0) row.us.push_back(took.count() / kRepeat);
    }
  for (Row& row : rows) std::sort(row.us.begin(), row.us.end());
  const auto quartile = [](const Row& row) { return row.us[row.us.size() / 4]; };
  std::printf("%ldx%ldx%ld, %d threads, %s\n", static_cast<long>(n), static_cast<long>(k),
              static_cast<long>(t), threads, plan.candidate->name.c_str());
  const Row* dense = &rows[0];
  for (const Row& row : rows) {
    if (row.name.ends_with(" 0")) dense = &row;
    std::printf(
        "%-15s %8.1f us (least %.1f)  %5.1f GB/s  %.2f bits  ratio %.2f of %.2f (bf16 %.2f)\n",
        row.name.c_str(), quartile(row), row.us[0], row.bytes / quartile(row) / 1e3,
        row.bytes * 8 / static_cast<double>(n * k), quartile(*dense) / quartile(row),
        dense->bytes / row.bytes, quartile(rows[0]) / quartile(row));
  }
}
