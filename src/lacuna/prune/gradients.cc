#include "lacuna/prune/gradients.h"

#include <torch/csrc/autograd/autograd.h>

#include <algorithm>

#include "lacuna/prune/chunks.h"

namespace lacuna::prune {
namespace {

// Predictions whose logits exist at a time.
constexpr int64_t kLogitsAtOnce = 256;

/// Sums over sequences of one block's gradients, in the order of the sequences.
class GradientSums {
 public:
  GradientSums() = default;
  GradientSums(std::vector<std::string> names, Slope slope)
      : names_(std::move(names)), sums_(names_.size()), slope_(slope) {}

  void add(const std::vector<at::Tensor>& gradients) {
    for (size_t i = 0; i < sums_.size(); ++i) {
      const at::Tensor gradient = gradients[i].to(at::kFloat);
      if (!sums_[i].defined()) sums_[i] = at::zeros_like(gradient);
      if (slope_ == Slope::kMean)
        sums_[i].add_(gradient);
      else
        sums_[i].addcmul_(gradient, gradient);
    }
    ++sequences_;
  }

  /// What the slope says, under the names with this before and after them.
  /// @param called  a Linear's name in `into`
  template <class Called>
  void take(const Called& called, Gradients& into) {
    for (size_t i = 0; i < sums_.size(); ++i) {
      sums_[i].div_(static_cast<double>(std::max<int64_t>(1, sequences_)));
      if (slope_ == Slope::kRegional) sums_[i].sqrt_();
      into[called(names_[i])] = std::move(sums_[i]);
    }
  }

 private:
  std::vector<std::string> names_;
  std::vector<at::Tensor> sums_;
  Slope slope_ = Slope::kNone;
  int64_t sequences_ = 0;
};

/// A block with a graph.
class Backward {
 public:
  Backward(model::Block& block, const std::vector<std::string>& targets, const GradientPlan& plan)
      : block_(block), plan_(plan) {
    for (const std::string& name : block.linear_names()) {
      // Compact weights would be expanded into a scratch that doesn't outlive the product.
      at::Tensor plain = block.linear(name).weight().detach();
      if (std::find(targets.begin(), targets.end(), name) != targets.end()) {
        plain = plain.clone().requires_grad_();
        leaves_.push_back(plain);
        names_.push_back(name);
      }
      block.linear(name).set_weight(std::move(plain));
    }
  }
  ~Backward() {  // later passes through the block need no graph
    for (const std::string& name : names_)
      block_.linear(name).set_weight(block_.linear(name).weight().detach());
  }
  Backward(const Backward&) = delete;
  Backward& operator=(const Backward&) = delete;

  /// In the order in which run() gives gradients.
  const std::vector<std::string>& names() const { return names_; }

  /// Adds the gradients of loss(i, f(x_i)) for every sequence of x [sequences, T, hidden].
  /// @param dx  if there is one: d loss / d x_i comes to lie in dx[i]; loss(i, ) may read it before
  template <class Loss>
  Status run(const at::Tensor& x, const model::Rotary& rotary, const Loss& loss, at::Tensor* dx,
             GradientSums& sums, const CountSequences& count) const {
    for (int64_t first = 0; first < x.size(0); first += plan_.at_once) {
      const int64_t n = std::min(plan_.at_once, x.size(0) - first);
      std::vector<std::vector<at::Tensor>> found(static_cast<size_t>(n));
      parallel_chunks(model::executor_for(plan_.compute.device), n, [&](int64_t place) {
        const int64_t i = first + place;
        const at::Tensor input = x.narrow(0, i, 1).detach().requires_grad_(dx != nullptr);
        std::vector<at::Tensor> of = leaves_;
        if (dx != nullptr) of.push_back(input);
        if (of.empty()) return;
        const at::Tensor scalar = loss(i, block_.forward(input, rotary));
        auto& gradients = found[static_cast<size_t>(place)];
        gradients = torch::autograd::grad({scalar}, of);
        if (dx == nullptr) return;
        dx->narrow(0, i, 1).copy_(gradients.back());
        gradients.pop_back();
      });
      for (const auto& gradients : found)
        if (!gradients.empty()) sums.add(gradients);
      LACUNA_CHECK(count(n));
    }
    return {};
  }

 private:
  model::Block& block_;
  const GradientPlan& plan_;
  std::vector<std::string> names_;
  std::vector<at::Tensor> leaves_;
};

/// d loss / d hidden [1, T, hidden] of one sequence's mean cross entropy, in strips of tokens.
at::Tensor loss_slope(const model::Ends& ends, const at::Tensor& hidden, const at::Tensor& ids) {
  at::Tensor slope = at::zeros_like(hidden);
  const int64_t predictions = hidden.size(1) - 1;
  for (int64_t first = 0; first < predictions; first += kLogitsAtOnce) {
    const int64_t n = std::min(kLogitsAtOnce, predictions - first);
    const at::Tensor x = hidden.narrow(1, first, n).detach().requires_grad_();
    const at::Tensor logits = ends.logits(x).flatten(0, 1);
    const at::Tensor loss =
        at::cross_entropy_loss(logits, ids.narrow(0, first + 1, n), {}, at::Reduction::Sum) /
        static_cast<double>(predictions);
    slope.narrow(1, first, n).copy_(torch::autograd::grad({loss}, {x}).front());
  }
  return slope;
}

Status check_ends(const io::Checkpoint& checkpoint, const model::Ends& ends) {
  bool compact = false;
  for (const model::Linear* linear : ends.linears()) compact = compact || linear->is_compact();
  if (!compact) return {};
  return usage_error(
      "{}: the output matrix is sparse or made of codes. Gradients need a dense one: take the "
      "model from before.",
      checkpoint.folder().string());
}

/// The whole model's gradients, a group of sequences at a time.
class LossGradients {
 public:
  LossGradients(const io::Checkpoint& checkpoint, const io::DecoderSpec& spec,
                const std::vector<std::vector<std::string>>& targets, const GradientPlan& plan,
                const CountSequences& count)
      : checkpoint_(checkpoint), spec_(spec), targets_(targets), plan_(plan), count_(count) {
    if (spec.positions == io::Positions::kRotary) rotary_ = model::Rotary(spec, plan.compute);
    sums_.resize(static_cast<size_t>(spec.layers));
  }

  Status add(const model::Ends& ends, const at::Tensor& ids) {
    std::vector<at::Tensor> inputs(1);
    parallel_chunks(model::executor_for(plan_.compute.device), 1,
                    [&](int64_t) { inputs[0] = ends.embed(ids); });
    for (int64_t layer = 0; layer < spec_.layers; ++layer) {
      LACUNA_TRY(const auto block, load(layer));
      inputs.push_back(forward(block, inputs.back()));
      checkpoint_release(layer);
    }
    at::Tensor slope = at::empty_like(inputs.back());
    each_sequence(slope.size(0), [&](int64_t i) {
      slope.narrow(0, i, 1).copy_(
          loss_slope(ends, inputs.back().narrow(0, i, 1), ids.select(0, i)));
    });
    for (int64_t layer = spec_.layers - 1; layer >= 0; --layer) {
      inputs.pop_back();
      LACUNA_TRY(auto block, load(layer));
      const Backward backward(block, targets_[static_cast<size_t>(layer)], plan_);
      GradientSums& sums = sums_[static_cast<size_t>(layer)];
      if (!begun_) sums = GradientSums(backward.names(), plan_.slope);
      const auto through = [&](int64_t i, const at::Tensor& out) {
        // A copy: of what the graph holds no part may change, and autograd takes a slope that is
        // written for another sequence for one.
        return (out * slope.narrow(0, i, 1).clone()).sum(at::kFloat);
      };
      LACUNA_CHECK(backward.run(inputs.back(), rotary_, through, layer > 0 ? &slope : nullptr, sums,
                                count_));
      checkpoint_release(layer);
    }
    begun_ = true;
    return {};
  }

  Gradients take() {
    Gradients all;
    for (int64_t layer = 0; layer < spec_.layers; ++layer)
      sums_[static_cast<size_t>(layer)].take(
          [&](const std::string& linear) { return spec_.weight_name(layer, linear); }, all);
    return all;
  }

 private:
  Result<model::Block> load(int64_t layer) const {
    return model::Block::load(checkpoint_, spec_, layer, plan_.compute);
  }
  void checkpoint_release(int64_t layer) const {
    for (const io::LinearSpec& linear : spec_.block_linears())
      checkpoint_.release(spec_.weight_name(layer, linear.name));
  }
  template <class F>
  void each_sequence(int64_t n, const F& f) const {
    for (int64_t first = 0; first < n; first += plan_.at_once)
      parallel_chunks(model::executor_for(plan_.compute.device), std::min(plan_.at_once, n - first),
                      [&](int64_t place) { f(first + place); });
  }
  at::Tensor forward(const model::Block& block, const at::Tensor& x) const {
    at::Tensor out = at::empty_like(x);
    each_sequence(x.size(0), [&](int64_t i) {
      out.narrow(0, i, 1).copy_(block.forward(x.narrow(0, i, 1), rotary_));
    });
    return out;
  }

  const io::Checkpoint& checkpoint_;
  const io::DecoderSpec& spec_;
  const std::vector<std::vector<std::string>>& targets_;
  const GradientPlan& plan_;
  const CountSequences& count_;
  model::Rotary rotary_;
  std::vector<GradientSums> sums_;
  bool begun_ = false;
};

}  // namespace

GradientPlan::GradientPlan(Slope of, const io::DecoderSpec& spec, int64_t samples, int64_t length,
                           const model::Compute& on, uint64_t working_bytes)
    : slope(of), compute(on) {
  if (slope == Slope::kNone || samples == 0) return;
  const auto element = static_cast<uint64_t>(c10::elementSize(compute.dtype));
  const auto tokens = static_cast<uint64_t>(length);
  uint64_t weights = 0;
  for (const io::LinearSpec& linear : spec.block_linears())
    weights += static_cast<uint64_t>(linear.out * linear.in);
  const auto hidden = static_cast<uint64_t>(spec.hidden);
  const auto heads = static_cast<uint64_t>(spec.heads * spec.head_dim);
  // What a block's graph keeps of a token (norms in float32, attention, the MLP's products) and
  // their gradients; a float32 gradient of every weight; or the logits of a strip, three times.
  const uint64_t graph = tokens *
                         (12 * hidden + 12 * heads + 8 * static_cast<uint64_t>(spec.intermediate)) *
                         std::max<uint64_t>(element, 4);
  const uint64_t logits = 3 * kLogitsAtOnce * static_cast<uint64_t>(spec.vocab) * 4;
  const uint64_t one = std::max(graph + weights * 4, logits);
  const int64_t threads = model::executor_for(compute.device).threads;
  const auto fit = [&](uint64_t each, int64_t most) {
    return std::clamp<int64_t>(static_cast<int64_t>(working_bytes / 2 / each), 1, most);
  };
  at_once = fit(one, threads);
  const bool whole = slope != Slope::kRegional;
  const uint64_t inputs =
      whole ? static_cast<uint64_t>(spec.layers + 2) * tokens * hidden * element : 0;
  if (whole) group = std::min(std::max(at_once, fit(inputs, samples)), samples);
  bytes = static_cast<uint64_t>(at_once) * one + static_cast<uint64_t>(group) * inputs +
          2 * weights * element;
}

Result<Gradients> loss_gradients(const io::Checkpoint& checkpoint, const io::DecoderSpec& spec,
                                 const Calibration& calibration,
                                 const std::vector<std::vector<std::string>>& targets,
                                 const GradientPlan& plan, const CountSequences& count) {
  LACUNA_TRY(const auto ends, model::Ends::load(checkpoint, spec, plan.compute));
  LACUNA_CHECK(check_ends(checkpoint, ends));
  LossGradients gradients(checkpoint, spec, targets, plan, count);
  for (int64_t first = 0; first < calibration.samples(); first += plan.group)
    LACUNA_CHECK(gradients.add(
        ends, calibration.ids_of(first, std::min(plan.group, calibration.samples() - first),
                                 plan.compute.device)));
  return gradients.take();
}

Result<Gradients> regional_gradients(model::Block& block, const std::vector<std::string>& targets,
                                     const model::Rotary& rotary, const at::Tensor& hidden,
                                     const GradientPlan& plan, const CountSequences& count) {
  const Backward backward(block, targets, plan);
  GradientSums sums(backward.names(), Slope::kRegional);
  const auto norm = [](int64_t, const at::Tensor& out) { return out.to(at::kFloat).norm(); };
  LACUNA_CHECK(backward.run(hidden, rotary, norm, nullptr, sums, count));
  Gradients all;
  sums.take([](const std::string& linear) { return linear; }, all);
  return all;
}

}  // namespace lacuna::prune
