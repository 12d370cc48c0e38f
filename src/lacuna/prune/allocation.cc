#include "lacuna/prune/allocation.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <iterator>
#include <limits>
#include <map>
#include <numeric>

#include "lacuna/core/memory.h"
#include "lacuna/prune/selection.h"

namespace lacuna::prune {
namespace {

struct NamedAllocation {
  Allocation allocation;
  std::string_view name;
};

constexpr NamedAllocation kAllocations[] = {{Allocation::kUniform, "uniform"},
                                            {Allocation::kOwl, "owl"},
                                            {Allocation::kError, "error"},
                                            {Allocation::kCurves, "curves"}};

struct Unit {
  Budget::Kind kind;
  std::string_view key, suffix;
  double factor;
};

constexpr Unit kUnits[] = {{Budget::Kind::kSparsity, "sparsity", "", 1},
                           {Budget::Kind::kMilliseconds, "tpot", "ms", 1},
                           {Budget::Kind::kMilliseconds, "tpot", "us", 1e-3}};

// ---- what is measured ---------------------------------------------------------------------------

at::Tensor wanda_scores(const at::Tensor& weight, const InputStatistics& inputs) {
  return weight.abs() * inputs.square_sums.sqrt();
}

/// OWL's: the share of scores above `multiple` times their mean, over all layers of a block.
double outlier_percent(const std::vector<at::Tensor>& weights,
                       const std::vector<const InputStatistics*>& inputs, double multiple) {
  double sum = 0, count = 0, outliers = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    sum += wanda_scores(weights[i], *inputs[i]).sum(at::kDouble).item<double>();
    count += static_cast<double>(weights[i].numel());
  }
  for (size_t i = 0; i < weights.size(); ++i)
    outliers +=
        (wanda_scores(weights[i], *inputs[i]) > multiple * sum / count).sum().item<double>();
  return 100 * outliers / count;
}

/// The relative error of dropping Wanda's choice and changing nothing else.
double drop_error(const at::Tensor& weight, const at::Tensor& scores, const InputStatistics& inputs,
                  double sparsity, const Request& request) {
  const at::Tensor mask = select(scores, request.pattern, sparsity,
                                 request.group.value_or(Group::kLayer), request.executor);
  return relative_error(weight, weight * mask, inputs.gram, request.executor);
}

// ---- ways through the sparsities ----------------------------------------------------------------

/// Sparsities by layer at a place on the way from dense (0) to nothing left (1): none of them falls
/// on the way.
using Way = std::function<std::vector<double>(double place)>;

/// One sparsity for all, less what each is to be spared.
Way parallel(std::vector<double> spared) {
  const auto [least, most] = std::minmax_element(spared.begin(), spared.end());
  return [spared, low = *least, high = 1 + *most](double place) {
    std::vector<double> sparsities;
    for (const double less : spared)
      sparsities.push_back(std::clamp(low + place * (high - low) - less, 0.0, 1.0));
    return sparsities;
  };
}

/// By block: its importance, stretched to a range of 2 * width around the mean.
Way by_importance(const std::vector<LayerShare>& shares,
                  const std::map<int64_t, double>& importance, double width) {
  double low = importance.begin()->second, high = low, mean = 0;
  for (const auto& [block, value] : importance)
    low = std::min(low, value), high = std::max(high, value);
  const auto stretched = [&](double value) {
    return high > low ? (value - low) / (high - low) * 2 * width : 0.0;
  };
  for (const auto& [block, value] : importance)
    mean += stretched(value) / static_cast<double>(importance.size());
  std::vector<double> spared;
  for (const LayerShare& share : shares)
    spared.push_back(stretched(importance.at(share.block)) - mean);
  return parallel(std::move(spared));
}

Way owl(const std::vector<LayerShare>& shares, double lambda) {
  std::map<int64_t, double> outliers;
  for (const LayerShare& share : shares) outliers[share.block] = share.outliers;
  return by_importance(shares, outliers, lambda);
}

/// A block whose outputs survive a pruning well does what those behind it build on, and is spared:
/// sparing the ones that suffer most instead makes a model much worse (docs/methods/allocation.md).
Way by_error(const std::vector<LayerShare>& shares, double width) {
  std::map<int64_t, double> importance, counts;
  for (const LayerShare& share : shares) {
    importance[share.block] -= share.half_error;
    counts[share.block] += 1;
  }
  for (auto& [block, sum] : importance) sum /= counts[block];
  return by_importance(shares, importance, width);
}

/// A part of a layer's hull.
struct Edge {
  size_t layer = 0;
  double from = 0, to = 0;  ///< sparsities
  double price = 0;         ///< error that it adds for what it saves
};

/// The lower convex hull of a layer's (saved, error) over sparsities in percent, as far as curves
/// are measured. What lies beyond comes last of all: a layer with nothing left is no guess to make.
/// @param weight  that its error has
std::vector<Edge> hull_of(const LayerShare& share, size_t layer, double weight,
                          const LayerCost& cost) {
  struct Corner {
    double sparsity, saved, error;
  };
  const double dense = cost(layer, 0);
  std::vector<Corner> hull;
  const auto price = [](const Corner& a, const Corner& b) {
    return (b.error - a.error) / (b.saved - a.saved);
  };
  constexpr int kLast = 95;
  static_assert(kCurveSparsities[std::size(kCurveSparsities) - 1] == kLast / 100.0);
  for (int percent = 0; percent <= kLast; ++percent) {
    const double sparsity = percent / 100.0;
    const Corner next{sparsity, dense - cost(layer, sparsity),
                      weight * squared_error_at(share, sparsity)};
    if (!hull.empty() && next.saved <= hull.back().saved) continue;  // costs error, saves nothing
    while (hull.size() > 1 && price(hull[hull.size() - 2], hull.back()) >= price(hull.back(), next))
      hull.pop_back();
    hull.push_back(next);
  }
  std::vector<Edge> edges;
  for (size_t i = 1; i < hull.size(); ++i)
    edges.push_back({layer, hull[i - 1].sparsity, hull[i].sparsity, price(hull[i - 1], hull[i])});
  edges.push_back({layer, hull.back().sparsity, 1, std::numeric_limits<double>::infinity()});
  return edges;
}

/// Edges by price: each layer's own come in their order, since its hull is convex. A layer's error
/// counts by its size: the mean over all weights is what is made small.
Way by_curves(const std::vector<LayerShare>& shares, const LayerCost& cost) {
  std::vector<Edge> edges;
  for (size_t layer = 0; layer < shares.size(); ++layer) {
    const auto weight = static_cast<double>(shares[layer].weights());
    const auto own = hull_of(shares[layer], layer, weight, cost);
    edges.insert(edges.end(), own.begin(), own.end());
  }
  std::stable_sort(edges.begin(), edges.end(),
                   [](const Edge& a, const Edge& b) { return a.price < b.price; });
  return [edges, layers = shares.size()](double place) {
    std::vector<double> sparsities(layers, 0.0);
    const double taken = place * static_cast<double>(edges.size());
    for (size_t i = 0; i < edges.size() && static_cast<double>(i) < taken; ++i) {
      const double part = std::min(1.0, taken - static_cast<double>(i));
      sparsities[edges[i].layer] = edges[i].from + part * (edges[i].to - edges[i].from);
    }
    return sparsities;
  };
}

Way way_of(const std::vector<LayerShare>& shares, const AllocationOptions& options,
           const LayerCost& cost) {
  switch (options.by) {
    case Allocation::kOwl:
      return owl(shares, options.owl_lambda);
    case Allocation::kError:
      return by_error(shares, options.error_width);
    case Allocation::kCurves:
      return by_curves(shares, cost);
    case Allocation::kUniform:
      break;
  }
  return parallel(std::vector<double>(shares.size(), 0.0));
}

// ---- exact totals -------------------------------------------------------------------------------

/// Steps dropped, by layer.
class Settled {
 public:
  Settled(const std::vector<LayerShare>& shares, const LayerCost& cost,
          const std::vector<double>& sparsities)
      : shares_(&shares), cost_(&cost) {
    for (size_t layer = 0; layer < shares.size(); ++layer)
      steps_.push_back(dropped_of(shares[layer].weights() / shares[layer].step, sparsities[layer]));
  }

  int64_t steps(size_t layer) const { return steps_[layer]; }
  double sparsity(size_t layer) const { return sparsity_of(layer, steps_[layer]); }
  double total() const {
    double sum = 0;
    for (size_t layer = 0; layer < steps_.size(); ++layer) sum += (*cost_)(layer, sparsity(layer));
    return sum;
  }
  /// Takes a step back where `room` allows it, and its cost from the room.
  bool give_back(size_t layer, double& room) {
    if (steps_[layer] == 0) return false;
    const double more =
        (*cost_)(layer, sparsity_of(layer, steps_[layer] - 1)) - (*cost_)(layer, sparsity(layer));
    constexpr double kRounding = 1e-9;  // of sums over layers: a step that just fits does fit
    if (more <= 0 || more > room * (1 + kRounding)) return false;
    --steps_[layer];
    room -= more;
    return true;
  }

 private:
  double sparsity_of(size_t layer, int64_t steps) const {
    const LayerShare& share = (*shares_)[layer];
    return static_cast<double>(steps * share.step) / static_cast<double>(share.weights());
  }
  const std::vector<LayerShare>* shares_;
  const LayerCost* cost_;
  std::vector<int64_t> steps_;
};

}  // namespace

std::string_view allocation_name(Allocation allocation) {
  for (const auto& known : kAllocations)
    if (known.allocation == allocation) return known.name;
  return "?";
}

std::vector<std::string> allocation_names() {
  std::vector<std::string> names;
  for (const auto& known : kAllocations) names.emplace_back(known.name);
  return names;
}

Result<Allocation> parse_allocation(std::string_view name) {
  for (const auto& known : kAllocations)
    if (known.name == name) return known.allocation;
  return usage_error("--allocate: unknown allocation (got {}; need one of {}).", name,
                     fmt::join(allocation_names(), ", "));
}

Result<Budget> Budget::parse(std::string_view text) {
  const auto wrong = [&] {
    return usage_error(
        "--budget: not a budget (got \"{}\"; need sparsity=0.6, bytes=2.1GB or tpot=12.5ms).",
        text);
  };
  const size_t equals = text.find('=');
  if (equals == std::string_view::npos) return wrong();
  const std::string_view key = text.substr(0, equals), value = text.substr(equals + 1);
  if (key == "bytes") {
    const auto bytes = parse_bytes(value);
    if (!bytes) return wrong();
    return Budget{Kind::kBytes, static_cast<double>(*bytes)};
  }
  double number = 0;
  const auto [rest, failure] = std::from_chars(value.data(), value.data() + value.size(), number);
  if (failure != std::errc() || !std::isfinite(number)) return wrong();
  const std::string_view suffix(rest, static_cast<size_t>(value.data() + value.size() - rest));
  for (const Unit& unit : kUnits) {
    if (unit.key != key || unit.suffix != suffix) continue;
    const Budget budget{unit.kind, number * unit.factor};
    const bool share = budget.kind == Kind::kSparsity;
    if (budget.amount < 0 || (share ? budget.amount > 1 : budget.amount == 0))
      return usage_error("--budget: out of range (got {}; need {}).", text,
                         share ? "a sparsity between 0 and 1" : "more than nothing");
    return budget;
  }
  return wrong();
}

std::string Budget::text() const {
  switch (kind) {
    case Kind::kBytes:
      return fmt::format("bytes={:.0f}B", amount);
    case Kind::kMilliseconds:
      return fmt::format("tpot={}ms", amount);
    case Kind::kSparsity:
      break;
  }
  return fmt::format("sparsity={}", amount);
}

std::string Budget::told(double of) const {
  if (kind == Kind::kBytes) return bytes_text(static_cast<uint64_t>(of));
  return kind == Kind::kMilliseconds ? fmt::format("{:.4g} ms", of) : fmt::format("{:.6f}", of);
}

void measure(std::vector<LayerShare>& shares, const std::vector<at::Tensor>& weights,
             const std::vector<const InputStatistics*>& inputs, const AllocationOptions& options,
             const Request& request) {
  if (options.by == Allocation::kOwl) {
    const double percent = outlier_percent(weights, inputs, options.owl_multiple);
    for (LayerShare& share : shares) share.outliers = percent;
  }
  if (options.by != Allocation::kError && options.by != Allocation::kCurves) return;
  for (size_t i = 0; i < shares.size(); ++i) {
    const at::Tensor scores = wanda_scores(weights[i], *inputs[i]);
    const auto error = [&](double sparsity) {
      return drop_error(weights[i], scores, *inputs[i], sparsity, request);
    };
    shares[i].squared_errors.clear();
    if (options.by == Allocation::kError) {
      shares[i].half_error = error(0.5);
      continue;
    }
    for (const double sparsity : kCurveSparsities)
      shares[i].squared_errors.push_back(std::pow(error(sparsity), 2));
  }
}

double squared_error_at(const LayerShare& share, double sparsity) {
  if (sparsity <= 0) return 0;
  if (sparsity >= 1) return 1;
  const auto* above =
      std::lower_bound(std::begin(kCurveSparsities), std::end(kCurveSparsities), sparsity - 1e-12);
  const auto place = static_cast<size_t>(above - std::begin(kCurveSparsities));
  const auto point = [&](size_t i) {
    return i < std::size(kCurveSparsities) ? std::pair(kCurveSparsities[i], share.squared_errors[i])
                                           : std::pair(1.0, 1.0);
  };
  // Below the first point the power of the first stretch goes on.
  const size_t left = place == 0 ? 0 : place - 1;
  const auto [s0, e0] = point(left);
  const auto [s1, e1] = point(left + 1);
  if (std::abs(sparsity - s0) < 1e-12) return e0;
  if (std::abs(sparsity - s1) < 1e-12) return e1;
  if (e0 <= 0 || e1 <= 0)  // zeros are dropped first and cost nothing
    return sparsity < s0 ? 0 : e0 + (e1 - e0) * (sparsity - s0) / (s1 - s0);
  return e0 * std::pow(sparsity / s0, std::log(e1 / e0) / std::log(s1 / s0));
}

Result<std::vector<double>> allocate(const std::vector<LayerShare>& shares,
                                     const AllocationOptions& options, const LayerCost& cost,
                                     double target) {
  const Way way = way_of(shares, options, cost);
  const auto at = [&](double place) { return Settled(shares, cost, way(place)); };
  const double most = at(0).total(), least = at(1).total();
  if (least > target || most < target) {
    if (!options.budget)
      return usage_error("--allocate: out of reach (got {:g}; need {:g} to {:g}).", target, least,
                         most);
    const double others = options.budget->amount - target;  // not theirs
    return usage_error(
        "--budget: out of reach (got {}; need about {} to {}: none, or all, of "
        "the weights left). Ask for something between.",
        options.budget->text(), options.budget->told(least + others),
        options.budget->told(most + others));
  }
  double low = 0, high = 1;  // too dear, and what meets the target
  for (int i = 0; i < 100; ++i) {
    const double middle = (low + high) / 2;
    (at(middle).total() > target ? low : high) = middle;
  }
  Settled settled = at(high);
  const Settled dear = at(low);
  double room = target - settled.total();
  // First those whose last step the way took here, all at one place where layers are alike.
  for (size_t layer = 0; layer < shares.size(); ++layer)
    if (dear.steps(layer) < settled.steps(layer)) settled.give_back(layer, room);
  for (bool any = true; any;) {
    any = false;
    for (size_t layer = 0; layer < shares.size(); ++layer)
      any = settled.give_back(layer, room) || any;
  }
  std::vector<double> sparsities;
  for (size_t layer = 0; layer < shares.size(); ++layer)
    sparsities.push_back(settled.sparsity(layer));
  return sparsities;
}

}  // namespace lacuna::prune
