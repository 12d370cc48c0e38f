#include "lacuna/prune/gradients.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "lacuna/prune/builtin.h"
#include "model/models.h"
#include "prune/random_matrices.h"
#include "support/data.h"

namespace lacuna::prune {
namespace {

namespace fs = std::filesystem;
using lacuna::testing::must;
using testing::random_matrix;

constexpr int64_t kSamples = 3, kLength = 24;

Calibration random_ids(int64_t vocab) {
  Calibration calibration{"random", {}};
  for (uint64_t s = 0; s < kSamples; ++s) {
    auto& row = calibration.ids.emplace_back();
    for (uint64_t i = 0; i < kLength; ++i)
      row.push_back(static_cast<int32_t>(random_bits(7, s, i) % static_cast<uint64_t>(vocab)));
  }
  return calibration;
}

fs::path tiny_model(const std::string& name) {
  return lacuna::testing::source_folder() / "tests/golden/tiny_models" / name;
}

/// A tiny model, and the gradients of its first and last block.
struct Tiny {
  explicit Tiny(const std::string& name)
      : checkpoint(must(io::Checkpoint::open(tiny_model(name)))),
        decoder(must(model::Decoder::load(checkpoint, {}))),
        spec(decoder.spec()),
        calibration(random_ids(spec.vocab)),
        targets(static_cast<size_t>(spec.layers)) {
    for (auto* of : {&targets.front(), &targets.back()}) {
      of->clear();
      for (const io::LinearSpec& linear : spec.block_linears()) of->push_back(linear.name);
    }
  }

  GradientPlan plan(Slope slope) const {
    return {slope, spec, kSamples, kLength, {}, uint64_t{1} << 26};
  }
  Gradients loss_gradients(const GradientPlan& plan) const {
    return must(prune::loss_gradients(checkpoint, spec, calibration, targets, plan,
                                      [](int64_t) { return Status(); }));
  }
  Gradients of_one_sequence(size_t sequence) const {
    Calibration one{"one", {calibration.ids[sequence]}};
    return must(prune::loss_gradients(checkpoint, spec, one, targets, plan(Slope::kMean),
                                      [](int64_t) { return Status(); }));
  }

  /// The mean over sequences of the mean cross entropy of their next tokens.
  double loss() const {
    double sum = 0;
    for (const auto& ids : calibration.ids) {
      const at::Tensor tokens = lacuna::testing::ids_tensor(ids);
      const at::Tensor logits = decoder.forward(tokens).squeeze(0).to(at::kDouble);
      const at::Tensor chosen =
          logits.log_softmax(-1)
              .narrow(0, 0, kLength - 1)
              .gather(1, tokens.squeeze(0).narrow(0, 1, kLength - 1).unsqueeze(1));
      sum -= chosen.mean().item<double>();
    }
    return sum / kSamples;
  }

  /// The change of f per step along `direction` in one weight, by central differences of fourth
  /// order.
  template <class F>
  double slope_along(int64_t layer, const std::string& linear, const at::Tensor& direction,
                     double step, const F& f) const {
    model::Block block = decoder.blocks()[static_cast<size_t>(layer)];  // shares the weights
    const at::Tensor weight = block.linear(linear).weight().clone();
    const auto at = [&](double steps) {
      block.linear(linear).set_weight(weight + direction * (steps * step));
      return f();
    };
    const double slope = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step);
    block.linear(linear).set_weight(weight);
    return slope;
  }

  io::Checkpoint checkpoint;
  model::Decoder decoder;
  io::DecoderSpec spec;
  Calibration calibration;
  std::vector<std::vector<std::string>> targets;
};

double product_of(const at::Tensor& a, const at::Tensor& b) {
  return (a.to(at::kDouble) * b.to(at::kDouble)).sum().item<double>();
}

/// The gradient's own direction and one that has nothing to do with it, both of length 1.
std::vector<at::Tensor> directions(const at::Tensor& gradient, uint64_t seed) {
  const at::Tensor other = random_matrix(gradient.size(0), gradient.size(1), seed);
  return {gradient / gradient.norm(), other / other.norm()};
}

// Losses come from float32 logits and are good to some 3e-7 (the rounding of a logit, averaged over
// the predictions). Over steps of 0.005 that makes 1e-4 of a slope.
constexpr double kStep = 0.005, kNoise = 1e-4;

/// What a step may be off by, as a share of the gradient's length: a kink of ReLU that it crosses.
double curved(const Tiny& tiny) {
  return tiny.spec.activation == io::Activation::kRelu ? 1e-2 : 2e-3;
}

TEST(Gradients, OfTheLossEqualCentralDifferences) {
  for (const char* name : {"llama3", "qwen3", "opt", "opt_post_norm", "arcee"}) {
    const Tiny tiny(name);
    const Gradients gradients = tiny.loss_gradients(tiny.plan(Slope::kMean));
    ASSERT_EQ(gradients.size(), tiny.targets.front().size() * (tiny.spec.layers > 1 ? 2 : 1));
    for (const int64_t layer : {int64_t{0}, tiny.spec.layers - 1})
      for (const std::string& linear : tiny.targets.front()) {
        const at::Tensor gradient =
            gradients.at(tiny.spec.block_prefix(layer) + linear + ".weight");
        ASSERT_GT(gradient.norm().item<double>(), 0) << name << linear;
        for (const at::Tensor& direction : directions(gradient, 11)) {
          const double told = product_of(gradient, direction);
          const double measured =
              tiny.slope_along(layer, linear, direction, kStep, [&] { return tiny.loss(); });
          EXPECT_NEAR(told, measured, kNoise + curved(tiny) * gradient.norm().item<double>())
              << name << " " << layer << " " << linear;
        }
      }
  }
}

// A norm of some 30 in float32.
constexpr double kOutputNoise = 1e-3;

TEST(Gradients, OfABlocksOutputEqualCentralDifferences) {
  for (const char* name : {"llama3", "opt_post_norm"}) {
    const Tiny tiny(name);
    const model::Rotary& rotary = tiny.decoder.rotary();
    const at::Tensor hidden =
        random_matrix(kLength, tiny.spec.hidden, 5).view({1, kLength, tiny.spec.hidden});
    model::Block block = must(model::Block::load(tiny.checkpoint, tiny.spec, 0, model::Compute{}));
    const Gradients gradients =
        must(regional_gradients(block, tiny.targets.front(), rotary, hidden,
                                tiny.plan(Slope::kRegional), [](int64_t) { return Status(); }));
    for (const std::string& linear : tiny.targets.front()) {
      const at::Tensor size = gradients.at(linear);  // of one sequence: |gradient|
      // Of single weights: the one with the most, and one in the middle.
      for (const int64_t place : {size.argmax().item<int64_t>(), size.numel() / 2}) {
        at::Tensor direction = at::zeros_like(size);
        direction.view({-1})[place] = 1;
        const double measured = tiny.slope_along(0, linear, direction, kStep, [&] {
          const at::Tensor out = tiny.decoder.blocks()[0].forward(hidden, rotary);
          return out.to(at::kDouble).norm().item<double>();
        });
        const double told = size.view({-1})[place].item<double>();
        EXPECT_NEAR(told, std::abs(measured), kOutputNoise + curved(tiny) * told)
            << name << " " << linear;
      }
    }
  }
}

TEST(Gradients, MeansAndSquaresAreThoseOfTheSequences) {
  const Tiny tiny("llama3");
  const Gradients means = tiny.loss_gradients(tiny.plan(Slope::kMean));
  const Gradients squares = tiny.loss_gradients(tiny.plan(Slope::kMeanSquare));
  std::vector<Gradients> each;
  for (size_t s = 0; s < kSamples; ++s) each.push_back(tiny.of_one_sequence(s));
  for (const auto& [name, mean] : means) {
    at::Tensor sum = at::zeros_like(mean), square = at::zeros_like(mean);
    for (const Gradients& one : each) {
      sum += one.at(name);
      square += one.at(name).square();
    }
    EXPECT_TRUE(at::allclose(mean, sum / kSamples, 1e-4, 1e-8)) << name;
    EXPECT_TRUE(at::allclose(squares.at(name), square / kSamples, 1e-4, 1e-12)) << name;
  }
}

TEST(Gradients, DontDependOnThreadsOrGroups) {
  // With a vocabulary whose sums MKL cuts where it may.
  const auto folder = lacuna::testing::demo_model_folder();
  const auto checkpoint = must(io::Checkpoint::open(folder));
  const auto spec = must(model::spec_of(checkpoint));
  const Calibration calibration = random_ids(spec.vocab);
  std::vector<std::vector<std::string>> targets(static_cast<size_t>(spec.layers));
  targets[1] = {spec.v.name, spec.down.name};
  const auto run = [&](int threads, int64_t at_once, int64_t group) {
    model::set_threads(threads);
    GradientPlan plan(Slope::kMean, spec, kSamples, kLength, {}, uint64_t{1} << 28);
    plan.at_once = at_once;
    plan.group = group;
    return must(prune::loss_gradients(checkpoint, spec, calibration, targets, plan,
                                      [](int64_t) { return Status(); }));
  };
  const Gradients one = run(1, 1, 1);
  EXPECT_EQ(one.size(), 2u);
  const Gradients other = run(2, 2, 2);
  for (const auto& [name, gradient] : one) EXPECT_TRUE(at::equal(gradient, other.at(name))) << name;
  model::set_threads(0);
}

TEST(Gradients, OfManySequencesAtOnceStandApart) {
  // Threads that drift apart: one writes its sequence's slope while another's graph holds its own.
  const Tiny tiny("llama3");
  const auto run = [&](int threads) {
    model::set_threads(threads);
    Calibration many{"many", {}};
    for (size_t i = 0; i < 96; ++i) many.ids.push_back(tiny.calibration.ids[i % kSamples]);
    GradientPlan plan(Slope::kMean, tiny.spec, many.samples(), kLength, {}, uint64_t{1} << 28);
    plan.at_once = threads == 1 ? 1 : many.samples();
    plan.group = many.samples();
    return prune::loss_gradients(tiny.checkpoint, tiny.spec, many, tiny.targets, plan,
                                 [](int64_t) { return Status(); });
  };
  const Gradients one = must(run(1));
  for (int repeat = 0; repeat < 5; ++repeat) {
    const auto many = run(8);
    ASSERT_TRUE(many.ok()) << many.error().message;
    for (const auto& [name, gradient] : one) EXPECT_TRUE(at::equal(gradient, many->at(name)));
  }
  model::set_threads(0);
}

TEST(Gradients, StopWhenTheyAreToldTo) {
  const Tiny tiny("llama3");
  const auto stopped = prune::loss_gradients(tiny.checkpoint, tiny.spec, tiny.calibration,
                                             tiny.targets, tiny.plan(Slope::kMean), [](int64_t) {
                                               return Status(Error{Code::kInterrupted, "enough"});
                                             });
  ASSERT_FALSE(stopped.ok());
  EXPECT_EQ(stopped.error().code, Code::kInterrupted);
}

TEST(GradientScores, WeighEveryWeightByItsSlope) {
  const at::Tensor weight = at::tensor({1.f, -2.f, 3.f, 4.f}).view({2, 2});
  InputStatistics statistics;
  statistics.sequences = 4;
  statistics.square_sums = at::tensor({16.f, 64.f});  // root mean squares 2 and 4
  Request request;
  request.gradient = at::tensor({-0.5f, 0.25f, 0.f, 2.f}).view({2, 2});
  const Problem problem{weight, statistics, request, {}};
  EXPECT_TRUE(
      at::equal(gradient_score().scores(problem), at::tensor({0.5f, 0.5f, 0.f, 8.f}).view({2, 2})));
  request.gradient = request.gradient.abs();
  EXPECT_TRUE(
      at::equal(fisher_score().scores(problem), at::tensor({0.5f, 1.f, 0.f, 32.f}).view({2, 2})));
  EXPECT_TRUE(at::allclose(regional_score().scores(problem),
                           at::tensor({52.f, 58.f, 6.f, 816.f}).view({2, 2})));
}

TEST(GradientScores, RefuseWeightsWithoutAGradient) {
  const auto method = compose({.method = "gradient"});
  ASSERT_TRUE(method.ok());
  const at::Tensor weight = random_matrix(4, 8, 1);
  const InputStatistics statistics = testing::identity_statistics(8);
  EXPECT_EQ(method->prune(weight, statistics, {}).error().code, Code::kUsage);
  Request request;
  request.gradient = at::full({4, 8}, NAN);
  EXPECT_EQ(method->prune(weight, statistics, request).error().code, Code::kBadInput);
}

}  // namespace
}  // namespace lacuna::prune
