#include "lacuna/prune/reconstruct.h"

#include <ATen/core/grad_mode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>

#include "lacuna/core/random.h"
#include "lacuna/io/checkpoint.h"
#include "lacuna/prune/pipeline.h"
#include "prune/random_matrices.h"
#include "support/data.h"

namespace lacuna::prune {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;
using testing::random_matrix;

Calibration random_calibration(int64_t samples, int64_t length) {
  Calibration calibration{"random", {}};
  for (int64_t s = 0; s < samples; ++s) {
    calibration.ids.emplace_back();
    for (int64_t i = 0; i < length; ++i)
      calibration.ids.back().push_back(static_cast<int32_t>(
          random_bits(3, static_cast<uint64_t>(s), static_cast<uint64_t>(i)) % 4096));
  }
  return calibration;
}

at::Tensor half_of(const at::Tensor& matrix) {
  return matrix * (random_matrix(matrix.size(0), matrix.size(1), 99) > 0);
}

// ---- Adam ---------------------------------------------------------------------------------------

TEST(MaskedAdam, IsAdamOnKeptWeightsAndLeavesZerosAlone) {
  const at::Tensor start = half_of(random_matrix(70, 33, 1));
  MaskedAdam adam;
  adam.add(start, at::kFloat);
  at::Tensor w = start.to(at::kDouble), m = at::zeros_like(w), v = at::zeros_like(w);
  for (int step = 1; step <= 5; ++step) {
    const at::Tensor gradient = random_matrix(70, 33, 10 + static_cast<uint64_t>(step));
    adam.step({gradient}, 0.01, Executor::serial());
    const at::Tensor g = gradient.to(at::kDouble);
    m = 0.9 * m + 0.1 * g;
    v = 0.999 * v + 0.001 * g * g;
    w = w -
        0.01 * (m / (1 - std::pow(0.9, step))) / ((v / (1 - std::pow(0.999, step))).sqrt() + 1e-8);
  }
  const at::Tensor kept = start != 0, now = adam.working()[0].detach();
  EXPECT_TRUE(at::equal(now != 0, kept));
  EXPECT_LT(((now.to(at::kDouble) - w) * kept).abs().max().item<double>(), 1e-5);
  EXPECT_GT(((now - start) * kept).abs().max().item<double>(), 0.04);
}

TEST(MaskedAdam, GivesTheSameBitsOnAnyExecutorAndInTheTypeOfTheProducts) {
  std::vector<at::Tensor> results;
  for (const bool parallel : {false, true})
    for (const auto dtype : {at::kFloat, at::kBFloat16}) {
      MaskedAdam adam;
      adam.add(half_of(random_matrix(300, 65, 1)), dtype);
      EXPECT_EQ(adam.working()[0].scalar_type(), dtype);
      for (uint64_t step = 0; step < 4; ++step)
        adam.step({random_matrix(300, 65, 5 + step)}, 0.01,
                  parallel ? model::torch_executor() : Executor::serial());
      const at::Tensor rounded = adam.rounded(0, at::kBFloat16);
      EXPECT_TRUE(at::equal(adam.working()[0].detach().to(at::kBFloat16), rounded));
      results.push_back(rounded);
    }
  for (const at::Tensor& each : results) EXPECT_TRUE(at::equal(each, results[0]));
}

TEST(MaskedAdam, KeepsWeightsThatAreTooSmallForTheirType) {
  at::Tensor weight = at::zeros({2, 3});
  weight[0][1] = 1e-12;
  MaskedAdam adam;
  adam.add(weight, at::kFloat);
  const at::Tensor half = adam.rounded(0, at::kHalf);
  EXPECT_TRUE(at::equal(half != 0, weight != 0));
  EXPECT_EQ(adam.rounded(0, at::kFloat)[0][1].item<float>(), 1e-12f);
}

TEST(MaskedAdam, RateRisesForATwentiethThenFallsToNothing) {
  EXPECT_DOUBLE_EQ(rate_at(0, 1, 0.5), 0.5);
  EXPECT_LT(rate_at(0, 100, 1), rate_at(3, 100, 1));
  double before = 1.0;
  for (int64_t step = 5; step < 100; ++step) {
    EXPECT_LT(rate_at(step, 100, 1), before);
    before = rate_at(step, 100, 1);
  }
  EXPECT_GT(rate_at(5, 100, 1), 0.99);
  EXPECT_LT(before, 0.001);
}

// ---- gradients ----------------------------------------------------------------------------------

TEST(Reconstruct, GradientsAreThoseOfCentralDifferences) {
  const auto checkpoint = io::Checkpoint::open(lacuna::testing::demo_model_folder());
  ASSERT_TRUE(checkpoint.ok());
  const model::Compute compute;
  const auto dense = model::Decoder::load(*checkpoint, compute);
  ASSERT_TRUE(dense.ok());
  const Calibration calibration = random_calibration(2, 12);
  std::vector<at::Tensor> rows;
  for (const auto& ids : calibration.ids)
    rows.push_back(at::tensor(at::ArrayRef<int32_t>(ids), at::kInt).to(at::kLong));
  const at::Tensor outputs = dense->hidden(at::stack(rows));
  std::vector<BlockTraining> blocks;
  for (int64_t layer = 0; layer < dense->spec().layers; ++layer) {
    auto block = model::Block::load(*checkpoint, dense->spec(), layer, compute);
    ASSERT_TRUE(block.ok());
    std::vector<at::Tensor> weights;
    const std::vector<std::string> names = block->linear_names();
    for (const std::string& name : names) weights.push_back(half_of(block->linear(name).weight()));
    blocks.emplace_back(std::move(*block), names, weights, compute);
  }
  const std::vector<int64_t> samples = {1, 0};
  const auto run = [&](const auto& visit) {
    return model_gradients(blocks, dense->ends(), calibration, outputs, samples, compute,
                           dense->rotary(), visit)
        .template item<double>();
  };
  std::map<size_t, std::vector<at::Tensor>> gradients;
  const double value =
      run([&](size_t block, const std::vector<at::Tensor>& of) { gradients[block] = of; });
  EXPECT_GT(value, 0.01);
  const auto ignore = [](size_t, const std::vector<at::Tensor>&) {};
  ASSERT_EQ(gradients.size(), blocks.size());
  for (const size_t block : {size_t{0}, blocks.size() - 1})
    for (const size_t i : {size_t{0}, size_t{3}, size_t{6}}) {  // q, o, down
      const at::NoGradGuard off;
      const at::Tensor& weight = blocks[block].weights().working()[i];
      const at::Tensor& gradient = gradients[block][i];
      ASSERT_EQ(gradient.sizes(), weight.sizes());
      // Along the gradient itself, so far that the objective changes by a hundredth: float32's
      // rounding and the third derivative both stay small beside that.
      const double length = gradient.norm().item<double>();
      const at::Tensor step = gradient * (0.01 * value / (length * length));
      const double size = step.norm().item<double>();
      weight.add_(step);
      const double above = run(ignore);
      weight.sub_(step, 2);
      const double below = run(ignore);
      weight.add_(step);
      EXPECT_NEAR((above - below) / (2 * size), length, 0.02 * length)
          << "block " << block << " " << blocks[block].names()[i];
    }
}

// ---- whole runs ---------------------------------------------------------------------------------

std::map<std::string, std::string> weights_of(const fs::path& folder) {
  std::map<std::string, std::string> files;
  for (const auto& entry : fs::directory_iterator(folder))
    if (entry.path().extension() == ".safetensors") {
      std::ifstream stream(entry.path(), std::ios::binary);
      std::stringstream text;
      text << stream.rdbuf();
      files[entry.path().filename().string()] = text.str();
    }
  EXPECT_FALSE(files.empty()) << folder;
  return files;
}

class Reconstruction : public ::testing::Test {
 protected:
  void SetUp() override {
    model_ = lacuna::testing::demo_model_folder();
    out_ = lacuna::testing::scratch_folder("reconstruct") / "out";
  }
  Result<PruneReport> prune(const PruneOptions& options, const fs::path& out,
                            const PruneProgress& progress = {}) const {
    LACUNA_TRY(const auto checkpoint, io::Checkpoint::open(model_));
    return prune_model(checkpoint, calibration_, out, options, progress);
  }
  PruneOptions options(bool block, bool model) const {
    PruneOptions options{.method = "wanda"};
    options.reconstruct = {.block = block, .model = model, .epochs = 3, .batch = 3, .rate = 2e-4};
    return options;
  }
  fs::path model_, out_;
  const Calibration calibration_ = random_calibration(6, 32);
};

bool is_block_linear(const std::string& name) {
  return name.find("layers.") != std::string::npos && name.find("_proj.") != std::string::npos;
}

TEST_F(Reconstruction, OfTheModelLowersItsObjectiveAndKeepsEveryMaskAndEverythingElse) {
  const fs::path plain = out_.string() + "-plain";
  for (const char* pattern : {"unstructured", "2:4"}) {
    PruneOptions with = options(false, true), without{.method = "wanda"};
    with.request.pattern = without.request.pattern = *format::Pattern::parse(pattern);
    with.store = without.store = io::Store::kDense;
    ASSERT_TRUE(prune(without, plain).ok());
    const auto report = prune(with, out_);
    ASSERT_TRUE(report.ok()) << report.error().message;
    ASSERT_EQ(report->reconstruction.size(), 3U);
    EXPECT_LT(report->reconstruction[2], 0.9 * report->reconstruction[0]);
    EXPECT_TRUE(report->warnings.empty());
    const auto before = io::Checkpoint::open(plain), after = io::Checkpoint::open(out_);
    for (const auto& [name, info] : before->weights()) {
      const Tensor a = *before->dense(name), b = *after->dense(name);
      ASSERT_EQ(a.dtype, b.dtype);
      const at::Tensor was = model::wrap(a), is = model::wrap(b);
      EXPECT_TRUE(at::equal(was == 0, is == 0)) << name;
      EXPECT_EQ(at::equal(was, is), !is_block_linear(name)) << name;
    }
    EXPECT_EQ(after->config().at("lacuna").at("reconstruct").at("model"), true);
    EXPECT_EQ(after->config().at("lacuna").at("reconstruct").at("epochs"), 3);
  }
}

TEST_F(Reconstruction, OfBlocksBringsTheirOutputsCloserAndKeepsThePattern) {
  PruneOptions by_block = options(true, false);
  by_block.request.pattern = format::Pattern::keep_of(2, 4);
  std::vector<std::string> lines;
  const auto report =
      prune(by_block, out_, {.log = [&](const std::string& line) { lines.push_back(line); }});
  ASSERT_TRUE(report.ok()) << report.error().message;
  int64_t told = 0;
  for (const std::string& line : lines) {
    int block = 0;
    double first = 0, last = 0;
    if (std::sscanf(line.c_str(),
                    "block %d: relative error of the outputs %lf in the first epoch, %lf in the",
                    &block, &first, &last) != 3)
      continue;
    ++told;
    EXPECT_LT(last, first) << line;
  }
  const auto after = io::Checkpoint::open(out_);
  EXPECT_EQ(told, model::spec_of(*after)->layers);
  for (const auto& [name, info] : after->weights())
    if (is_block_linear(name)) {
      EXPECT_TRUE(format::check_pattern(*after->dense(name), by_block.request.pattern).empty())
          << name;
    }
}

TEST_F(Reconstruction, GivesTheSameBitsForASeedOnAnyThreadCount) {
  std::map<std::string, std::string> first, other;
  for (const int threads : {1, 3}) {
    model::set_threads(threads);
    const auto report = prune(options(true, true), out_);
    ASSERT_TRUE(report.ok()) << report.error().message;
    if (first.empty()) first = weights_of(out_);
    EXPECT_EQ(weights_of(out_), first) << threads;
  }
  model::set_threads(0);
  PruneOptions another = options(true, true);
  another.seed = 5;
  ASSERT_TRUE(prune(another, out_).ok());
  EXPECT_NE(weights_of(out_), first);  // the order of the samples
}

TEST_F(Reconstruction, GoesOnWhereItWasStoppedAndEndsInTheSameBytes) {
  const PruneOptions both = options(true, true);
  ASSERT_TRUE(prune(both, out_).ok());
  const auto undisturbed = weights_of(out_);
  // In the middle of a block's training, and in that of the whole model.
  for (const char* place : {"block 2/6, epoch 2/3", "model, epoch 2/3"}) {
    const fs::path stopped = out_.string() + "-stopped";
    std::atomic<bool> stop = false;
    int64_t most = 0, total = 0;
    PruneProgress progress;
    progress.interrupted = &stop;
    progress.step = [&](int64_t, int64_t, const std::string& what) { stop = what == place; };
    const auto report = prune(both, stopped, progress);
    ASSERT_FALSE(report.ok()) << place;
    EXPECT_EQ(report.error().code, Code::kInterrupted);
    PruneOptions resumed = both;
    resumed.resume = true;
    progress.step = [&](int64_t done, int64_t all, const std::string&) {
      most = done;
      total = all;
    };
    stop = false;
    const auto finished = prune(resumed, stopped, progress);
    ASSERT_TRUE(finished.ok()) << finished.error().message;
    EXPECT_EQ(weights_of(stopped), undisturbed) << place;
    EXPECT_LE(most, total);
    EXPECT_FALSE(fs::exists(stopped.string() + ".journal"));
    // Other options are another run.
    fs::remove_all(stopped);
  }
}

TEST_F(Reconstruction, TrainsOnlyWhatIsPruned) {
  PruneOptions some = options(true, true);
  some.target = {"up_proj", "layers.1.self_attn.q_proj"};
  some.store = io::Store::kDense;
  ASSERT_TRUE(prune(some, out_).ok());
  const auto before = io::Checkpoint::open(model_), after = io::Checkpoint::open(out_);
  for (const auto& [name, info] : before->weights()) {
    const bool target = name.find("up_proj") != std::string::npos ||
                        name.find("layers.1.self_attn.q_proj") != std::string::npos;
    const Tensor a = *before->dense(name), b = *after->dense(name);
    EXPECT_EQ(at::equal(model::wrap(a), model::wrap(b)), !target) << name;
  }
}

TEST_F(Reconstruction, SaysWhatItCannotDo) {
  ReconstructOptions words;
  EXPECT_TRUE(add_reconstruction("block", words).ok());
  EXPECT_TRUE(words.block && !words.model);
  EXPECT_THAT(add_reconstruction("layer", words).error().message, HasSubstr("unknown objective"));

  PruneOptions coded = options(false, true);
  coded.request.quantization.code = format::Code::kInt8;
  auto refused = prune(coded, out_);
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.error().code, Code::kUsage);
  EXPECT_THAT(refused.error().message, HasSubstr("can't be combined with --quantize"));

  PruneOptions saving = options(true, false);
  saving.save_statistics = out_.string() + ".statistics";
  refused = prune(saving, out_);
  ASSERT_FALSE(refused.ok());
  EXPECT_THAT(refused.error().message, HasSubstr("--save-statistics out"));

  const auto checkpoint = io::Checkpoint::open(model_);
  PruneOptions magnitude = options(false, true);
  magnitude.method = "magnitude";
  refused = prune_model(*checkpoint, Calibration{}, out_, magnitude);
  ASSERT_FALSE(refused.ok());
  EXPECT_THAT(refused.error().message, HasSubstr("needs calibration"));

  PruneOptions wild = options(false, true);
  wild.reconstruct.rate = 1e30;
  refused = prune(wild, out_);
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.error().code, Code::kCheckFailed);
  EXPECT_THAT(refused.error().message, HasSubstr("--learning-rate"));
}

TEST_F(Reconstruction, WarnsWhereTooHighARateDoesHarm) {
  PruneOptions hasty = options(false, true);
  hasty.reconstruct.rate = 0.02;
  const auto report = prune(hasty, out_);
  ASSERT_TRUE(report.ok()) << report.error().message;
  ASSERT_EQ(report->warnings.size(), 1U);
  EXPECT_THAT(report->warnings[0], HasSubstr("model: the reconstruction's objective rose"));
}

TEST_F(Reconstruction, PlansMoreMemoryThanPruningAlone) {
  const auto checkpoint = io::Checkpoint::open(model_);
  const auto spec = *model::spec_of(*checkpoint);
  const CalibrationSource source{.samples = 6, .length = 32, .self = {}, .make = {}};
  const uint64_t alone =
      planned_peak_bytes(spec, *checkpoint, source, PruneOptions{.method = "wanda"});
  EXPECT_GT(planned_peak_bytes(spec, *checkpoint, source, options(true, false)), alone);
  EXPECT_GE(planned_peak_bytes(spec, *checkpoint, source, options(false, true)),
            planned_training_bytes(spec, 6, 32, options(false, true).reconstruct, {}));
}

// ---- on a GPU -----------------------------------------------------------------------------------

TEST_F(Reconstruction, GivesTheSameBitsTwiceOnAGpu) {
  const auto device = model::open_device("cuda");
  if (!device.ok()) GTEST_SKIP() << device.error().message;
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    std::map<std::string, std::string> first;
    for (int run = 0; run < 2; ++run) {
      PruneOptions both = options(true, true);
      both.compute = {.device = *device, .dtype = dtype};
      const auto report = prune(both, out_);
      ASSERT_TRUE(report.ok()) << report.error().message;
      EXPECT_LT(report->reconstruction[2], report->reconstruction[0]);
      if (run == 0) first = weights_of(out_);
      EXPECT_EQ(weights_of(out_), first);
    }
  }
}

}  // namespace
}  // namespace lacuna::prune
