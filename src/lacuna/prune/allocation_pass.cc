#include "lacuna/prune/allocation_pass.h"

#include <algorithm>
#include <cmath>

#include "lacuna/prune/budget.h"
#include "lacuna/prune/hybrid.h"
#include "lacuna/prune/statistics_pass.h"

namespace lacuna::prune {
namespace {

Result<std::vector<LayerShare>> measured_shares(Run& run) {
  std::vector<LayerShare> all;
  Request request = run.options.request;
  request.group = request.group.value_or(run.method->default_group());
  const bool by_rows =
      request.pattern.kind == format::PatternKind::kUnstructured && request.group == Group::kRow;
  const auto add_block = [&](int64_t layer, const InputsByTarget& inputs) -> Status {
    std::vector<LayerShare> shares;
    std::vector<at::Tensor> weights;
    std::vector<const InputStatistics*> of;
    for (const std::string& linear : run.targets_of(layer)) {
      const std::string name = run.weight_name(layer, linear);
      const auto& shape = run.checkpoint.weights().at(name).shape;
      shares.push_back({name, layer, shape[0], shape[1], by_rows ? shape[0] : 1});
      if (!run.options.allocation.needs_inputs()) continue;
      LACUNA_TRY(const Tensor dense, run.checkpoint.dense(name));
      weights.push_back(model::wrap(dense).to(run.options.compute.device).to(at::kFloat));
      of.push_back(inputs.at(linear).get());
      if (const Status fine = run.method->check(weights.back(), *of.back(), run.options.request);
          !fine.ok())
        return Error{fine.error().code, fmt::format("{}: {}", name, fine.error().message)};
    }
    run.clock.enter("allocation");
    if (!shares.empty()) measure(shares, weights, of, run.options.allocation, request);
    all.insert(all.end(), shares.begin(), shares.end());
    return {};
  };
  if (run.options.allocation.needs_inputs() && !run.statistics) {
    LACUNA_CHECK(dense_pass(run, add_block));
    return all;
  }
  run.progress.begin(run.spec.layers);
  for (int64_t layer = 0; layer < run.spec.layers; ++layer) {
    InputsByTarget inputs;
    if (run.options.allocation.needs_inputs()) {
      run.clock.enter("load");
      LACUNA_TRY(inputs, read_inputs(*run.statistics, layer, run.options.compute.device));
    }
    LACUNA_CHECK(add_block(layer, inputs));
    run.release(layer);
    LACUNA_CHECK(run.progress.step(1, fmt::format("allocation {}/{}", layer + 1, run.spec.layers)));
  }
  return all;
}

void allot_dense_columns(Run& run) {
  std::vector<std::string> names;
  std::vector<Shape> shapes;
  for (int64_t layer = 0; layer < run.spec.layers; ++layer)
    for (const std::string& linear : run.targets_of(layer)) {
      names.push_back(run.weight_name(layer, linear));
      shapes.push_back(run.checkpoint.weights().at(names.back()).shape);
    }
  const auto sparsities = hybrid_sparsities(shapes, run.options.request);
  for (size_t i = 0; i < names.size(); ++i) run.allotted[names[i]] = sparsities[i];
}

}  // namespace

Status allocation_pass(Run& run) {
  const AllocationOptions& wanted = run.options.allocation;
  if (run.options.request.rest.kind != format::PatternKind::kDense) allot_dense_columns(run);
  if (wanted.none()) return {};
  LACUNA_TRY(const auto shares, measured_shares(run));
  LACUNA_TRY(const Target target, target_of(run.checkpoint, shares, wanted, run.options.request));
  LACUNA_TRY(const auto sparsities, allocate(shares, wanted, target.cost, target.amount));
  double dropped = 0, all = 0;
  for (size_t i = 0; i < shares.size(); ++i) {
    run.allotted[shares[i].name] = sparsities[i];
    dropped += sparsities[i] * static_cast<double>(shares[i].weights());
    all += static_cast<double>(shares[i].weights());
  }
  run.options.request.sparsity = dropped / all;
  run.report.allocation = allocation_name(wanted.by);
  if (wanted.budget) run.report.budget = wanted.budget->text();
  const auto [least, most] = std::minmax_element(sparsities.begin(), sparsities.end());
  run.progress.log(fmt::format("allocation {}: sparsity {:.4f}, of the layers {:.4f} to {:.4f}",
                               run.report.allocation, run.options.request.sparsity, *least, *most));
  return {};
}

void check_budget(Run& run) {
  constexpr double kClose = 0.001;
  const auto& budget = run.options.allocation.budget;
  if (!budget) return;
  if (budget->kind == Budget::Kind::kMilliseconds) {
    double predicted = run.options.allocation.other_milliseconds;
    for (const LayerReport& layer : run.report.layers) {
      const auto time = run.options.allocation.milliseconds(layer.name, layer.sparsity);
      if (!time.ok()) {
        run.warn(fmt::format("the budget {}: {}", budget->text(), time.error().message));
        return;
      }
      predicted += *time;
    }
    run.report.budget_reached = predicted;
    if (predicted > (1 + kClose) * budget->amount)
      run.warn(fmt::format("the budget {} came to {}", budget->text(), budget->told(predicted)));
    return;
  }
  run.report.budget_reached = reached(*budget, run.out, run.report.sparsity);
  if (std::abs(run.report.budget_reached - budget->amount) <= kClose * budget->amount) return;
  run.warn(
      fmt::format("the budget {} came to {:.6g}: more weights are zero than were dropped, or whole "
                  "blocks don't come out even",
                  budget->text(), run.report.budget_reached));
}

}  // namespace lacuna::prune
