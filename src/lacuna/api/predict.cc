#include "lacuna/api/predict.h"

#include <map>
#include <memory>
#include <vector>

#include "lacuna/model/weight.h"

namespace lacuna::api {
namespace {

/// A product of a decode step: Linears that read one input, stacked.
struct Product {
  int64_t rows = 0, columns = 0;
  DType dtype = DType::kBF16;
};

/// Names of the weights of a block that make up each product.
std::vector<std::vector<std::string>> stacks_of(const io::DecoderSpec& spec, int64_t layer) {
  const auto name = [&](const io::LinearSpec& linear) {
    return spec.block_prefix(layer) + linear.name + ".weight";
  };
  std::vector<std::vector<std::string>> stacks = {
      {name(spec.q), name(spec.k), name(spec.v)}, {name(spec.o)}, {}, {name(spec.down)}};
  if (spec.gated) stacks[2].push_back(name(spec.gate));
  stacks[2].push_back(name(spec.up));
  return stacks;
}

}  // namespace

Result<double> predicted_milliseconds(const model::Decoder& decoder,
                                      const bench::SpeedTable& table) {
  if (!decoder.compute().device.is_cpu())
    return not_possible("the measured table is one of CPUs (the model runs on {}).",
                        decoder.compute().device.str());
  double sum = 0;
  for (const model::Linear* linear : decoder.linears()) {
    const auto problem = linear->decode_problem();
    if (!problem) return not_possible("a Linear of the model runs on no kernel here.");
    LACUNA_TRY(const double time, table.milliseconds(*problem));
    sum += time;
  }
  return sum;
}

Result<LayerTimes> layer_times(const io::Checkpoint& checkpoint, const io::DecoderSpec& spec,
                               const format::Pattern& pattern,
                               const std::function<bool(const std::string&)>& pruned,
                               const bench::SpeedTable& table) {
  LACUNA_TRY(const model::Compute compute, resolve({.device = "cpu"}, spec.dtype));
  const auto time_of = [compute, table](const Product& product, const format::Pattern& under,
                                        double sparsity) {
    return table.milliseconds(model::decode_problem_of(under, product.dtype, product.rows,
                                                       product.columns, sparsity, compute));
  };
  LayerTimes times;
  auto products = std::make_shared<std::map<std::string, std::pair<Product, double>>>();
  const auto add = [&](const std::vector<std::string>& names) -> Status {
    Product product;
    for (const std::string& name : names) {
      const io::WeightInfo& info = checkpoint.weights().at(name);
      product.rows += info.shape[0];
      product.columns = info.shape[1];
      product.dtype = info.dtype;
    }
    if (!pruned(names.front())) {
      LACUNA_TRY(const double time, time_of(product, {}, 0));
      times.others += time;
      return {};
    }
    for (const std::string& name : names)
      (*products)[name] = {product, static_cast<double>(checkpoint.weights().at(name).shape[0]) /
                                        static_cast<double>(product.rows)};
    return {};
  };
  for (int64_t layer = 0; layer < spec.layers; ++layer)
    for (const auto& stack : stacks_of(spec, layer)) {
      std::vector<std::string> sparse, dense;
      for (const std::string& name : stack) (pruned(name) ? sparse : dense).push_back(name);
      // Linears of two forms are no one product.
      if (sparse.empty() || dense.empty()) {
        LACUNA_CHECK(add(stack));
      } else {
        for (const std::string& name : stack) LACUNA_CHECK(add({name}));
      }
    }
  const std::string head = spec.lm_head + ".weight", tied = spec.embedding + ".weight";
  LACUNA_CHECK(add({checkpoint.contains(head) ? head : tied}));
  times.pruned = [products, time_of, pattern](const std::string& weight,
                                              double sparsity) -> Result<double> {
    const auto& [product, share] = products->at(weight);
    LACUNA_TRY(const double time, time_of(product, pattern, sparsity));
    return share * time;
  };
  return times;
}

}  // namespace lacuna::api
