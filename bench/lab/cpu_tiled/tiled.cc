// Many tokens on the CPU: the tiled products of kernels/tiled, with any blocking.
//
//   tiled KIND N K T THREADS ROUNDS [ROWS COLUMNS TOKENS]...
//
// KIND is dense, a share of zeros or 2:4. Each panel of ROWS and
// blocks of COLUMNS and TOKENS (0 0 0: what the library takes) runs once a round; the weight is
// copied until the copies pass 1.5 GB (LACUNA_LAB_ROTATE), and every product takes the next copy.
// Outputs are compared with the float64 definition, on some rows, before anything is timed.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "lacuna/core/cpu.h"
#include "lacuna/core/half.h"
#include "lacuna/core/large_block.h"
#include "lacuna/core/random.h"
#include "lacuna/kernels/error_bound.h"
#include "lacuna/kernels/tiled.h"

using namespace lacuna;  // NOLINT

namespace {

const double kRotatedBytes =
    std::getenv("LACUNA_LAB_ROTATE") ? std::atof(std::getenv("LACUNA_LAB_ROTATE")) : 1.5e9;

Bytes copy_of(const Bytes& bytes) {
  return Bytes::take(std::vector<std::byte>(bytes.span().begin(), bytes.span().end()));
}

struct Copies {
  std::vector<Bytes> dense;
  std::vector<format::CompactRows> compact;
  std::vector<format::RowsView> views;
};

Copies make(const std::string& kind, int64_t n, int64_t k) {
  std::vector<uint16_t> bits(static_cast<size_t>(n * k));
  const bool two_four = kind == "2:4";
  const double sparsity = kind == "dense" ? 0 : two_four ? 0.5 : std::atof(kind.c_str());
  for (int64_t i = 0; i < n * k; ++i) {
    const uint64_t r = random_bits(3, 0, static_cast<uint64_t>(two_four ? i / 4 : i));
    const auto one = static_cast<int64_t>(r % 4),
               other = (one + 1 + static_cast<int64_t>(r / 4 % 3)) % 4;
    const bool kept = two_four ? i % 4 == one || i % 4 == other
                               : static_cast<double>(r >> 11) * 0x1p-53 >= sparsity;
    if (kept)
      bits[static_cast<size_t>(i)] = float_to_bf16(
          static_cast<float>(random_uniform(1, 0, static_cast<uint64_t>(i)) - 0.5) + 1e-3f);
  }
  const Tensor weight{DType::kBF16, {n, k}, Bytes::take(std::move(bits))};
  Copies copies;
  double bytes = 0;
  if (kind == "dense") {
    do {
      copies.dense.push_back(copy_of(weight.bytes));
      copies.views.push_back(format::dense_rows(copies.dense.back().data(), DType::kBF16, n, k));
    } while ((bytes += static_cast<double>(weight.bytes.size())) < kRotatedBytes);
    return copies;
  }
  const auto matrix = format::compress(weight, two_four ? format::Pattern::keep_of(2, 4)
                                                        : format::Pattern::unstructured())
                          .value();
  do {
    auto copy = matrix;
    copy.bitmap = copy_of(copy.bitmap);
    copy.values = copy_of(copy.values);
    copies.compact.push_back(format::CompactRows::make(std::move(copy)).value());
  } while ((bytes += static_cast<double>(matrix.size_bytes())) < kRotatedBytes);
  for (const auto& rows : copies.compact) copies.views.push_back(rows.view());
  return copies;
}

struct Way {
  std::string name;
  kernels::tiled::Run run;
  kernels::tiled::Blocking blocking;
  std::vector<double> us;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 7 || (argc - 7) % 3 != 0) return std::puts("usage: see the head of tiled.cc"), 2;
  const std::string kind = argv[1];
  const int64_t n = std::atoll(argv[2]), k = std::atoll(argv[3]), tokens = std::atoll(argv[4]);
  const int rounds = std::atoi(argv[6]);
  ThreadPool pool(std::atoi(argv[5]));
  if (!cpu_features().amx_bf16) std::puts("no AMX here");
  std::vector<Way> ways;
  for (int i = 7; i < argc; i += 3) {
    kernels::tiled::Blocking blocking{std::atoll(argv[i]), std::atoll(argv[i + 1]),
                                      std::atoll(argv[i + 2])};
    if (blocking.rows == 0) blocking = kernels::tiled::Blocking::of(tokens, n, k, pool.threads());
    blocking.columns = std::min(blocking.columns, (k + 31) / 32 * 32);
    ways.push_back({std::to_string(blocking.rows) + "x" + std::to_string(blocking.columns) + "x" +
                        std::to_string(blocking.tokens),
                    kernels::tiled::run_amx_dot,
                    blocking,
                    {}});
  }
  const Copies copies = make(kind, n, k);
  std::vector<uint16_t> x(static_cast<size_t>(tokens * k)), y(static_cast<size_t>(tokens * n));
  for (size_t i = 0; i < x.size(); ++i)
    x[i] = float_to_bf16(static_cast<float>(random_normal(5, 0, i)));
  const format::RowProduct product{.dtype = DType::kBF16,
                                   .tokens = tokens,
                                   .x = x.data(),
                                   .x_stride = k,
                                   .y = y.data(),
                                   .y_stride = n};
  LargeBlock workspace(kernels::tiled::workspace_bytes(tokens, k));
  std::memset(workspace.data(), 0xff, workspace.size());
  const auto& view = copies.views[0];
  for (const Way& way : ways) {
    std::fill(y.begin(), y.end(), uint16_t{0xffff});
    way.run(view, product, workspace.data(), pool.executor(), way.blocking);
    const kernels::ErrorBound bound{static_cast<double>(k) + 1, k, DType::kBF16, true};
    for (int64_t i = 0; i < 200; ++i) {
      const auto row = static_cast<int64_t>(random_bits(8, 0, static_cast<uint64_t>(i)) %
                                            static_cast<uint64_t>(n));
      const auto t = static_cast<int64_t>(random_bits(9, 0, static_cast<uint64_t>(i)) %
                                          static_cast<uint64_t>(tokens));
      auto one_row = view;
      one_row.rows = 1;
      if (view.bitmap) {
        one_row.bitmap = view.row_bits(row);
        one_row.row_values = view.row_values ? view.row_values + row : nullptr;
        if (!view.row_values) one_row.values += row * view.values_per_row * 2;
      } else {
        one_row.values += row * k * 2;
      }
      auto one_token = product;
      one_token.tokens = 1;
      one_token.x = x.data() + t * k;
      double exact, sum;
      format::reference_row_product(one_row, one_token, &exact, &sum);
      const double got = bf16_to_float(y[static_cast<size_t>(t * n + row)]);
      if (!(std::fabs(got - exact) <= bound(exact, sum)))
        return std::printf("%s: WRONG at token %ld row %ld: %g, need %g\n", way.name.c_str(), t,
                           row, got, exact),
               1;
    }
  }
  size_t next = 0;
  for (int round = -1; round < rounds; ++round)
    for (Way& way : ways) {
      const auto start = std::chrono::steady_clock::now();
      way.run(copies.views[next++ % copies.views.size()], product, workspace.data(),
              pool.executor(), way.blocking);
      const std::chrono::duration<double, std::micro> took =
          std::chrono::steady_clock::now() - start;
      if (round >= 0) way.us.push_back(took.count());
    }
  std::printf("%s %ldx%ldx%ld, %d threads, %zu copies\n", kind.c_str(), n, k, tokens,
              pool.threads(), copies.views.size());
  for (Way& way : ways) {
    std::sort(way.us.begin(), way.us.end());
    const double median = way.us[way.us.size() / 2];
    std::printf("  %-22s median %8.0f us, least %8.0f, p90 %8.0f  %6.0f GFLOP/s (best %6.0f)\n",
                way.name.c_str(), median, way.us.front(), way.us[way.us.size() * 9 / 10],
                2e-3 * static_cast<double>(n * k * tokens) / median,
                2e-3 * static_cast<double>(n * k * tokens) / way.us.front());
  }
}
