#include "lacuna/prune/reconstruct.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "lacuna/core/random.h"
#include "lacuna/model/parts.h"
#include "lacuna/prune/chunks.h"

namespace lacuna::prune {
namespace {

constexpr uint64_t kOrderStream = 4;  // of random numbers; calibration.cc has those before it

/// On a GPU the gradient of attention comes out the same only where torch is told so.
class SameBits {
 public:
  explicit SameBits(at::Device device) : on_(device.is_cuda()) {
    if (!on_) return;
    at::Context& context = at::globalContext();
    before_ = context.deterministicAlgorithms();
    before_fill_ = context.deterministicFillUninitializedMemory();
    context.setDeterministicAlgorithms(true, /*warn_only=*/false);
    context.setDeterministicFillUninitializedMemory(false);
  }
  ~SameBits() {
    if (!on_) return;
    at::globalContext().setDeterministicAlgorithms(before_, false);
    at::globalContext().setDeterministicFillUninitializedMemory(before_fill_);
  }
  SameBits(const SameBits&) = delete;
  SameBits& operator=(const SameBits&) = delete;

 private:
  bool on_, before_ = false, before_fill_ = false;
};

/// Samples of a step that run together: on the CPU each alone on a thread, on a GPU all.
int64_t samples_together(const model::Compute& compute, int64_t batch) {
  return compute.device.is_cpu() ? 1 : batch;
}

std::vector<int64_t> order_of(int64_t samples, uint64_t seed, int64_t epoch) {
  std::vector<int64_t> order(static_cast<size_t>(samples));
  std::iota(order.begin(), order.end(), int64_t{0});
  const auto stream = kOrderStream + static_cast<uint64_t>(epoch);
  for (size_t i = order.size(); i > 1; --i)
    std::swap(order[i - 1], order[random_bits(seed, stream, i) % i]);
  return order;
}

/// Calls one(samples, rate) -> objective for every step of every epoch.
template <class F>
Result<std::vector<double>> epochs(const Training& training, int64_t samples, F&& one) {
  const ReconstructOptions& options = training.options;
  const int64_t batch = std::min(options.batch, samples), a_pass = (samples + batch - 1) / batch;
  std::vector<double> objectives;
  for (int64_t epoch = 0; epoch < options.epochs; ++epoch) {
    const std::vector<int64_t> order = order_of(samples, training.seed, epoch);
    at::Tensor sum = at::zeros({}, at::TensorOptions(training.compute.device).dtype(at::kDouble));
    for (int64_t step = 0; step < a_pass; ++step) {
      const auto first = order.begin() + step * batch;
      const std::vector<int64_t> now(first, order.begin() + std::min(samples, (step + 1) * batch));
      sum += one(now, rate_at(epoch * a_pass + step, options.epochs * a_pass, options.rate));
      LACUNA_CHECK(training.stepped(epoch, static_cast<int64_t>(now.size())));
    }
    objectives.push_back(sum.item<double>() / static_cast<double>(a_pass));
    if (!std::isfinite(objectives.back()))
      return check_failed(
          "--reconstruct: the outputs became infinite or NaN in epoch {}. Give a smaller "
          "--learning-rate (got {:g}), or --dtype float32.",
          epoch + 1, options.rate);
  }
  return objectives;
}

/// Parts of a step's samples, one behind the other.
struct Part {
  std::vector<int64_t> samples;
};
std::vector<Part> parts_of(const std::vector<int64_t>& samples, const model::Compute& compute) {
  const int64_t all = static_cast<int64_t>(samples.size()), each = samples_together(compute, all);
  std::vector<Part> parts;
  for (int64_t first = 0; first < all; first += each)
    parts.push_back({{samples.begin() + first, samples.begin() + std::min(all, first + each)}});
  return parts;
}

at::Tensor rows_of(const at::Tensor& all, const Part& part) {
  std::vector<at::Tensor> rows;
  for (const int64_t sample : part.samples) rows.push_back(all[sample]);
  return at::stack(rows);
}

/// Sums of the parts' gradients, in the order of the parts.
std::vector<at::Tensor> summed(std::vector<std::vector<at::Tensor>>& of_parts, size_t skip) {
  std::vector<at::Tensor> sums(of_parts.front().begin() + static_cast<int64_t>(skip),
                               of_parts.front().end());
  if (of_parts.size() == 1) return sums;
  for (size_t i = 0; i < sums.size(); ++i) {
    sums[i] = sums[i].to(at::kFloat);
    for (size_t part = 1; part < of_parts.size(); ++part)
      sums[i] = sums[i] + of_parts[part][skip + i].to(at::kFloat);
  }
  return sums;
}

struct Objective {
  at::Tensor value;     // float64 scalar
  at::Tensor gradient;  // by the outputs
};

/// Of the outputs of a block: sum over tokens of |y - t|^2 / |t|^2, divided by `tokens`.
Objective output_objective(const at::Tensor& outputs, const at::Tensor& targets, int64_t tokens) {
  const at::NoGradGuard off;
  const at::Tensor wide = targets.to(at::kFloat);
  const at::Tensor size = wide.square().sum(-1, /*keepdim=*/true).clamp_min_(1e-20);
  const at::Tensor off_by = outputs.to(at::kFloat) - wide;
  const double share = 1 / static_cast<double>(tokens);
  const at::Tensor value =
      (off_by.square().sum(-1, /*keepdim=*/true) / size).sum(at::kDouble) * share;
  return {value, (off_by * (2 * share) / size).to(outputs.scalar_type())};
}

/// The output matrix as gradients need it, and the way to it.
class Predictions {
 public:
  explicit Predictions(const model::Ends& ends) : ends_(ends), head_(ends.head().weight()) {}

  /// hidden [rows, hidden] -> logits float32 [rows, vocab]
  at::Tensor logits(const at::Tensor& hidden) const {
    at::Tensor x = ends_.final_norm() != nullptr ? ends_.final_norm()->forward(hidden) : hidden;
    if (ends_.project_out() != nullptr) x = ends_.project_out()->multiply_expanded(x);
    return at::linear(x, head_).to(at::kFloat);
  }

  /// Sum over tokens of KL(dense || mine), divided by `tokens`; some rows at a time, so that their
  /// logits fit. @param outputs, dense  [B, T, hidden] of the last block
  Objective objective(const at::Tensor& outputs, const at::Tensor& dense, int64_t tokens) const {
    const at::Tensor mine = outputs.flatten(0, -2), theirs = dense.flatten(0, -2);
    const int64_t most = int64_t{1} << (outputs.is_cpu() ? 22 : 27);
    const int64_t rows = std::max<int64_t>(1, most / head_.size(0));
    Objective all{at::zeros({}, outputs.options().dtype(at::kDouble)), at::empty_like(mine)};
    for (int64_t first = 0; first < mine.size(0); first += rows) {
      const int64_t count = std::min(rows, mine.size(0) - first);
      const at::AutoGradMode on(true);
      const at::Tensor some = mine.narrow(0, first, count).detach().requires_grad_();
      const at::Tensor value = divergence(some, theirs.narrow(0, first, count), tokens);
      const auto gradient = torch::autograd::grad({value}, {some});
      const at::NoGradGuard off;
      all.value += value;
      all.gradient.narrow(0, first, count).copy_(gradient[0]);
    }
    all.gradient = all.gradient.view_as(outputs);
    return all;
  }

 private:
  at::Tensor divergence(const at::Tensor& mine, const at::Tensor& theirs, int64_t tokens) const {
    at::Tensor wanted, given = at::log_softmax(logits(mine), -1);
    {
      const at::NoGradGuard off;
      wanted = at::log_softmax(logits(theirs), -1);
    }
    return (wanted.exp() * (wanted - given)).sum() / static_cast<double>(tokens);
  }

  const model::Ends& ends_;
  at::Tensor head_;  // [vocab, width]
};

}  // namespace

Status add_reconstruction(std::string_view name, ReconstructOptions& options) {
  if (name != "block" && name != "model")
    return usage_error("--reconstruct: unknown objective (got {}; need block or model).", name);
  (name == "block" ? options.block : options.model) = true;
  return {};
}

// ---- blocks -------------------------------------------------------------------------------------

BlockTraining::BlockTraining(model::Block block, std::vector<std::string> names,
                             const std::vector<at::Tensor>& weights, const model::Compute& compute)
    : block_(std::move(block)), names_(std::move(names)) {
  // Whatever wants a gradient goes through torch's own product, not through our kernels.
  for (const std::string& name : block_.linear_names())
    block_.linear(name).set_weight(block_.linear(name).weight().detach().requires_grad_());
  for (size_t i = 0; i < names_.size(); ++i) {
    weights_.add(weights[i].to(compute.device), compute.dtype);
    block_.linear(names_[i]).set_weight(weights_.working().back());
  }
}

std::vector<at::Tensor> BlockTraining::backward(const at::Tensor& inputs,
                                                const model::Rotary& rotary,
                                                const at::Tensor& given) const {
  const at::AutoGradMode on(true);  // of this thread
  std::vector<at::Tensor> by = {inputs.detach().requires_grad_()};
  by.insert(by.end(), weights_.working().begin(), weights_.working().end());
  const at::Tensor outputs = block_.forward(by.front(), rotary);
  return torch::autograd::grad({outputs}, by, {given});
}

void BlockTraining::release() {
  for (const std::string& name : block_.linear_names())
    block_.linear(name).set_weight(block_.linear(name).weight().detach());
}

Result<std::vector<double>> train_block(BlockTraining& block, const at::Tensor& inputs,
                                        const at::Tensor& targets, const Training& training) {
  const SameBits same(training.compute.device);
  const Executor executor = model::executor_for(training.compute.device);
  return epochs(training, inputs.size(0), [&](const std::vector<int64_t>& samples, double rate) {
    const std::vector<Part> parts = parts_of(samples, training.compute);
    const int64_t tokens = static_cast<int64_t>(samples.size()) * inputs.size(1);
    std::vector<std::vector<at::Tensor>> gradients(parts.size());
    std::vector<at::Tensor> values(parts.size());
    parallel_chunks(executor, static_cast<int64_t>(parts.size()), [&](int64_t place) {
      const auto i = static_cast<size_t>(place);
      const at::AutoGradMode on(true);
      const auto& working = block.weights().working();
      const at::Tensor outputs = block.block().forward(rows_of(inputs, parts[i]), training.rotary);
      Objective objective = output_objective(outputs, rows_of(targets, parts[i]), tokens);
      values[i] = objective.value;
      gradients[i] = torch::autograd::grad({outputs}, working, {objective.gradient});
    });
    const at::NoGradGuard off;
    block.weights().step(summed(gradients, 0), rate, executor);
    at::Tensor value = values[0];
    for (size_t i = 1; i < values.size(); ++i) value = value + values[i];
    return value;
  });
}

// ---- the model ----------------------------------------------------------------------------------

namespace {

at::Tensor gradients_of(
    const std::vector<BlockTraining>& blocks, const model::Ends& ends,
    const Predictions& predictions, const Calibration& calibration, const at::Tensor& dense,
    const std::vector<int64_t>& samples, const model::Compute& compute, const model::Rotary& rotary,
    const std::function<void(size_t block, const std::vector<at::Tensor>& gradients)>& visit) {
  const Executor executor = model::executor_for(compute.device);
  const std::vector<Part> parts = parts_of(samples, compute);
  const auto places = static_cast<int64_t>(parts.size());
  const int64_t tokens = static_cast<int64_t>(samples.size()) * calibration.length();
  std::vector<std::vector<at::Tensor>> inputs(parts.size());  // of each block
  std::vector<Objective> objectives(parts.size());
  parallel_chunks(executor, places, [&](int64_t place) {
    const auto i = static_cast<size_t>(place);
    at::Tensor x;
    {
      const at::NoGradGuard off;
      x = ends.embed(calibration.ids_of(parts[i].samples, compute.device));
      for (const BlockTraining& each : blocks) {
        inputs[i].push_back(x);
        x = each.block().forward(x, rotary);
      }
    }
    objectives[i] = predictions.objective(x, rows_of(dense, parts[i]), tokens);
  });
  for (size_t block = blocks.size(); block-- > 0;) {
    std::vector<std::vector<at::Tensor>> gradients(parts.size());
    parallel_chunks(executor, places, [&](int64_t place) {
      const auto i = static_cast<size_t>(place);
      gradients[i] = blocks[block].backward(inputs[i][block], rotary, objectives[i].gradient);
      objectives[i].gradient = gradients[i].front();
      inputs[i].pop_back();
    });
    const at::NoGradGuard off;
    visit(block, summed(gradients, 1));
  }
  at::Tensor value = objectives[0].value;
  for (size_t i = 1; i < objectives.size(); ++i) value = value + objectives[i].value;
  return value;
}

}  // namespace

at::Tensor model_gradients(
    const std::vector<BlockTraining>& blocks, const model::Ends& ends,
    const Calibration& calibration, const at::Tensor& dense, const std::vector<int64_t>& samples,
    const model::Compute& compute, const model::Rotary& rotary,
    const std::function<void(size_t block, const std::vector<at::Tensor>& gradients)>& visit) {
  return gradients_of(blocks, ends, Predictions(ends), calibration, dense, samples, compute, rotary,
                      visit);
}

Result<std::vector<double>> train_model(std::vector<BlockTraining>& blocks, const model::Ends& ends,
                                        const Calibration& calibration, const at::Tensor& dense,
                                        const Training& training) {
  const SameBits same(training.compute.device);
  const Executor executor = model::executor_for(training.compute.device);
  const Predictions predictions(ends);
  return epochs(training, calibration.samples(),
                [&](const std::vector<int64_t>& samples, double rate) {
                  return gradients_of(blocks, ends, predictions, calibration, dense, samples,
                                      training.compute, training.rotary,
                                      [&](size_t block, const std::vector<at::Tensor>& gradients) {
                                        blocks[block].weights().step(gradients, rate, executor);
                                      });
                });
}

uint64_t planned_training_bytes(const io::DecoderSpec& spec, int64_t samples, int64_t length,
                                const ReconstructOptions& options, const model::Compute& compute) {
  const auto element = static_cast<uint64_t>(c10::elementSize(compute.dtype));
  const auto number = [](int64_t n) { return static_cast<uint64_t>(n); };
  uint64_t block = 0;
  for (const io::LinearSpec& linear : spec.block_linears()) block += number(linear.out * linear.in);
  const int64_t batch = std::min(options.batch, samples);
  const uint64_t parts = compute.device.is_cpu()
                             ? number(std::min<int64_t>(batch, model::torch_executor().threads))
                             : 1;
  const uint64_t tokens = number(batch * length);
  // Masters, two moments, a mask and the copies that products read; gradients of one block.
  const uint64_t weights = number(spec.layers) * block * (13 + element) +
                           block * number(batch) * (4 + element) +
                           number(spec.vocab) * number(spec.embedding_width) * 2 * element;
  const uint64_t dense = number(samples * length * spec.hidden) * element;
  const uint64_t inputs = tokens * number((spec.layers + 2) * spec.hidden) * element;
  // What one block keeps for its gradients: about twelve hidden states (norms in float32) and four
  // of the MLP's width.
  const uint64_t kept = tokens * number(12 * spec.hidden + 4 * spec.intermediate) * 4;
  const uint64_t logits = parts * 6 * (uint64_t{4} << (compute.device.is_cpu() ? 22 : 27));
  return weights + dense + inputs + kept + logits;
}

}  // namespace lacuna::prune
