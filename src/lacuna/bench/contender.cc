#include "lacuna/bench/contender.h"

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/quantized/PackedParams.h>

#include <algorithm>
#include <memory>

#include "lacuna/core/executor.h"
#include "lacuna/core/large_block.h"
#include "lacuna/format/quantize.h"
#include "lacuna/format/rows.h"
#include "lacuna/kernels/linear_bitmap/linear_bitmap.h"
#include "lacuna/kernels/linear_coded/linear_coded.h"
#include "lacuna/kernels/linear_csr/linear_csr.h"
#include "lacuna/kernels/linear_dense/linear_dense.h"
#include "lacuna/kernels/linear_nm/linear_nm.h"
#include "lacuna/kernels/linear_stream/linear_stream.h"
#include "lacuna/model/linear.h"
#include "lacuna/model/random_weight.h"
#include "lacuna/model/torch.h"

namespace lacuna::bench {
namespace {

using format::PatternKind;
using kernels::Device;
using kernels::needs;
using kernels::Problem;
using kernels::Support;

/// Where a model keeps its weights too.
Bytes copy_of(const Bytes& bytes) { return in_large_pages({bytes}, model::torch_executor()); }

format::CompactMatrix copy_of(format::CompactMatrix matrix) {
  for (Bytes* part : {&matrix.bitmap, &matrix.values, &matrix.offsets, &matrix.block_columns,
                      &matrix.block_offsets, &matrix.scales, &matrix.zero_points})
    *part = copy_of(*part);
  return matrix;
}

/// Our own kernels run on a pool like that of a decode step: torch's sleeps between two products,
/// and to wake it costs as much as a small one takes.
const Executor& pool_executor() {
  static std::unique_ptr<ThreadPool> pool;
  static Executor executor;
  if (!pool || pool->threads() != at::get_num_threads()) {
    pool = std::make_unique<ThreadPool>(at::get_num_threads());
    executor = pool->executor();
  }
  return executor;
}

bool one_type(const Problem& problem) {
  return kernels::dtype_of(problem.values) == problem.activations;
}

// --- The candidates of kernels/ ------------------------------------------------------------------

/// The rows of a weight as LinearCandidate::run takes them.
class Rows : public Packed {
 public:
  static Result<std::unique_ptr<Packed>> pack(const Weight& weight) {
    auto rows = std::make_unique<Rows>();
    if (weight.compact) {
      LACUNA_TRY(rows->compact_, format::CompactRows::make(copy_of(*weight.compact)));
      rows->view_ = rows->compact_->view();
    } else {
      const Bytes bytes(std::make_shared<at::Tensor>(weight.dense),
                        static_cast<const std::byte*>(weight.dense.const_data_ptr()),
                        weight.dense.nbytes());
      rows->dense_ = model::wrap({model::dtype_of(weight.dense.scalar_type()),
                                  {weight.dense.size(0), weight.dense.size(1)},
                                  copy_of(bytes)});
      rows->view_ = format::dense_rows(rows->dense_.const_data_ptr(),
                                       model::dtype_of(rows->dense_.scalar_type()),
                                       rows->dense_.size(0), rows->dense_.size(1));
    }
    return std::unique_ptr<Packed>(std::move(rows));
  }
  size_t bytes() const override { return compact_ ? compact_->size_bytes() : dense_.nbytes(); }
  const format::RowsView& view() const { return view_; }
  const at::Tensor& dense() const { return dense_; }

 private:
  at::Tensor dense_;
  std::optional<format::CompactRows> compact_;
  format::RowsView view_;
};

constexpr const char* kRowsLayout = "rows";

/// A form of its own that LinearCandidate::run takes as rows too: slices of a very sparse weight,
/// or the stream of one of 16 bits.
template <class Form>
class Repacked : public Packed {
 public:
  static Result<std::unique_ptr<Packed>> pack(const Weight& weight) {
    auto packed = std::make_unique<Repacked>();
    LACUNA_TRY(packed->form_, Form::pack(*weight.compact, model::torch_executor()));
    return std::unique_ptr<Packed>(std::move(packed));
  }
  size_t bytes() const override { return form_->size_bytes(); }
  const format::RowsView& view() const { return form_->view(); }

 private:
  std::optional<Form> form_;
};
using PackedSlices = Repacked<kernels::linear_csr::Slices>;
using PackedStream = Repacked<kernels::linear_stream::ValueStream>;

/// What contenders made of a list's candidates have in common.
/// @param run  (problem, packed weight, product, workspace); the workspace has scratch_bytes
template <class C, class Run>
Contender from_list(const C& candidate, std::string layout,
                    std::function<size_t(const Problem&)> scratch_bytes, Run run) {
  Contender contender;
  contender.name = candidate.name;
  contender.candidate = true;
  contender.layout = std::move(layout);
  contender.supports = [&candidate](const Problem& problem) {
    return candidate.supports(problem, Device::this_cpu());
  };
  contender.scratch_bytes = scratch_bytes;
  contender.run = [run, scratch_bytes, workspace = std::make_shared<LargeBlock>()](
                      const Problem& problem, const Packed& weight, const at::Tensor& x,
                      at::Tensor& y) {
    if (!y.defined()) y = at::empty({problem.tokens, problem.outputs}, x.options());
    if (workspace->size() < scratch_bytes(problem)) *workspace = LargeBlock(scratch_bytes(problem));
    run(problem, weight,
        format::RowProduct{.dtype = problem.activations,
                           .tokens = problem.tokens,
                           .x = x.const_data_ptr(),
                           .x_stride = problem.inputs,
                           .y = y.mutable_data_ptr(),
                           .y_stride = problem.outputs},
        workspace->data());
  };
  return contender;
}

/// @tparam Layout  Rows or Repacked
template <class Layout>
Contender of_candidate(const kernels::LinearCandidate& candidate, std::string layout) {
  Contender contender = from_list(candidate, std::move(layout), candidate.workspace_bytes,
                                  [&candidate](const Problem&, const Packed& weight,
                                               const format::RowProduct& product, void* workspace) {
                                    candidate.run(static_cast<const Layout&>(weight).view(),
                                                  product, workspace, pool_executor());
                                  });
  contender.pack = Layout::pack;
  contender.bound = [&candidate](const Problem& problem) -> kernels::ErrorBound {
    return {kernels::float_roundings(candidate.name, problem.inputs), problem.inputs,
            problem.activations, kernels::flushes_denormals(candidate.name)};
  };
  return contender;
}

constexpr const char* kStreamLayout = "stream";

Contender of_operation(const kernels::LinearOperation& operation,
                       const kernels::LinearCandidate& candidate) {
  if (operation.name == kernels::linear_csr::kOperation)
    return of_candidate<PackedSlices>(candidate, "slices");
  if (operation.name == kernels::linear_stream::kOperation)
    return of_candidate<PackedStream>(candidate, kStreamLayout);
  return of_candidate<Rows>(candidate, kRowsLayout);
}

/// A quantised weight as CodedCandidate reads it.
class CodedStream : public Packed {
 public:
  static Result<std::unique_ptr<Packed>> pack(const Weight& weight) {
    auto packed = std::make_unique<CodedStream>();
    LACUNA_TRY(packed->stream_,
               kernels::linear_coded::Stream::pack(*weight.compact, model::torch_executor()));
    return std::unique_ptr<Packed>(std::move(packed));
  }
  size_t bytes() const override { return stream_->size_bytes(); }
  const kernels::linear_coded::Stream& stream() const { return *stream_; }

 private:
  std::optional<kernels::linear_coded::Stream> stream_;
};

Contender of_coded(const kernels::linear_coded::CodedCandidate& candidate) {
  namespace linear_coded = kernels::linear_coded;
  Contender contender =
      from_list(candidate, "coded", linear_coded::workspace_bytes,
                [&candidate](const Problem& problem, const Packed& weight,
                             const format::RowProduct& product, void* workspace) {
                  linear_coded::run(linear_coded::plan_for(candidate, problem),
                                    static_cast<const CodedStream&>(weight).stream(), product,
                                    workspace, pool_executor());
                });
  contender.pack = CodedStream::pack;
  // Integer sums of groups, float32 sums over groups of twice the magnitude (x + 128), scales.
  contender.bound = [](const Problem& problem) -> kernels::ErrorBound {
    return {3 * (static_cast<double>(problem.inputs) / linear_coded::kChunk + 8), problem.inputs,
            problem.activations, /*flushes_denormals=*/false};
  };
  // Each x is off by half a step of its token at most, and the sums may reach 128 steps each.
  contender.slack = [](const Weight& weight, const at::Tensor& x) {
    const at::Tensor steps = x.to(at::kDouble).abs().amax(1, /*keepdim=*/true) / 127;
    const at::Tensor sums = weight.dense.abs().sum(1, /*keepdim=*/true, at::kDouble);
    const double groups = static_cast<double>(x.size(1)) / linear_coded::kChunk + 8;
    const double share = 0.5 * (1 + 0x1p-20) + 256 * groups * 0x1p-24;
    return at::matmul(steps * share, sums.t());
  };
  return contender;
}

// --- Those that stand on torch -------------------------------------------------------------------

kernels::ErrorBound library_bound(const Problem& problem) {
  return {kernels::float_roundings_in_any_order(problem.inputs), problem.inputs,
          problem.activations, /*flushes_denormals=*/true};
}

size_t no_scratch(const Problem&) { return 0; }

/// at::linear on the plain weight: what a model in torch runs.
Contender torch_linear() {
  Contender contender;
  contender.name = "cpu_torch_linear";
  contender.layout = kRowsLayout;
  contender.supports = [](const Problem& problem) {
    return Support::all({needs(problem.pattern.kind == PatternKind::kDense, "a dense weight"),
                         needs(one_type(problem), "values and activations of one type")});
  };
  contender.pack = Rows::pack;
  contender.run = [](const Problem&, const Packed& weight, const at::Tensor& x, at::Tensor& y) {
    y = at::linear(x, static_cast<const Rows&>(weight).dense());
  };
  contender.scratch_bytes = no_scratch;
  contender.bound = library_bound;
  return contender;
}

/// An operator of torch that has no C++ function, if this build of libtorch has it.
std::optional<c10::OperatorHandle> torch_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchema({name, ""});
}

/// The weight in oneDNN's own blocked layout for this many tokens, as torch.compile uses it.
class OneDnnWeight : public Packed {
 public:
  static Result<std::unique_ptr<Packed>> pack(const Weight& weight) {
    using Reorder = at::Tensor(const at::Tensor&, std::optional<int64_t>);
    using Size = int64_t(const at::Tensor&);
    auto packed = std::make_unique<OneDnnWeight>();
    packed->weight_ = torch_operator("mkldnn::_reorder_linear_weight")
                          ->typed<Reorder>()
                          .call(weight.dense, weight.problem.tokens);
    packed->bytes_ =
        static_cast<size_t>(torch_operator("mkldnn::_nbytes")->typed<Size>().call(packed->weight_));
    return std::unique_ptr<Packed>(std::move(packed));
  }
  size_t bytes() const override { return bytes_; }
  const at::Tensor& weight() const { return weight_; }

 private:
  at::Tensor weight_;
  size_t bytes_ = 0;
};

Contender onednn_packed() {
  Contender contender;
  contender.name = "cpu_onednn_packed";
  contender.layout = "onednn";
  contender.supports = [](const Problem& problem) {
    const bool bf16 = problem.values == kernels::Values::kBF16;
    return Support::all(
        {needs(problem.pattern.kind == PatternKind::kDense, "a dense weight"),
         needs(bf16 || problem.values == kernels::Values::kF32, "f32 or bf16 values"),
         needs(one_type(problem), "values and activations of one type"),
         needs(!bf16 || Device::this_cpu().cpu.avx512, "AVX-512 for bf16"),
         needs(torch_operator("mkldnn::_reorder_linear_weight") &&
                   torch_operator("mkldnn::_linear_pointwise") && torch_operator("mkldnn::_nbytes"),
               "a libtorch with oneDNN")});
  };
  contender.pack = OneDnnWeight::pack;
  contender.run = [](const Problem&, const Packed& weight, const at::Tensor& x, at::Tensor& y) {
    using Linear = at::Tensor(
        const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, std::string_view,
        c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);
    static const auto linear =
        torch_operator("mkldnn::_linear_pointwise")->typed<Linear>();  // looked up once
    y = linear.call(x, static_cast<const OneDnnWeight&>(weight).weight(), {}, "none",
                    c10::List<std::optional<at::Scalar>>(), {});
  };
  contender.scratch_bytes = no_scratch;
  contender.bound = library_bound;
  return contender;
}

/// torch's dynamically quantised Linear: int8 weights with a scale a row, x rounded to 7 bits at
/// each call (reduce_range, as torch's own module does), int32 sums.
class DynamicInt8Weight : public Packed {
 public:
  static Result<std::unique_ptr<Packed>> pack(const Weight& weight) {
    auto packed = std::make_unique<DynamicInt8Weight>();
    const int64_t rows = weight.dense.size(0);
    const at::Tensor codes =
        at::quantize_per_channel(weight.dense, weight.row_scales.to(at::kDouble),
                                 at::zeros({rows}, at::kLong), /*axis=*/0, at::kQInt8);
    std::vector<c10::IValue> stack = {codes, c10::IValue()};  // no bias
    torch_operator(kPrepack)->callBoxed(&stack);
    packed->params_ = stack.front().toCustomClass<LinearPackedParamsBase>();
    // Its own layout tells no size: the codes, and a scale and a sum of codes for each row.
    packed->bytes_ = static_cast<size_t>(codes.numel() + rows * 8);
    return std::unique_ptr<Packed>(std::move(packed));
  }
  size_t bytes() const override { return bytes_; }
  at::Tensor multiply(const at::Tensor& x) const {
    return params_->apply_dynamic(x, /*reduce_range=*/true);
  }
  static constexpr const char* kPrepack = "quantized::linear_prepack";

 private:
  c10::intrusive_ptr<LinearPackedParamsBase> params_;
  size_t bytes_ = 0;
};

Contender torch_dynamic_int8() {
  Contender contender;
  contender.name = "cpu_torch_dynamic_int8";
  contender.layout = "dynamic_int8";
  contender.supports = [](const Problem& problem) {
    return Support::all({needs(problem.pattern.kind == PatternKind::kDense, "a dense weight"),
                         needs(problem.values == kernels::Values::kInt8, "int8 values"),
                         needs(torch_operator(DynamicInt8Weight::kPrepack).has_value(),
                               "a libtorch with quantized::linear_prepack")});
  };
  contender.pack = DynamicInt8Weight::pack;
  // It takes float32 alone: to a model in bf16 the conversions are part of its price.
  contender.run = [](const Problem&, const Packed& weight, const at::Tensor& x, at::Tensor& y) {
    y = static_cast<const DynamicInt8Weight&>(weight)
            .multiply(x.to(at::kFloat))
            .to(x.scalar_type());
  };
  contender.scratch_bytes = no_scratch;
  contender.bound = library_bound;
  // All of x shares 127 steps between its least and its largest value, 0 among them. Each x is off
  // by half a step at most, at the ends too, where the rounded zero point cuts off as much.
  contender.slack = [](const Weight& weight, const at::Tensor& x) {
    const at::Tensor wide = x.to(at::kDouble);
    const double least = std::min(0.0, wide.min().item<double>());
    const double largest = std::max(0.0, wide.max().item<double>());
    const double half_step = (largest - least) / 127 / 2 * (1 + 0x1p-20);  // float32 arithmetic
    const at::Tensor sums = weight.dense.abs().sum(1, /*keepdim=*/false, at::kDouble);
    return (half_step * sums).expand({x.size(0), sums.size(0)}).contiguous();
  };
  return contender;
}

/// model::Linear with more tokens than a machine's kernels take: expands the weight into the
/// scratch that all layers share, then takes the dense product.
class CompactLinear : public Packed {
 public:
  static Result<std::unique_ptr<Packed>> pack(const Weight& weight) {
    auto packed = std::make_unique<CompactLinear>();
    const at::ScalarType dtype = model::scalar_type(weight.problem.activations);
    LACUNA_TRY(packed->linear_,
               model::Linear::compact(copy_of(*weight.compact), {}, {at::kCPU, dtype}));
    return std::unique_ptr<Packed>(std::move(packed));
  }
  size_t bytes() const override { return linear_.weight_bytes(); }
  const model::Linear& linear() const { return linear_; }

 private:
  model::Linear linear_;
};

Contender expanded() {
  Contender contender;
  contender.name = "cpu_expand_torch_linear";
  contender.layout = "linear";
  contender.supports = [](const Problem& problem) {
    return Support::all(
        {needs(problem.pattern.kind != PatternKind::kDense, "a sparse weight"),
         needs(kernels::dtype_of(problem.values).has_value(), "f32, bf16 or f16 values"),
         needs(problem.tokens > format::kMaxTokens, "17 tokens or more"),
         needs(one_type(problem) || problem.activations == DType::kF32,
               "activations that hold every value")});
  };
  contender.pack = CompactLinear::pack;
  contender.run = [](const Problem&, const Packed& weight, const at::Tensor& x, at::Tensor& y) {
    y = static_cast<const CompactLinear&>(weight).linear().multiply_expanded(x);
  };
  contender.scratch_bytes = [](const Problem& problem) {
    return static_cast<size_t>(problem.outputs * problem.inputs) * size_bytes(problem.activations);
  };
  contender.bound = library_bound;
  return contender;
}

}  // namespace

Result<Weight> random_weight(const Problem& problem, uint64_t seed) {
  const bool int8 = problem.values == kernels::Values::kInt8;
  const bool coded = !kernels::dtype_of(problem.values);
  const DType dtype = kernels::dtype_of(problem.values).value_or(DType::kF32);
  const Tensor dense = model::random_weight(problem.outputs, problem.inputs, dtype, problem.pattern,
                                            problem.sparsity, seed, 1);
  Weight weight{.problem = problem, .dense = model::wrap(dense)};
  const bool sparse = problem.pattern.kind != PatternKind::kDense;
  if (sparse) {
    LACUNA_TRY(weight.compact, format::compress(dense, problem.pattern, model::torch_executor()));
  }
  if (coded) {
    LACUNA_TRY(const auto code, format::Quantization::parse(kernels::text(problem.values)));
    const Executor executor = model::torch_executor();
    LACUNA_TRY(weight.compact, sparse ? format::quantize(*weight.compact, code, executor)
                                      : format::quantize(dense, code, executor));
    weight.dense = model::wrap(format::expand(*weight.compact));
    if (int8)
      weight.row_scales =
          model::wrap({DType::kBF16, {problem.outputs}, weight.compact->scales}).to(at::kFloat);
  }
  return weight;
}

Problem dense_problem(const Problem& problem) {
  Problem dense = problem;
  dense.operation = kernels::linear_dense::kOperation;
  dense.pattern = {};
  dense.sparsity = 0;
  return dense;
}

std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

std::vector<Contender> contenders(const kernels::LinearOperation& operation) {
  std::vector<Contender> all;
  for (const kernels::LinearCandidate& candidate : operation.candidates())
    if (candidate.name != "reference") all.push_back(of_operation(operation, candidate));
  // The other packing of the same weight stands beside its compact layout, chosen or not.
  if (operation.name == kernels::linear_bitmap::kOperation ||
      operation.name == kernels::linear_nm::kOperation)
    for (const auto& candidate : kernels::linear_stream::candidates())
      if (candidate.name != "reference") {
        all.push_back(of_candidate<PackedStream>(candidate, kStreamLayout));
        all.back().candidate = false;
      }
  for (const auto& candidate : kernels::linear_coded::candidates())
    all.push_back(of_coded(candidate));
  if (operation.weight == PatternKind::kDense) {
    all.push_back(torch_linear());
    all.push_back(onednn_packed());
    all.push_back(torch_dynamic_int8());
  } else {
    all.push_back(expanded());
  }
  return all;
}

}  // namespace lacuna::bench
