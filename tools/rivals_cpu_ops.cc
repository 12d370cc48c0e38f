// One token times an int8 or int4 weight: ours, dense and sparse, beside ggml, in one process.
//
//   rivals_cpu_ops int8|int4 N K THREADS SECONDS
//
// Who takes part: linear_coded with a dense weight and with sparse ones, and ggml's product of the
// same number of bits (q8_0; q4_0 and q4_K), once for every buffer type in which it holds such a
// weight: CPU as in the file, CPU_REPACK rows interleaved, AMX tiles. Every weight is copied 16
// times or more and every product takes the next copy, so that from 4096x4096 on some 1.5 GB are
// read before a copy comes again. In a round everyone has one turn
// of 16 products (a graph of 16 nodes in ggml, so that a product costs it a barrier, as in a
// model), every other round in reverse; in between all threads go to sleep, since ggml's pool and
// ours both spin for a while. The least median among dense weights is the baseline; ratios are
// taken round by round. Nothing is timed whose output is off by more than rounding x can explain.
//
//   cmake -S LLAMA -B BUILD -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON && cmake --build BUILD
//   g++ -std=c++20 -O2 -Isrc -ILLAMA/ggml/include tools/rivals_cpu_ops.cc -o rivals_cpu_ops
//       build/release/liblacuna_{kernels,format,core}.a -lfmt -lxxhash -lpthread
//       -LBUILD/bin -lggml -lggml-cpu -lggml-base -Wl,-rpath,BUILD/bin
#include <ggml-backend.h>
#include <ggml-cpu.h>
#include <ggml.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <fmt/format.h>

#include "lacuna/core/half.h"
#include "lacuna/core/random.h"
#include "lacuna/format/quantize.h"
#include "lacuna/kernels/linear_coded/linear_coded.h"

using namespace lacuna;  // NOLINT
namespace coded = lacuna::kernels::linear_coded;

namespace {

constexpr int kProducts = 16;          // of a turn
constexpr int kWarmUp = 2;             // products before each turn, which wake the threads
constexpr double kRotatedBytes = 5e8;  // of each; all together in a round pass 1.5 GB

[[noreturn]] void fail(const std::string& why) {
  fmt::print(stderr, "rivals_cpu_ops: {}\n", why);
  std::exit(1);
}

struct Size {
  int64_t n = 0, k = 0;
};

/// Someone who multiplies.
struct Contender {
  std::string name;
  bool dense = false;
  double bytes = 0;                       // of one weight
  std::function<void(bool warm_up)> run;  // kWarmUp products, or the next kProducts
  std::vector<float> y;                   // of the first copy
  std::vector<double> us;                 // of one product, by round
};

/// Those of whole turns, and kWarmUp more behind them.
int copies_of(double bytes) {
  const int turns = static_cast<int>(kRotatedBytes / bytes / kProducts) + 1;
  return turns * kProducts + kWarmUp;
}

/// Standard normal, as bf16.
std::vector<float> normal(uint64_t stream, int64_t count, const Executor& executor) {
  std::vector<float> values(static_cast<size_t>(count));
  executor.parallel_for(64, [&](int64_t chunk) {
    for (int64_t i = count * chunk / 64; i < count * (chunk + 1) / 64; ++i)
      values[static_cast<size_t>(i)] =
          bf16_to_float(float_to_bf16(random_normal(1, stream, static_cast<uint64_t>(i))));
  });
  return values;
}

/// |y - Wx| / |Wx| stays below what rounding x to 127 steps of its largest value costs, and half
/// as much again. `row` writes a row of W as the contender has it.
void check(const Contender& contender, const Size& size, const std::vector<float>& x,
           const Executor& executor, const std::function<void(int64_t n, float* out)>& row) {
  double largest = 0, squares = 0;
  for (const float v : x) largest = std::max<double>(largest, std::abs(v)), squares += v * v;
  const double step = largest / 127, rms = std::sqrt(squares / static_cast<double>(x.size()));
  const double bound = 1.5 * step / std::sqrt(12.0) / rms;
  std::vector<double> off(static_cast<size_t>(size.n)), exact(off.size());
  executor.parallel_for(size.n, [&](int64_t n) {
    std::vector<float> w(x.size());
    row(n, w.data());
    double sum = 0;
    for (size_t i = 0; i < x.size(); ++i) sum += static_cast<double>(w[i]) * x[i];
    const auto at = static_cast<size_t>(n);
    exact[at] = sum * sum;
    off[at] = std::pow(contender.y[at] - sum, 2);
  });
  double error = 0, norm = 0;
  for (const double v : off) error += v;
  for (const double v : exact) norm += v;
  error = std::sqrt(error / norm);
  if (!(error < bound))
    fail(fmt::format("{} is wrong: |y - Wx| / |Wx| = {:.4f} (need < {:.4f})", contender.name, error,
                     bound));
}

// --- ours --------------------------------------------------------------------------------------

class Ours {
 public:
  Ours(const Size& size, const format::CompactMatrix& matrix, const std::vector<float>& x,
       const Executor& executor)
      : x_(x), y_(static_cast<size_t>(size.n)), executor_(executor) {
    do {
      streams_.push_back(coded::Stream::pack(matrix, executor).value());
    } while (static_cast<int>(streams_.size()) <
             copies_of(static_cast<double>(streams_.front().size_bytes())));
    const kernels::Problem problem{.operation = "linear_dense",
                                   .values = kernels::Values::kInt8,
                                   .activations = DType::kF32,
                                   .outputs = size.n,
                                   .inputs = size.k,
                                   .tokens = 1};
    plan_ = coded::plan(problem).value();
    workspace_.resize(plan_.workspace_bytes);
  }
  void run(bool warm_up) {
    const format::RowProduct product{.dtype = DType::kF32,
                                     .tokens = 1,
                                     .x = x_.data(),
                                     .x_stride = static_cast<int64_t>(x_.size()),
                                     .y = y_.data(),
                                     .y_stride = static_cast<int64_t>(y_.size())};
    const size_t rotated = streams_.size() - kWarmUp, first = warm_up ? rotated : next_;
    for (size_t i = first; i < first + (warm_up ? kWarmUp : kProducts); ++i)
      coded::run(plan_, streams_[i], product, workspace_.data(), executor_);
    if (!warm_up) next_ = (next_ + kProducts) % rotated;
  }
  const std::vector<float>& y() const { return y_; }
  const coded::Stream& stream() const { return streams_.front(); }

 private:
  const std::vector<float>& x_;
  std::vector<float> y_;
  Executor executor_;
  std::vector<coded::Stream> streams_;
  coded::CodedPlan plan_;
  std::vector<std::byte> workspace_;
  size_t next_ = 0;
};

Tensor sparse_weight(const Size& size, const std::vector<float>& w, double sparsity, bool nm) {
  std::vector<uint16_t> bits(w.size());
  for (size_t i = 0; i < w.size(); ++i) {
    const bool kept = nm ? i % 4 < 2 : sparsity == 0 || random_uniform(2, 0, i) >= sparsity;
    bits[i] = kept ? float_to_bf16(w[i]) : uint16_t{0};
  }
  return {DType::kBF16, {size.n, size.k}, Bytes::take(std::move(bits))};
}

Contender ours(const std::string& code, const std::string& pattern, const Size& size,
               const std::vector<float>& w, const std::vector<float>& x, const Executor& executor) {
  const bool nm = pattern == "2:4", dense = pattern == "dense";
  const Tensor weight = sparse_weight(size, w, dense || nm ? 0 : std::atof(pattern.c_str()), nm);
  const auto quantization = *format::Quantization::parse(code);
  const auto kind = nm ? format::Pattern::keep_of(2, 4) : format::Pattern::unstructured();
  const auto matrix =
      dense ? format::quantize(weight, quantization, executor).value()
            : format::quantize(format::compress(weight, kind).value(), quantization, executor)
                  .value();
  const auto held = std::make_shared<Ours>(size, matrix, x, executor);
  Contender contender{.name = fmt::format("lacuna {} {}", code, pattern),
                      .dense = dense,
                      .bytes = static_cast<double>(held->stream().size_bytes()),
                      .run = [held](bool warm_up) { held->run(warm_up); }};
  held->run(false);
  contender.y = held->y();
  check(contender, size, x, executor, [&](int64_t n, float* out) {
    std::vector<float> tile(static_cast<size_t>(coded::kTileRows * size.k));
    held->stream().expand_tile(n / coded::kTileRows, tile.data());
    std::memcpy(out, tile.data() + n % coded::kTileRows * size.k,
                static_cast<size_t>(size.k) * sizeof(float));
  });
  return contender;
}

// --- ggml --------------------------------------------------------------------------------------

/// Copies of one weight in one buffer type, and graphs that multiply kProducts of them each.
class Theirs {
 public:
  Theirs(const Size& size, ggml_type type, ggml_backend_buffer_type_t buffer,
         ggml_backend_t backend, const std::vector<uint8_t>& quantised, const std::vector<float>& x)
      : backend_(backend), buffer_(buffer) {
    const int copies = copies_of(static_cast<double>(quantised.size()));
    weights_ = context(copies);
    for (int i = 0; i < copies; ++i) ggml_new_tensor_2d(weights_, type, size.k, size.n);
    ggml_backend_buffer_t held = ggml_backend_alloc_ctx_tensors_from_buft(weights_, buffer);
    if (held == nullptr) fail("ggml has no memory left");
    ggml_backend_buffer_set_usage(held, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    std::vector<ggml_tensor*> all;
    for (auto* w = ggml_get_first_tensor(weights_); w; w = ggml_get_next_tensor(weights_, w)) {
      if (all.empty())
        ggml_backend_tensor_set(w, quantised.data(), 0, quantised.size());
      else  // already in the buffer's own layout
        std::memcpy(w->data, all.front()->data, bytes());
      all.push_back(w);
    }
    products_ = context(copies + 1);
    ggml_tensor* const input = ggml_new_tensor_2d(products_, GGML_TYPE_F32, size.k, 1);
    const auto graph_of = [&](int first, int count) {
      graph_contexts_.push_back(context(count + 1));
      ggml_cgraph* const graph = ggml_new_graph_custom(graph_contexts_.back(), 64, false);
      for (int i = 0; i < count; ++i) {
        outputs_.push_back(ggml_mul_mat(products_, all[static_cast<size_t>(first + i)], input));
        ggml_build_forward_expand(graph, outputs_.back());
      }
      return graph;
    };
    for (int first = 0; first + kProducts <= copies; first += kProducts)
      graphs_.push_back(graph_of(first, kProducts));
    warm_up_ = graph_of(copies - kWarmUp, kWarmUp);
    ggml_backend_alloc_ctx_tensors(products_, backend);
    ggml_backend_tensor_set(input, x.data(), 0, x.size() * sizeof(float));
  }
  void run(bool warm_up) {
    ggml_cgraph* const graph = warm_up ? warm_up_ : graphs_[next_++ % graphs_.size()];
    if (ggml_backend_graph_compute(backend_, graph) != GGML_STATUS_SUCCESS)
      fail("ggml computes nothing");
  }
  std::vector<float> y() const {
    std::vector<float> out(static_cast<size_t>(outputs_.front()->ne[0]));
    ggml_backend_tensor_get(outputs_.front(), out.data(), 0, out.size() * sizeof(float));
    return out;
  }
  /// Of one weight in the buffer's layout.
  size_t bytes() const {
    return ggml_backend_buft_get_alloc_size(buffer_, ggml_get_first_tensor(weights_));
  }

  static ggml_context* context(int tensors) {
    return ggml_init({.mem_size = ggml_tensor_overhead() * static_cast<size_t>(tensors + 8) +
                                  ggml_graph_overhead_custom(64, false),
                      .mem_buffer = nullptr,
                      .no_alloc = true});
  }

 private:
  ggml_backend_t backend_;
  ggml_backend_buffer_type_t buffer_;
  ggml_context *weights_ = nullptr, *products_ = nullptr;
  std::vector<ggml_context*> graph_contexts_;
  std::vector<ggml_cgraph*> graphs_;
  ggml_cgraph* warm_up_ = nullptr;
  std::vector<ggml_tensor*> outputs_;
  size_t next_ = 0;
};

/// The buffer types of the CPU in which ggml would multiply such a weight.
std::vector<ggml_backend_buffer_type_t> buffer_types(ggml_type type, const Size& size) {
  ggml_backend_dev_t const device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
  std::vector<ggml_backend_buffer_type_t> all{ggml_backend_dev_buffer_type(device)};
  const auto extra =
      reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(ggml_backend_reg_get_proc_address(
          ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts"));
  for (auto* types = extra ? extra(device) : nullptr; types && *types; ++types)
    all.push_back(*types);
  std::erase_if(all, [&](ggml_backend_buffer_type_t buffer) {
    ggml_context* const context = Theirs::context(4);
    ggml_tensor* const w = ggml_new_tensor_2d(context, type, size.k, size.n);
    ggml_tensor* const x = ggml_new_tensor_2d(context, GGML_TYPE_F32, size.k, 1);
    w->buffer = ggml_backend_buft_alloc_buffer(buffer, 0);
    const bool taken = ggml_backend_dev_supports_op(device, ggml_mul_mat(context, w, x));
    ggml_backend_buffer_free(w->buffer);
    ggml_free(context);
    return !taken;
  });
  return all;
}

std::vector<Contender> theirs(ggml_type type, const Size& size, const std::vector<float>& w,
                              const std::vector<float>& x, ggml_backend_t backend,
                              const Executor& executor) {
  std::vector<uint8_t> quantised(ggml_row_size(type, size.k) * static_cast<size_t>(size.n));
  ggml_quantize_chunk(type, w.data(), quantised.data(), 0, size.n, size.k, nullptr);
  std::vector<Contender> all;
  for (ggml_backend_buffer_type_t buffer : buffer_types(type, size)) {
    const auto held = std::make_shared<Theirs>(size, type, buffer, backend, quantised, x);
    Contender contender{
        .name = fmt::format("ggml {} {}", ggml_type_name(type), ggml_backend_buft_name(buffer)),
        .dense = true,
        .bytes = static_cast<double>(held->bytes()),
        .run = [held](bool warm_up) { held->run(warm_up); }};
    held->run(false);
    contender.y = held->y();
    check(contender, size, x, executor, [&](int64_t n, float* out) {
      ggml_get_type_traits(type)->to_float(
          quantised.data() + ggml_row_size(type, size.k) * static_cast<size_t>(n), out, size.k);
    });
    all.push_back(std::move(contender));
  }
  return all;
}

// --- the race ----------------------------------------------------------------------------------

void take_turn(Contender& contender) {
  std::this_thread::sleep_for(std::chrono::milliseconds(15));
  contender.run(true);
  const auto start = std::chrono::steady_clock::now();
  contender.run(false);
  const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - start;
  contender.us.push_back(took.count() / kProducts);
}

double quantile(std::vector<double> values, double share) {
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(share * static_cast<double>(values.size() - 1) + 0.5)];
}

double ratio(const Contender& baseline, const Contender& contender) {
  std::vector<double> ratios;
  for (size_t i = 0; i < contender.us.size(); ++i)
    ratios.push_back(baseline.us[i] / contender.us[i]);
  return quantile(ratios, 0.5);
}

void report(const std::vector<Contender>& all, const Size& size, int threads) {
  const Contender *best = nullptr, *best_of_theirs = nullptr;
  for (const Contender& c : all) {
    if (!c.dense) continue;
    const auto better = [&](const Contender* than) {
      return than == nullptr || quantile(c.us, 0.5) < quantile(than->us, 0.5);
    };
    if (better(best)) best = &c;
    if (c.name.starts_with("ggml") && better(best_of_theirs)) best_of_theirs = &c;
  }
  fmt::print("{}x{}x1, {} threads, {} rounds; ratios to {} and to {}\n", size.n, size.k, threads,
             all.front().us.size(), best->name, best_of_theirs->name);
  for (const Contender& c : all)
    fmt::print(
        "{:24} {:8.1f} us (p10 {:.1f}, p90 {:.1f}) {:6.1f} GB/s {:6.2f} bits {:6.2f} {:6.2f}\n",
        c.name, quantile(c.us, 0.5), quantile(c.us, 0.1), quantile(c.us, 0.9),
        c.bytes / quantile(c.us, 0.5) / 1e3, c.bytes * 8 / static_cast<double>(size.n * size.k),
        ratio(*best, c), ratio(*best_of_theirs, c));
  for (const Contender& c : all)
    fmt::print(
        "{{\"n\": {}, \"k\": {}, \"threads\": {}, \"rounds\": {}, \"contender\": \"{}\", "
        "\"median_us\": {:.2f}, \"p10_us\": {:.2f}, \"p90_us\": {:.2f}, \"bytes\": {:.0f}, "
        "\"baseline\": \"{}\", \"ratio\": {:.4f}, \"best_of_ggml\": \"{}\", "
        "\"ratio_to_ggml\": {:.4f}}}\n",
        size.n, size.k, threads, c.us.size(), c.name, quantile(c.us, 0.5), quantile(c.us, 0.1),
        quantile(c.us, 0.9), c.bytes, best->name, ratio(*best, c), best_of_theirs->name,
        ratio(*best_of_theirs, c));
}

}  // namespace

int main(int argc, char** argv) {
  const std::string code = argc > 1 ? argv[1] : "";
  if (argc != 6 || (code != "int8" && code != "int4")) {
    fmt::print(stderr, "usage: rivals_cpu_ops int8|int4 N K THREADS SECONDS\n");
    return 2;
  }
  const Size size{std::atoll(argv[2]), std::atoll(argv[3])};
  const int threads = std::atoi(argv[4]);
  ThreadPool pool(threads);
  const Executor executor = pool.executor();
  const std::vector<float> w = normal(0, size.n * size.k, executor);
  const std::vector<float> x = normal(1, size.k, executor);
  ggml_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
  ggml_backend_t const backend = ggml_backend_cpu_init();
  ggml_backend_cpu_set_n_threads(backend, threads);

  std::vector<Contender> all;
  for (const char* pattern : {"dense", "0.5", "0.6", "0.7", "0.8", "2:4"})
    all.push_back(ours(code, pattern, size, w, x, executor));
  for (const ggml_type type :
       code == "int8" ? std::vector{GGML_TYPE_Q8_0} : std::vector{GGML_TYPE_Q4_0, GGML_TYPE_Q4_K})
    for (Contender& c : theirs(type, size, w, x, backend, executor)) all.push_back(std::move(c));

  const auto start = std::chrono::steady_clock::now();
  const std::chrono::duration<double> limit(std::atof(argv[5]));
  for (int round = 0; round < 4 || std::chrono::steady_clock::now() - start < limit; ++round) {
    for (size_t i = 0; i < all.size(); ++i) take_turn(all[round % 2 == 0 ? i : all.size() - 1 - i]);
    if (round == 0)
      for (Contender& c : all) c.us.clear();
  }
  report(all, size, threads);
  return 0;
}
