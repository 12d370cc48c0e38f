#include "lacuna/prune/prune_linear.h"

#include <cmath>

#include "lacuna/core/clock.h"
#include "lacuna/format/compact.h"
#include "lacuna/prune/about.h"
#include "lacuna/prune/grid.h"

namespace lacuna::prune {
namespace {

constexpr double kNoticeable = 0.005;  // of a sparsity that was missed: worth a warning

/// The method of one layer, without refinements where they are not wanted.
const Method& method_for(const Run& run, const std::string& name) {
  return !run.unrefined || any_matches(run.refined, name) ? *run.method : *run.unrefined;
}

/// What is asked of one layer.
Request request_of(const Run& run, const std::string& name) {
  Request request = run.options.request;
  if (const auto found = run.allotted.find(name); found != run.allotted.end())
    request.sparsity = found->second;
  return request;
}

}  // namespace

Status choose_refined(Run& run) {
  if (run.options.refine_target.empty()) return {};
  LACUNA_CHECK(
      check_all_match(run.options.refine_target, prunable_names(run.spec), "--refine-target"));
  LACUNA_TRY(run.refined, compile(run.options.refine_target, "--refine-target"));
  PruneOptions plain = run.options;
  plain.refine = {"none"};
  LACUNA_TRY(run.unrefined, method_of(plain));
  if (run.unrefined->name() == run.method->name())
    return usage_error("--refine-target: {} refines nothing. Leave it out.", run.method->name());
  return {};
}

Result<at::Tensor> prune_linear(Run& run, const std::string& name, InputStatistics* inputs,
                                Journal::Block& finished) {
  const auto start = Clock::now();
  const auto named = [&](const Error& error) {
    return Error{error.code, fmt::format("{}: {}", name, error.message)};
  };
  // With dense columns every weight has its own inputs.
  if (inputs != nullptr && run.options.request.rest.kind == format::PatternKind::kDense) {
    run.clock.enter("factor");
    const Status ready = run.method->prepare(*inputs, run.options.request);
    if (!ready.ok()) return named(ready.error());
  }
  run.clock.enter("load");
  LACUNA_TRY(const Tensor dense, run.checkpoint.dense(name));
  // Across the bus as it is stored: .to() with both would convert first.
  const at::Tensor weight = model::wrap(dense).to(run.options.compute.device).to(at::kFloat);
  run.clock.enter("solve");
  Request request = request_of(run, name);
  request.values = dense.dtype;
  if (request.keep_mask) request.pattern = run.checkpoint.weights().at(name).pattern;
  if (auto gradient = run.gradients.extract(name); !gradient.empty())
    request.gradient = std::move(gradient.mapped());
  auto pruned = method_for(run, name).prune(weight, inputs ? *inputs : InputStatistics(), request);
  if (!pruned.ok()) return named(pruned.error());
  // What codes stand for is not rounded.
  const at::Tensor stored = pruned->grid ? pruned->weight.to(weight.device())
                                         : pruned->weight.to(model::scalar_type(dense.dtype));
  if (!stored.isfinite().all().item<bool>())
    return check_failed("{}: an updated weight is too large for {}. Raise --damping.", name,
                        long_name(dense.dtype));
  run.clock.enter("error");
  LayerReport layer{name};
  const at::Tensor zeros = pruned->grid ? pruned->mask.logical_not() : stored == 0;
  layer.sparsity =
      static_cast<double>(zeros.sum().item<int64_t>()) / static_cast<double>(stored.numel());
  layer.error = inputs ? relative_error(weight, stored.to(at::kFloat), inputs->gram,
                                        run.options.request.executor)
                       : -1;
  layer.damping = pruned->damping;
  layer.iterations = pruned->iterations;
  layer.fell_back = pruned->fell_back;
  if (inputs != nullptr && inputs->square_sums.defined())
    layer.dead_inputs = (inputs->square_sums == 0).sum().item<int64_t>();
  layer.seconds = seconds_since(start);
  if (const double off = layer.sparsity - request.sparsity;
      !request.keep_mask && request.pattern.kind == format::PatternKind::kBlock &&
      std::abs(off) > kNoticeable)
    pruned->warnings.push_back(fmt::format("whole blocks reach sparsity {:.4f} (asked for {:.4f})",
                                           layer.sparsity, request.sparsity));
  for (const std::string& warning : pruned->warnings)
    finished.notes["warnings"].push_back(run.warn(fmt::format("{}: {}", name, warning)));
  finished.notes["layers"].push_back(to_json(layer));
  run.clock.enter("journal");
  if (pruned->grid) {
    const auto coded = coded_matrix(*pruned, request.pattern, dense.dtype, request.coder);
    if (!coded.ok()) return named(coded.error());
    LACUNA_CHECK(finished.add(name, *coded));
  } else {
    finished.tensors.push_back({name, model::unwrap(stored)});
  }
  run.report.layers.push_back(std::move(layer));
  return stored;
}

}  // namespace lacuna::prune
