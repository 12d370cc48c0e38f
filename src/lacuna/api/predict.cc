#include "lacuna/api/predict.h"

#include <ATen/Parallel.h>

#include <fmt/ranges.h>

#include <map>
#include <memory>
#include <set>
#include <vector>

#include "lacuna/kernels/measured.h"
#include "lacuna/model/weight.h"

namespace lacuna::api {
namespace {

/// Shares of zeros between which times lie on lines.
constexpr double kMeasuredAt[] = {0.3, 0.5, 0.7, 0.9};

/// A product of a decode step: Linears that read one input, stacked.
struct Product {
  int64_t rows = 0, columns = 0;
  DType dtype = DType::kBF16;
};

/// Names of the weights of a block that make up each product.
std::vector<std::vector<std::string>> stacks_of(const io::DecoderSpec& spec, int64_t layer) {
  const auto name = [&](const io::LinearSpec& linear) {
    return spec.weight_name(layer, linear.name);
  };
  std::vector<std::vector<std::string>> stacks = {
      {name(spec.q), name(spec.k), name(spec.v)}, {name(spec.o)}, {}, {name(spec.down)}};
  if (spec.gated) stacks[2].push_back(name(spec.gate));
  stacks[2].push_back(name(spec.up));
  return stacks;
}

Error not_measured(const std::set<std::string>& problems) {
  return not_possible("{} products were not measured on this machine. Run `lacuna tune {}` first.",
                      problems.size(), fmt::join(problems, " "));
}

}  // namespace

Result<double> predicted_milliseconds(const model::Decoder& decoder,
                                      const bench::SpeedTable& table) {
  if (!decoder.compute().device.is_cpu())
    return not_possible("the measured table is one of CPUs (the model runs on {}).",
                        decoder.compute().device.str());
  double sum = 0;
  std::set<std::string> missing;  // problems
  for (const model::Linear* linear : decoder.linears()) {
    const auto problem = linear->decode_problem();
    if (!problem)
      return not_possible(
          "`lacuna tune` measures no product of the form in which a Linear of {}x{} is held (a "
          "weight that is expanded for each product).",
          linear->out_features(), linear->in_features());
    if (const auto time = table.milliseconds(*problem); time.ok())
      // A slice of a stacked product (q of q, k and v) has its problem, and takes its share.
      sum += *time * static_cast<double>(linear->out_features()) /
             static_cast<double>(problem->outputs);
    else
      missing.insert(kernels::measured_as(*problem).text());
  }
  if (!missing.empty()) return not_measured(missing);
  return sum;
}

Result<LayerTimes> layer_times(const io::Checkpoint& checkpoint, const io::DecoderSpec& spec,
                               const format::Pattern& pattern,
                               const std::function<bool(const std::string&)>& pruned,
                               const bench::SpeedTable& table) {
  LACUNA_TRY(const model::Compute compute,
             resolve({.device = "cpu", .threads = at::get_num_threads()}, spec.dtype));
  const auto problem_of = [compute](const Product& product, const format::Pattern& under,
                                    double sparsity) {
    return model::decode_problem_of(under, product.dtype, product.rows, product.columns, sparsity,
                                    compute);
  };
  std::set<std::string> missing;  // problems
  const auto need = [&](const kernels::Problem& problem) {
    if (!table.has(problem)) missing.insert(problem.text());
  };
  LayerTimes times;
  auto products = std::make_shared<std::map<std::string, std::pair<Product, double>>>();
  const auto add = [&](const std::vector<std::string>& names) {
    Product product;
    for (const std::string& name : names) {
      const io::WeightInfo& info = checkpoint.weights().at(name);
      product.rows += info.shape[0];
      product.columns = info.shape[1];
      product.dtype = info.dtype;
    }
    if (!pruned(names.front())) {
      const auto problem = problem_of(product, {}, 0);
      need(problem);
      times.others += table.milliseconds(problem).ok() ? *table.milliseconds(problem) : 0;
      return;
    }
    for (const double sparsity : kMeasuredAt) need(problem_of(product, pattern, sparsity));
    for (const std::string& name : names)
      (*products)[name] = {product, static_cast<double>(checkpoint.weights().at(name).shape[0]) /
                                        static_cast<double>(product.rows)};
  };
  for (int64_t layer = 0; layer < spec.layers; ++layer)
    for (const auto& stack : stacks_of(spec, layer)) {
      std::vector<std::string> sparse, dense;
      for (const std::string& name : stack) (pruned(name) ? sparse : dense).push_back(name);
      // Linears of two forms are no one product.
      if (sparse.empty() || dense.empty()) {
        add(stack);
      } else {
        for (const std::string& name : stack) add({name});
      }
    }
  const std::string head = spec.lm_head + ".weight", tied = spec.embedding + ".weight";
  add({checkpoint.contains(head) ? head : tied});
  if (!missing.empty()) return not_measured(missing);
  times.pruned = [products, problem_of, pattern, table](const std::string& weight,
                                                        double sparsity) -> Result<double> {
    const auto& [product, share] = products->at(weight);
    LACUNA_TRY(const double time, table.milliseconds(problem_of(product, pattern, sparsity)));
    return share * time;
  };
  return times;
}

}  // namespace lacuna::api
