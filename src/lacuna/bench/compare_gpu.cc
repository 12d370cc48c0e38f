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
#include "lacuna/model/scratch.h"

namespace lacuna::bench {
namespace {

using kernels::Problem;
using model::WeightPtr;

/// Of the norm: as far as bf16 rounds one number; float16 rounds an eighth of that, cuBLAS some
/// more.
constexpr double kMostError = 0x1p-8, kMostErrorOfF16 = 0x1p-10;
constexpr double kReplayUs = 2000;      // of a measurement, about
constexpr int64_t kLeastProducts = 16;  // of a graph
/// A model's product of codes with more tokens takes memory each time: that can't be recorded.
constexpr int64_t kMostTokensOfCodes = 64;

bool has_codes(const Problem& problem) { return !kernels::dtype_of(problem.values); }

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
    scratch_ = model::scratch_buffer();
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
  at::Tensor scratch_;  // of the products: another one may need a larger one later
};

/// A product in float64.
struct Exact {
  std::string of;  ///< what W or x was rounded to first; empty: nothing
  at::Tensor product;
};

/// A problem with its weight on the GPU, and what its product may be.
struct Case {
  Problem problem;
  at::Tensor dense;                            ///< of codes what they stand for, in the type of x
  std::optional<format::CompactMatrix> codes;  ///< as a model has them, on the CPU
  at::Tensor numbers, scales;                  ///< what kernels of codes pack
  std::vector<Exact> exact;                    ///< the first of nothing rounded
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
  // Of the last product checked:
  std::string product_of;  ///< Exact::of that it is nearest to
  double max_error = 0;    ///< to the first of all
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

/// x as kernels round it, float64: codes, e4m3 or else int8, times the scale of each token.
at::Tensor rounded_to_codes(const at::Tensor& x, bool e4m3) {
  const at::Tensor codes =
      at::empty(x.sizes(), x.options().dtype(e4m3 ? at::kFloat8_e4m3fn : at::kChar));
  const at::Tensor scales = at::empty({x.size(0), 1}, x.options().dtype(at::kFloat));
  const kernels::GpuRounding rounding = {x.size(0),
                                         x.size(1),
                                         e4m3,
                                         x.const_data_ptr(),
                                         codes.mutable_data_ptr(),
                                         scales.mutable_data_ptr<float>()};
  const kernels::GpuTable& library = **kernels::gpu_library();
  const int error = library.round_tokens(&rounding, model::gpu_stream(x.device()));
  TORCH_CHECK(error == 0, "x can't be rounded: ", library.error_text(error));
  return codes.to(at::kDouble) * scales;
}

/// Codes of a random weight. A model may hold them as dense numbers, and its kernels may round x.
Result<Case> case_of_codes(const Problem& problem, const model::Compute& compute,
                           const at::Tensor& x, uint64_t seed) {
  LACUNA_TRY(Weight weight, random_weight(problem, seed));
  const at::Tensor meant = weight.dense.to(compute.device);
  const format::CompactMatrix& codes = *weight.compact;
  const int64_t groups = codes.quantization.groups(codes.columns);
  Case c{.problem = problem, .dense = meant.to(compute.dtype)};
  c.numbers = model::codes_as_numbers(codes, compute).clone();
  c.scales = model::wrap({DType::kBF16, {codes.rows, groups}, codes.scales}).to(compute.device);
  c.exact = {{"", exact_product(x, meant)},
             {fmt::format("{} weights", kernels::text(kernels::values_of(problem.activations))),
              exact_product(x, c.dense)}};
  constexpr int64_t kRoundedAtOnce = 16;  // columns
  const bool e4m3 = problem.values == kernels::Values::kFP8;
  if (compute.int8_activations && (e4m3 || problem.values == kernels::Values::kInt8) &&
      problem.activations == DType::kBF16 && problem.inputs % kRoundedAtOnce == 0)
    c.exact.push_back({"x in codes", exact_product(rounded_to_codes(x, e4m3), meant)});
  c.codes = std::move(weight.compact);
  return c;
}

Result<Case> make_case(const Problem& problem, const model::Compute& compute, const at::Tensor& x,
                       uint64_t seed) {
  if (has_codes(problem)) return case_of_codes(problem, compute, x, seed);
  Case c{.problem = problem, .dense = random_weight_on_gpu(problem, compute)};
  c.exact = {{"", exact_product(x, c.dense)}};
  return c;
}

/// What a model gets of this weight: packed once or in every form; where no kernel takes it,
/// expanded for every product, codes once.
Result<WeightPtr> as_a_model(const Case& c, model::Compute compute, bool fastest) {
  compute.fastest = fastest;
  compute.batch = c.problem.tokens;
  if (c.codes) return model::compact_weight(*c.codes, compute);
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
  const auto add_candidates = [&](const Problem& problem) {
    const bool codes = has_codes(problem), as_asked = problem == c.problem;
    auto& candidates = (*kernels::find_linear_operation(problem.operation))->gpu_candidates();
    for (const kernels::Candidate& candidate : candidates) {
      const auto support = candidate.supports(problem, kernels::Device::this_gpu());
      const auto* kernel = kernels::gpu_kernel(problem.operation, candidate.name);
      if (!support) {
        if (as_asked) refused.push_back({problem.text(), candidate.name, support.refusal()});
      } else if (kernel != nullptr) {
        // A copy, for some kernels read W as it is.
        add(candidate.name, as_asked, [&c, compute, kernel, problem, codes] {
          return model::GpuWeight::packed_for(
              *kernel, problem, compute, [&] { return (codes ? c.numbers : c.dense).clone(); },
              codes ? c.scales : at::Tensor());
        });
      } else if (candidate.name == kernels::kCublas && !codes) {
        add(candidate.name, as_asked,
            [&c]() -> Result<WeightPtr> { return model::plain_weight(c.dense.clone()); });
      }
    }
  };
  add_candidates(c.problem);
  if (c.problem.pattern.kind == format::PatternKind::kDense) {
    if (!has_codes(c.problem)) return entries;
    Problem numbers = c.problem;  // what the codes stand for is as good a dense weight
    numbers.values = kernels::values_of(c.problem.activations);
    add_candidates(numbers);
    return entries;
  }
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
    y_.fill_(std::numeric_limits<double>::quiet_NaN());
    product(weight);
    const std::vector<Exact>& all = entry.of->exact;
    entry.max_error = max_error(y_, all.front().product);
    double off = std::numeric_limits<double>::infinity();
    for (const auto& [of, exact] : all) {
      const double from = ((y_.to(at::kDouble) - exact).norm() / exact.norm()).item<double>();
      if (from < off) {  // false for NaN
        off = from;
        entry.product_of = of;
      }
    }
    const double most = y_.scalar_type() == at::kHalf ? kMostErrorOfF16 : kMostError;
    if (off <= most) return "";
    return fmt::format("wrong output: off by {:.2g} of its norm (need at most {:.2g})", off, most);
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
  std::vector<std::string> remarks;
  const auto* several = dynamic_cast<const model::FastestWeight*>(entry.copies.front().get());
  if (several != nullptr) remarks.push_back(several->chosen(problem.tokens).name);
  if (!entry.product_of.empty()) remarks.push_back(entry.product_of);
  if (!remarks.empty()) record.candidate += fmt::format(" ({})", fmt::join(remarks, ", "));
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

/// @errors kNotPossible: what can't be timed
Status check_values(const std::vector<Problem>& problems) {
  for (const Problem& problem : problems) {
    if (has_codes(problem) && problem.tokens > kMostTokensOfCodes)
      return not_possible("{}: on a GPU codes are timed with at most {} tokens, those of a step.",
                          problem.text(), kMostTokensOfCodes);
    if (!has_codes(problem) && kernels::dtype_of(problem.values) != problem.activations)
      return not_possible(
          "{}: a GPU times codes, and numbers of the type of x (got {} values, {} x). Give x that "
          "type.",
          problem.text(), kernels::text(problem.values), long_name(problem.activations));
  }
  return {};
}

}  // namespace

Result<Comparison> compare_on_gpu(const std::vector<Problem>& problems,
                                  const CompareOptions& options, const model::Compute& compute,
                                  const std::function<void(const std::string&)>& step,
                                  const std::atomic<bool>* interrupted) {
  LACUNA_CHECK(check_one_shape(problems));
  LACUNA_CHECK(check_values(problems));
  if (const auto why_not = model::gpu_library_refusal())
    return not_possible("bench --device cuda: {}", *why_not);
  const c10::InferenceMode inference;
  OwnStream stream(compute.device);
  at::manual_seed(options.seed);
  Comparison result{.problems = problems};
  std::vector<Problem> all = problems;
  if (std::find(all.begin(), all.end(), dense_problem(all.front())) == all.end())
    all.push_back(dense_problem(all.front()));
  const model::Compute typed{compute.device, model::scalar_type(all.front().activations),
                             compute.int8_activations};

  Runner runner(all.front(), typed, stream);
  std::vector<Case> cases;
  cases.reserve(all.size());
  std::vector<Entry> entries;
  for (const Problem& problem : all) {
    if (step) step(problem.text());
    LACUNA_TRY(Case made, make_case(problem, typed, runner.x(), options.seed));
    const Case& c = cases.emplace_back(std::move(made));
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
