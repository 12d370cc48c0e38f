#include "lacuna/bench/compare_gpu.h"

#include <c10/core/InferenceMode.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <utility>

#include "lacuna/bench/contender.h"
#include "lacuna/format/compact.h"
#include "lacuna/kernels/linear.h"
#include "lacuna/kernels/linear_dense/linear_dense.h"
#include "lacuna/model/device_compact.h"
#include "lacuna/model/fastest_weight.h"
#include "lacuna/model/gpu_clock.h"
#include "lacuna/model/gpu_weight.h"

namespace lacuna::bench {
namespace {

using kernels::Problem;
using model::WeightPtr;

constexpr double kMostError = 0x1p-8;   // of the norm: bf16 rounds to 2^-9
constexpr double kReplayUs = 2000;      // of a measurement, about
constexpr int64_t kLeastProducts = 16;  // of a graph

/// Torch's products and ours on a stream that can be recorded, while it lives.
class OwnStream {
 public:
  explicit OwnStream(at::Device device)
      : guard_(device.type()),
        stream_(guard_.getStreamFromGlobalPool(device)),
        before_(guard_.exchangeStream(stream_)) {}
  ~OwnStream() { guard_.exchangeStream(before_); }
  OwnStream(const OwnStream&) = delete;
  void* handle() const { return stream_.native_handle(); }

 private:
  c10::impl::VirtualGuardImpl guard_;
  c10::Stream stream_, before_;
};

/// A CUDA graph.
class Recorded {
 public:
  Recorded(const kernels::GpuTable& table, void* stream, const std::function<void()>& sequence)
      : table_(table), stream_(stream) {
    check(table.record_begin(stream), "record");
    try {
      sequence();
    } catch (...) {  // the stream must not stay in this state
      if (table.record_end(stream, &recording_) == 0) table.forget(recording_);
      recording_ = nullptr;
      throw;
    }
    check(table.record_end(stream, &recording_), "record");
  }
  ~Recorded() {
    if (recording_ != nullptr) table_.forget(recording_);
  }
  Recorded(const Recorded&) = delete;
  void replay() const { check(table_.replay(recording_, stream_), "replay"); }

 private:
  void check(int error, const char* what) const {
    TORCH_CHECK(error == 0, "the GPU can't ", what, ": ", table_.error_text(error));
  }
  const kernels::GpuTable& table_;
  void* stream_;
  void* recording_ = nullptr;
};

/// A problem with its weight, dense on the GPU, and what its product must be.
struct Case {
  Problem problem;
  at::Tensor dense, exact;
};

/// Someone who multiplies it.
struct Entry {
  const Case* of = nullptr;
  std::string name;
  bool selectable = false;
  std::function<Result<WeightPtr>()> make;
  std::vector<WeightPtr> copies;
  std::unique_ptr<Recorded> graph;
  int64_t products = 0, replays = 1;
  std::vector<double> samples_us;
  double max_error = 0;  ///< of the last product checked
};

/// 1 where the pattern keeps a weight, [N,K] on the GPU.
at::Tensor random_mask(const Problem& problem, at::Device device) {
  const int64_t n = problem.outputs, k = problem.inputs;
  const auto uniform = [&](at::IntArrayRef shape) {
    return at::rand(shape, at::TensorOptions().device(device));
  };
  const format::Pattern& pattern = problem.pattern;
  switch (pattern.kind) {
    case format::PatternKind::kKeepOf: {
      const int64_t groups = (k + pattern.of - 1) / pattern.of;
      const at::Tensor order =
          uniform({n, groups, pattern.of}).argsort(int64_t{-1}).argsort(int64_t{-1});
      return (order < pattern.keep).view({n, groups * pattern.of}).narrow(1, 0, k);
    }
    case format::PatternKind::kBlock: {
      const int64_t r = pattern.block_rows, c = pattern.block_columns;
      const at::Tensor kept = uniform({(n + r - 1) / r, (k + c - 1) / c}) >= problem.sparsity;
      return kept.repeat_interleave(r, 0).repeat_interleave(c, 1).narrow(0, 0, n).narrow(1, 0, k);
    }
    default:
      return uniform({n, k}) >= problem.sparsity;
  }
}

at::Tensor random_weight_on_gpu(const Problem& problem, const model::Compute& compute) {
  const auto options = at::TensorOptions().device(compute.device);
  const at::Tensor values = at::randn({problem.outputs, problem.inputs}, options);
  if (problem.pattern.kind == format::PatternKind::kDense) return values.to(compute.dtype);
  return (values * random_mask(problem, compute.device)).to(compute.dtype).contiguous();
}

/// x W^T in float64, some rows of W at a time.
at::Tensor exact_product(const at::Tensor& x, const at::Tensor& w) {
  constexpr int64_t kRows = 2048;
  std::vector<at::Tensor> parts;
  const at::Tensor wide = x.to(at::kDouble);
  for (int64_t row = 0; row < w.size(0); row += kRows)
    parts.push_back(
        at::linear(wide, w.narrow(0, row, std::min(kRows, w.size(0) - row)).to(at::kDouble)));
  return at::cat(parts, 1);
}

/// What a model gets of this weight: packed once or in every form; expanded for every product where
/// no kernel takes it.
Result<WeightPtr> as_a_model(const Case& c, model::Compute compute, bool fastest) {
  compute.fastest = fastest;
  compute.batch = c.problem.tokens;
  Problem problem = c.problem;  // whatever operation is timed beside it
  problem.operation = kernels::linear_operation_on_gpu(problem)->name;
  LACUNA_TRY(auto packed, model::packed_weight(problem, compute, [&] { return c.dense; }));
  if (packed != nullptr) return packed;
  LACUNA_TRY(auto compact,
             format::compress(model::unwrap(c.dense), c.problem.pattern, model::torch_executor()));
  return model::compact_weight(std::move(compact), compute);
}

std::vector<Entry> entries_of(const Case& c, const model::Compute& compute,
                              std::vector<Untimed>& refused) {
  std::vector<Entry> entries;
  const auto add = [&](std::string name, bool selectable, std::function<Result<WeightPtr>()> make) {
    Entry& entry = entries.emplace_back();
    entry.of = &c;
    entry.name = std::move(name);
    entry.selectable = selectable;
    entry.make = std::move(make);
  };
  auto& candidates = (*kernels::find_linear_operation(c.problem.operation))->gpu_candidates();
  for (const kernels::Candidate& candidate : candidates) {
    const auto support = candidate.supports(c.problem, kernels::Device::this_gpu());
    const auto* kernel = kernels::gpu_kernel(c.problem.operation, candidate.name);
    if (!support) {
      refused.push_back({c.problem.text(), candidate.name, support.refusal()});
    } else if (kernel != nullptr) {
      add(candidate.name, true, [&c, compute, kernel] {
        return model::GpuWeight::packed_for(*kernel, c.problem, compute, [&] { return c.dense; });
      });
    } else if (candidate.name == kernels::kCublas) {
      add(candidate.name, true,
          [&c]() -> Result<WeightPtr> { return model::plain_weight(c.dense.clone()); });
    }
  }
  if (c.problem.pattern.kind == format::PatternKind::kDense) return entries;
  add("--memory compact", false, [&c, compute] { return as_a_model(c, compute, false); });
  add("--memory fastest", false, [&c, compute] { return as_a_model(c, compute, true); });
  return entries;
}

/// Runs products on x, one y for all.
class Runner {
 public:
  Runner(const Problem& problem, const model::Compute& compute, OwnStream& stream)
      : table_(**kernels::gpu_library()),
        stream_(stream),
        problem_(problem),
        clock_(compute.device) {
    const auto options = at::TensorOptions().device(compute.device);
    x_ = at::randn({problem.tokens, problem.inputs}, options).to(compute.dtype);
    y_ = at::empty({problem.tokens, problem.outputs}, options.dtype(compute.dtype));
  }
  const at::Tensor& x() const { return x_; }

  void product(const model::Weight& weight) {
    weight.run({.dtype = problem_.activations,
                .tokens = problem_.tokens,
                .x = x_.const_data_ptr(),
                .x_stride = problem_.inputs,
                .y = y_.mutable_data_ptr(),
                .y_stride = problem_.outputs},
               Executor());
  }
  /// Empty, or why the output of a copy is wrong.
  std::string check(Entry& entry, const model::Weight& weight) {
    const at::Tensor& exact = entry.of->exact;
    y_.fill_(std::numeric_limits<double>::quiet_NaN());
    product(weight);
    entry.max_error = max_error(y_, exact);
    const double off = ((y_.to(at::kDouble) - exact).norm() / exact.norm()).item<double>();
    if (off <= kMostError) return "";  // false for NaN
    return fmt::format("wrong output: off by {:.2g} of its norm (need at most {:.2g})", off,
                       kMostError);
  }
  void record(Entry& entry) {
    const auto copies = static_cast<int64_t>(entry.copies.size());
    entry.products = (std::max(kLeastProducts, copies) + copies - 1) / copies * copies;
    const auto all = [&] {
      for (int64_t i = 0; i < entry.products; ++i)
        product(*entry.copies[static_cast<size_t>(i % copies)]);
    };
    all();  // torch takes all the memory that its products want
    entry.graph = std::make_unique<Recorded>(table_, stream_.handle(), all);
    measure(entry);  // the first is slower
    const double us = measure(entry) * static_cast<double>(entry.products);
    entry.replays = std::max<int64_t>(1, static_cast<int64_t>(kReplayUs / us));
  }
  double measure(Entry& entry) {
    clock_.start();
    for (int64_t i = 0; i < entry.replays; ++i) entry.graph->replay();
    return clock_.stop_us() / static_cast<double>(entry.replays * entry.products);
  }

 private:
  const kernels::GpuTable& table_;
  OwnStream& stream_;
  const Problem& problem_;
  model::GpuClock clock_;
  at::Tensor x_, y_;
};

/// What one product reads of a weight.
size_t read_bytes(const Entry& entry) {
  const model::Weight& weight = *entry.copies.front();
  const auto* several = dynamic_cast<const model::FastestWeight*>(&weight);
  return several != nullptr ? several->chosen(entry.of->problem.tokens).weight->bytes()
                            : weight.bytes();
}

/// Copies that together pass so many bytes of what a product reads, and their graph.
/// @return empty, or what went wrong
std::string prepare(Entry& entry, Runner& runner, double rotated_bytes) {
  try {  // torch reports its failures by exceptions
    do {
      auto made = entry.make();
      if (!made.ok()) return made.error().message;
      entry.copies.push_back(std::move(made).value());
      if (entry.copies.size() == 1) {
        const std::string wrong = runner.check(entry, *entry.copies.front());
        if (!wrong.empty()) return wrong;
      }
      rotated_bytes -= static_cast<double>(read_bytes(entry));
    } while (rotated_bytes > 0);
    runner.record(entry);
    return runner.check(entry, *entry.copies.back());
  } catch (const c10::Error& error) {
    return first_line(error.what_without_backtrace());
  }
}

Record record_of(const Entry& entry) {
  const Problem& problem = entry.of->problem;
  Record record{.problem = problem.text(), .candidate = entry.name, .selectable = entry.selectable};
  const auto* several = dynamic_cast<const model::FastestWeight*>(entry.copies.front().get());
  if (several != nullptr)
    record.candidate += fmt::format(" ({})", several->chosen(problem.tokens).name);
  record.us = summarize(entry.samples_us);
  record.max_error = entry.max_error;
  record.samples_us = entry.samples_us;
  record.copies = static_cast<int64_t>(entry.copies.size());
  record.weight_bytes = entry.copies.front()->bytes();
  record.flops = 2.0 * static_cast<double>(problem.tokens) * static_cast<double>(problem.outputs) *
                 static_cast<double>(problem.inputs);
  record.gb_per_second = static_cast<double>(read_bytes(entry)) / record.us.median / 1e3;
  record.gflop_per_second = record.flops / record.us.median / 1e3;
  return record;
}

}  // namespace

Result<Comparison> compare_on_gpu(const std::vector<Problem>& problems,
                                  const CompareOptions& options, const model::Compute& compute,
                                  const std::function<void(const std::string&)>& step,
                                  const std::atomic<bool>* interrupted) {
  LACUNA_CHECK(check_one_shape(problems));
  if (const auto why_not = model::gpu_library_refusal())
    return not_possible("bench --device cuda: {}", *why_not);
  const c10::InferenceMode inference;
  OwnStream stream(compute.device);
  at::manual_seed(options.seed);
  Comparison result{.problems = problems};
  std::vector<Problem> all = problems;
  for (const Problem& problem : problems)
    if (kernels::dtype_of(problem.values) != problem.activations)
      return not_possible("{}: on a GPU weights and activations of one type are timed.",
                          problem.text());
  if (std::find(all.begin(), all.end(), dense_problem(all.front())) == all.end())
    all.push_back(dense_problem(all.front()));
  const model::Compute typed{compute.device, model::scalar_type(all.front().activations)};

  Runner runner(all.front(), typed, stream);
  std::vector<Case> cases;
  cases.reserve(all.size());
  std::vector<Entry> entries;
  for (const Problem& problem : all) {
    if (step) step(problem.text());
    Case& c = cases.emplace_back(Case{problem, random_weight_on_gpu(problem, typed), {}});
    c.exact = exact_product(runner.x(), c.dense);
    for (Entry& entry : entries_of(c, typed, result.refused)) {
      if (interrupted != nullptr && interrupted->load())
        return Error{Code::kInterrupted, "interrupted"};
      const std::string wrong = prepare(entry, runner, options.rotated_bytes);
      if (wrong.empty())
        entries.push_back(std::move(entry));
      else
        result.failed.push_back({problem.text(), entry.name, wrong});
    }
  }
  for (; result.rounds < options.least_rounds; ++result.rounds)
    for (size_t i = 0; i < entries.size(); ++i) {
      Entry& entry = entries[result.rounds % 2 == 0 ? i : entries.size() - 1 - i];
      entry.samples_us.push_back(runner.measure(entry));
    }
  for (const Entry& entry : entries) result.records.push_back(record_of(entry));
  set_ratios(result, dense_problem(all.front()));
  return result;
}

}  // namespace lacuna::bench
