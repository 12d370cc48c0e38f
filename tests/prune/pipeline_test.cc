#include "lacuna/prune/pipeline.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <thread>

#include "lacuna/core/memory.h"
#include "lacuna/core/random.h"
#include "lacuna/format/codes.h"
#include "lacuna/io/file.h"
#include "lacuna/io/out_folder.h"
#include "lacuna/model/decoder.h"
#include "lacuna/prune/grid.h"
#include "lacuna/prune/statistics_folder.h"
#include "support/data.h"

namespace lacuna::prune {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

Calibration random_calibration(int64_t samples, int64_t length, int64_t vocab = 4096) {
  Calibration calibration{"random", {}};
  for (int64_t s = 0; s < samples; ++s) {
    calibration.ids.emplace_back();
    for (int64_t i = 0; i < length; ++i)
      calibration.ids.back().push_back(static_cast<int32_t>(
          random_bits(1, static_cast<uint64_t>(s), static_cast<uint64_t>(i)) % vocab));
  }
  return calibration;
}

Result<PruneReport> prune(const fs::path& model, const fs::path& out, const PruneOptions& options,
                          const Calibration& calibration, const PruneProgress& progress = {}) {
  LACUNA_TRY(const auto checkpoint, io::Checkpoint::open(model));
  return prune_model(checkpoint, calibration, out, options, progress);
}

std::string content_of(const fs::path& file) {
  std::ifstream stream(file, std::ios::binary);
  std::stringstream text;
  text << stream.rdbuf();
  return text.str();
}

/// Names and contents of the safetensors files of a folder.
std::map<std::string, std::string> weights_of(const fs::path& folder) {
  std::map<std::string, std::string> files;
  for (const auto& entry : fs::directory_iterator(folder))
    if (entry.path().extension() == ".safetensors")
      files[entry.path().filename().string()] = content_of(entry.path());
  EXPECT_FALSE(files.empty()) << folder;
  return files;
}

bool is_block_linear(const std::string& name) {
  return name.find("layers.") != std::string::npos && name.find("_proj.") != std::string::npos;
}

double sparsity_of(const Tensor& tensor) {
  return static_cast<double>(format::count_zeros(tensor)) / static_cast<double>(tensor.elements());
}

class Pipeline : public ::testing::Test {
 protected:
  void SetUp() override {
    model_ = lacuna::testing::demo_model_folder();
    out_ = lacuna::testing::scratch_folder("prune") / "out";
  }
  fs::path model_, out_;
  const Calibration calibration_ = random_calibration(6, 48);
};

TEST_F(Pipeline, PrunesTheLinearsOfTheBlocksAndNothingElse) {
  for (const char* method : {"magnitude", "wanda", "hessian", "sparsegpt", "alps"}) {
    for (const char* pattern : {"unstructured", "2:4", "block:16x16"}) {
      // It takes longest, and its solver knows no pattern, only a mask.
      if (method == std::string("hessian") && pattern != std::string("2:4")) continue;
      PruneOptions options{.method = method};
      options.request.pattern = *format::Pattern::parse(pattern);
      std::vector<std::string> lines;
      const auto report = prune(model_, out_, options, calibration_,
                                {.log = [&](const std::string& line) { lines.push_back(line); }});
      ASSERT_TRUE(report.ok()) << report.error().message;
      ASSERT_FALSE(lines.empty());
      EXPECT_THAT(lines[0], HasSubstr("peak memory"));
      const auto before = io::Checkpoint::open(model_), after = io::Checkpoint::open(out_);
      ASSERT_TRUE(after.ok()) << after.error().message;
      ASSERT_EQ(before->weights().size(), after->weights().size());
      size_t pruned = 0;
      for (const auto& [name, info] : before->weights()) {
        const Tensor dense = *before->dense(name), sparse = *after->dense(name);
        ASSERT_EQ(sparse.dtype, dense.dtype);
        if (is_block_linear(name)) {
          EXPECT_NEAR(sparsity_of(sparse), 0.5, 1e-4) << name;
          EXPECT_EQ(after->weights().at(name).pattern, options.request.pattern);
          EXPECT_TRUE(format::check_pattern(sparse, options.request.pattern).empty()) << name;
          const auto& layer = report->layers[pruned++];
          EXPECT_GT(layer.error, method == std::string("alps") ? 0.001 : 0.01);
          EXPECT_LT(layer.error, 1);
        } else {
          EXPECT_EQ(std::memcmp(sparse.bytes.data(), dense.bytes.data(), dense.bytes.size()), 0)
              << name;
        }
      }
      EXPECT_EQ(pruned, report->layers.size());
      EXPECT_NEAR(report->sparsity, 0.5, 1e-4);
      EXPECT_EQ(report->bytes_dense, before->total_bytes());
      EXPECT_EQ(report->bytes_out, after->total_bytes());
      EXPECT_LT(report->bytes_out, report->bytes_dense);
      EXPECT_FALSE(fs::exists(out_.string() + ".journal"));
      EXPECT_TRUE(fs::exists(out_ / "tokenizer.json"));
      const auto& about = after->config().at("lacuna");
      EXPECT_EQ(about.at("method"), method);
      EXPECT_EQ(about.at("pattern"), pattern);
      EXPECT_EQ(about.at("calibration").at("samples"), 6);
      EXPECT_EQ(after->config().at("architectures"), before->config().at("architectures"));
    }
  }
}

TEST_F(Pipeline, PrunesWhatAnEarlierRunLeftDenseAndKeepsItsOtherWeights) {
  PruneOptions options{.method = "magnitude"};
  options.request.pattern = format::Pattern::keep_of(2, 4);
  options.target = {"q_proj"};
  ASSERT_TRUE(prune(model_, out_, options, {}).ok());
  const fs::path second = out_.string() + "-second/";  // the slash is no part of the name
  options.request.pattern = format::Pattern::unstructured();
  options.target = {"up_proj"};
  const auto report = prune(out_, second, options, {});
  ASSERT_TRUE(report.ok()) << report.error().message;
  const auto after = io::Checkpoint::open(second);
  EXPECT_EQ(after->weights().at("model.layers.0.self_attn.q_proj.weight").pattern.text(), "2:4");
  EXPECT_EQ(after->weights().at("model.layers.0.mlp.up_proj.weight").pattern.text(),
            "unstructured");
  EXPECT_EQ(after->config().at("lacuna").at("pattern"), "unstructured");
}

TEST_F(Pipeline, PrunesTheTargetsThatAreNotExcluded) {
  PruneOptions options{.method = "wanda"};
  options.target = {"q_proj", "mlp\\.(up|gate)"};
  options.exclude = {"layers\\.1\\."};
  const auto report = prune(model_, out_, options, calibration_);
  ASSERT_TRUE(report.ok()) << report.error().message;
  const auto after = io::Checkpoint::open(out_);
  for (const auto& [name, info] : after->weights()) {
    const bool wanted =
        (name.find("q_proj") != std::string::npos || name.find("up_proj") != std::string::npos ||
         name.find("gate_proj") != std::string::npos) &&
        name.find("layers.1.") == std::string::npos;
    if (is_block_linear(name)) {
      EXPECT_NEAR(sparsity_of(*after->dense(name)), wanted ? 0.5 : 0, 0.01) << name;
    }
  }
  options.target = {"nothing"};
  EXPECT_EQ(prune(model_, out_, options, calibration_).error().code, Code::kUsage);
  options.target = {"(["};
  const auto bad = prune(model_, out_, options, calibration_);
  EXPECT_EQ(bad.error().code, Code::kUsage);
  EXPECT_THAT(bad.error().message, HasSubstr("--target: not a regular expression"));
}

TEST_F(Pipeline, SharedInputsGiveTheSameResultAsSingleTargets) {
  PruneOptions options;
  ASSERT_TRUE(prune(model_, out_, options, calibration_).ok());
  const Tensor together =
      *io::Checkpoint::open(out_)->dense("model.layers.0.self_attn.v_proj.weight");
  options.target = {"layers.0.self_attn.v_proj"};
  ASSERT_TRUE(prune(model_, out_, options, calibration_).ok());
  const Tensor alone = *io::Checkpoint::open(out_)->dense("model.layers.0.self_attn.v_proj.weight");
  EXPECT_EQ(std::memcmp(together.bytes.data(), alone.bytes.data(), alone.bytes.size()), 0);
}

TEST_F(Pipeline, AtSparsityZeroWritesTheSameWeights) {
  for (const char* method : {"magnitude", "wanda", "sparsegpt", "alps"}) {
    PruneOptions options{.method = method, .store = io::Store::kDense};
    options.request.sparsity = 0;
    ASSERT_TRUE(prune(model_, out_, options, calibration_).ok());
    const auto before = io::Checkpoint::open(model_), after = io::Checkpoint::open(out_);
    for (const auto& [name, info] : before->weights()) {
      const Tensor a = *before->dense(name), b = *after->dense(name);
      EXPECT_EQ(std::memcmp(a.bytes.data(), b.bytes.data(), a.bytes.size()), 0) << name;
    }
  }
}

TEST_F(Pipeline, MagnitudeNeedsNoCalibrationAndThenKnowsNoError) {
  PruneOptions options{.method = "magnitude"};
  const auto report = prune(model_, out_, options, {});
  ASSERT_TRUE(report.ok()) << report.error().message;
  for (const LayerReport& layer : report->layers) EXPECT_LT(layer.error, 0);
  options.method = "wanda";
  EXPECT_EQ(prune(model_, out_, options, {}).error().code, Code::kUsage);
}

TEST_F(Pipeline, AlpsLosesLessThanSparseGptThatLessThanWandaAndWandaLessThanMagnitude) {
  const auto checkpoint = io::Checkpoint::open(model_);
  std::vector<double> errors;
  for (const char* method : {"alps", "sparsegpt", "wanda", "magnitude"}) {
    const auto report = prune(model_, out_, {.method = method}, random_calibration(16, 128));
    ASSERT_TRUE(report.ok()) << report.error().message;
    double sum = 0;
    for (const LayerReport& layer : report->layers) sum += layer.error;
    errors.push_back(sum);
  }
  EXPECT_LT(errors[0], errors[1]);
  EXPECT_LT(errors[1], errors[2]);
  EXPECT_LT(errors[2], errors[3]);
}

/// A copy of the model in which the first value of a tensor is another.
fs::path model_with(const fs::path& model, const std::string& tensor, uint16_t bf16) {
  const fs::path copy = lacuna::testing::scratch_folder("broken") / "model";
  fs::copy(model, copy);
  const fs::path path = copy / "model.safetensors";
  const auto file = io::SafetensorsFile::open(path);
  uint64_t position = 8 + read_unaligned<uint64_t>(content_of(path).data());
  for (const auto& entry : file->entries())
    if (entry.name == tensor) position += entry.begin;
  fs::permissions(path, fs::perms::owner_write, fs::perm_options::add);
  std::fstream stream(path, std::ios::binary | std::ios::in | std::ios::out);
  stream.seekp(static_cast<std::streamoff>(position));
  stream.write(reinterpret_cast<const char*>(&bf16), 2);
  EXPECT_TRUE(stream.good());
  return copy;
}

TEST_F(Pipeline, PrunesByStatisticsOfTheDenseModelFromAFolder) {
  const fs::path folder = out_.string() + ".statistics";
  PruneOptions saving{.method = "alps", .save_statistics = folder};
  ASSERT_TRUE(prune(model_, out_, saving, calibration_).ok());
  const auto first = weights_of(out_);
  // The folder is all that is needed, and another method finds what it needs there too.
  PruneOptions reading{.method = "alps", .statistics = folder};
  const auto report = prune(model_, out_, reading, {});
  ASSERT_TRUE(report.ok()) << report.error().message;
  EXPECT_EQ(weights_of(out_), first);
  EXPECT_GT(report->layers[0].error, 0);
  const auto about = io::Checkpoint::open(out_)->config().at("lacuna");
  EXPECT_EQ(about.at("statistics"), "dense");
  EXPECT_EQ(about.at("calibration").at("samples"), 6);
  for (const char* method : {"wanda", "sparsegpt", "dsnot"})
    EXPECT_TRUE(prune(model_, out_, {.method = method, .statistics = folder}, {}).ok()) << method;

  // The first block's inputs are the same with and without the propagation of errors.
  ASSERT_TRUE(prune(model_, out_, {.method = "alps"}, calibration_).ok());
  const std::string name = "model.layers.0.mlp.down_proj.weight";
  const Tensor propagated = *io::Checkpoint::open(out_)->dense(name);
  ASSERT_TRUE(prune(model_, out_, reading, {}).ok());
  const Tensor dense = *io::Checkpoint::open(out_)->dense(name);
  EXPECT_EQ(std::memcmp(propagated.bytes.data(), dense.bytes.data(), dense.bytes.size()), 0);

  EXPECT_EQ(prune(model_, out_, saving, calibration_).error().code, Code::kBadInput);
  // A value in the middle of the files, far from what their first MiB holds.
  const std::string within = "model.layers.2.mlp.up_proj.weight";
  const auto another = prune(model_with(model_, within, 0x3f80), out_, reading, {});
  ASSERT_FALSE(another.ok());
  EXPECT_THAT(another.error().message, HasSubstr("statistics of another model"));

  const fs::path file = folder / "block-001.safetensors";
  std::string bytes = content_of(file);
  bytes[bytes.size() - 100] ^= 1;
  ASSERT_TRUE(io::write_text(file, bytes).ok());
  const auto damaged = prune(model_, out_, reading, {});
  ASSERT_FALSE(damaged.ok());
  EXPECT_EQ(damaged.error().code, Code::kBadInput);
  EXPECT_THAT(damaged.error().message,
              AllOf(HasSubstr("block-001.safetensors"), HasSubstr("is damaged")));
  fs::copy(folder / "block-002.safetensors", file, fs::copy_options::overwrite_existing);
  fs::remove_all(out_.string() + ".journal");
  EXPECT_THAT(prune(model_, out_, reading, {}).error().message,
              AllOf(HasSubstr("block-001.safetensors"), HasSubstr("another block")));
  fs::remove_all(out_.string() + ".journal");
  const fs::path other = lacuna::testing::scratch_folder("config") / "model";
  fs::copy(model_, other);
  auto config = io::Checkpoint::open(model_)->config();
  config["rms_norm_eps"] = 0.1;
  fs::remove(other / "config.json");
  ASSERT_TRUE(io::write_text(other / "config.json", config.dump()).ok());
  EXPECT_THAT(prune(other, out_, reading, {}).error().message, HasSubstr("another config.json"));
  fs::remove(folder / "statistics.json");
  fs::remove_all(out_.string() + ".journal");
  EXPECT_THAT(prune(model_, out_, reading, {}).error().message,
              HasSubstr("no finished statistics"));
}

TEST_F(Pipeline, StatisticsGoIntoNoFolderOfSomethingElseAndHoldNoNaN) {
  ASSERT_TRUE(prune(model_, out_, {.method = "magnitude"}, {}).ok());
  const auto before = weights_of(out_);
  const fs::path other = out_.string() + "2";
  PruneOptions saving{.method = "wanda", .save_statistics = out_};
  EXPECT_THAT(prune(model_, other, saving, calibration_).error().message,
              AllOf(HasSubstr(out_.string()), HasSubstr("no part of statistics")));
  EXPECT_EQ(weights_of(out_), before);

  const fs::path statistics = out_.string() + ".statistics";
  saving.save_statistics = statistics;
  const auto report =
      prune(model_with(model_, "model.layers.2.post_attention_layernorm.weight", 0x7fc0), other,
            saving, calibration_);
  ASSERT_FALSE(report.ok());
  EXPECT_THAT(report.error().message, AllOf(HasSubstr("block 2"), HasSubstr("not all finite")));
  EXPECT_FALSE(StatisticsFolder::open(statistics).ok());
}

TEST_F(Pipeline, RefusesExpressionsThatMatchNothing) {
  for (auto PruneOptions::*list :
       {&PruneOptions::target, &PruneOptions::exclude, &PruneOptions::refine_target}) {
    PruneOptions options{.method = "magnitude", .refine = {"swaps"}};
    options.*list = {"up_proj", "q_proj,k_proj"};
    const auto report = prune(model_, out_, options, calibration_);
    ASSERT_FALSE(report.ok());
    EXPECT_EQ(report.error().code, Code::kUsage);
    EXPECT_THAT(report.error().message,
                AllOf(HasSubstr("\"q_proj,k_proj\" matches no weight"), HasSubstr("self_attn")));
  }
  const PruneOptions ends{.method = "magnitude", .exclude = {"embed_tokens", "lm_head", "norm"}};
  EXPECT_TRUE(prune(model_, out_, ends, {}).ok()) << "never pruned, but there";
}

TEST_F(Pipeline, RefusesIdsAndLengthsThatTheModelDoesNotHave) {
  Calibration calibration = calibration_;
  calibration.ids[1][2] = 4096;
  EXPECT_EQ(prune(model_, out_, {}, calibration).error().code, Code::kBadInput);
  EXPECT_EQ(prune(model_, out_, {}, random_calibration(1, 100000)).error().code, Code::kUsage);
}

TEST_F(Pipeline, NamesAWeightWithANaN) {
  const std::string name = "model.layers.2.mlp.up_proj.weight";
  const auto report = prune(model_with(model_, name, 0x7fc0), out_, {.method = "magnitude"}, {});
  ASSERT_FALSE(report.ok());
  EXPECT_EQ(report.error().code, Code::kBadInput);
  EXPECT_THAT(report.error().message,
              HasSubstr(name + ": weight: must be finite (got nan in row 0"));
  EXPECT_FALSE(fs::exists(out_));
}

TEST_F(Pipeline, NamesALinearWhoseInputsAreNotFinite) {
  const auto broken = model_with(model_, "model.layers.1.post_attention_layernorm.weight", 0x7f80);
  for (const char* method : {"wanda", "sparsegpt"}) {
    const auto report = prune(broken, out_, {.method = method}, calibration_);
    ASSERT_FALSE(report.ok());
    EXPECT_EQ(report.error().code, Code::kBadInput);
    EXPECT_THAT(report.error().message, HasSubstr("model.layers.1.mlp.gate_proj.weight: inputs"));
    fs::remove_all(out_.string() + ".journal");  // block 0 was finished
  }
}

TEST_F(Pipeline, SaysWhichLayersDampingWasRaised) {
  // One token, always the same: every Gram matrix has rank 1 or little more.
  Calibration calibration{"one", {std::vector<int32_t>(48, 7)}};
  PruneOptions options;
  options.request.damping = 1e-14;
  const auto report = prune(model_, out_, options, calibration);
  ASSERT_TRUE(report.ok()) << report.error().message;
  ASSERT_FALSE(report->warnings.empty());
  EXPECT_THAT(report->warnings[0],
              HasSubstr("model.layers.0.self_attn.q_proj.weight: damping raised"));
  EXPECT_GT(report->layers[0].damping, 1e-14);
}

TEST_F(Pipeline, GivesTheSameBitsOnAnyThreadCount) {
  for (const char* method : {"wanda", "sparsegpt", "alps"}) {
    std::map<std::string, std::string> first;
    nlohmann::json config;
    for (int threads : {1, 2, 3}) {
      model::set_threads(threads);
      const auto report = prune(model_, out_, {.method = method}, random_calibration(7, 200));
      model::set_threads(0);
      ASSERT_TRUE(report.ok()) << report.error().message;
      if (first.empty()) first = weights_of(out_), config = io::Checkpoint::open(out_)->config();
      EXPECT_EQ(weights_of(out_), first) << threads << " threads, " << method;
      EXPECT_EQ(io::Checkpoint::open(out_)->config(), config) << threads << " threads, " << method;
    }
  }
}

TEST_F(Pipeline, InterruptedKeepsItsBlocksAndGoesOnToTheSameBytes) {
  PruneOptions options{.method = "alps", .refine = {"swaps", "polish"}};
  ASSERT_TRUE(prune(model_, out_, options, calibration_).ok());
  const auto whole = weights_of(out_);
  fs::remove_all(out_);

  std::atomic<bool> interrupted = false;
  const PruneProgress progress{.step =
                                   [&](int64_t done, int64_t total, const std::string&) {
                                     if (done > total / 2) interrupted = true;
                                   },
                               .interrupted = &interrupted};
  const auto stopped = prune(model_, out_, options, calibration_, progress);
  ASSERT_FALSE(stopped.ok());
  EXPECT_EQ(stopped.error().code, Code::kInterrupted);
  EXPECT_THAT(stopped.error().message, HasSubstr("--resume"));
  EXPECT_TRUE(fs::exists(out_.string() + ".journal/block-000.safetensors"));
  EXPECT_FALSE(fs::exists(out_));

  options.resume = true;
  PruneOptions other = options;
  other.request.damping = 0.5;
  const auto refused = prune(model_, out_, other, calibration_);
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.error().code, Code::kBadInput);
  EXPECT_THAT(refused.error().message, HasSubstr("different: damping"));

  const auto report = prune(model_, out_, options, calibration_);
  ASSERT_TRUE(report.ok()) << report.error().message;
  EXPECT_EQ(weights_of(out_), whole);
  EXPECT_EQ(report->layers[0].name, "model.layers.0.self_attn.q_proj.weight");
}

TEST_F(Pipeline, PrunesByGradientsAndResumesToTheSameBytes) {
  for (const char* score : {"gradient", "fisher", "regional"}) {
    PruneOptions options{.method = "", .score = score};
    model::set_threads(1);
    const auto report = prune(model_, out_, options, calibration_);
    model::set_threads(0);
    ASSERT_TRUE(report.ok()) << report.error().message;
    EXPECT_NEAR(report->sparsity, 0.5, 1e-4);
    const auto whole = weights_of(out_);
    fs::remove_all(out_);
    std::atomic<bool> interrupted = false;
    const auto stop = [&](int64_t done, int64_t total, const std::string& what) {
      interrupted = interrupted || (what.starts_with("block") && done > total / 2);
    };
    EXPECT_EQ(
        prune(model_, out_, options, calibration_, {.step = stop, .interrupted = &interrupted})
            .error()
            .code,
        Code::kInterrupted);
    EXPECT_TRUE(fs::exists(out_.string() + ".journal/block-000.safetensors"));
    options.resume = true;
    int64_t last = 0, all = 0;
    const auto count = [&](int64_t done, int64_t total, const std::string&) {
      last = done, all = total;
    };
    const auto resumed = prune(model_, out_, options, calibration_, {.step = count});
    ASSERT_TRUE(resumed.ok()) << resumed.error().message;
    EXPECT_EQ(weights_of(out_), whole) << score;
    // All but the last block's outputs, which nobody reads.
    EXPECT_EQ(last, all - calibration_.samples()) << score;
    fs::remove_all(out_);
    options.resume = false;
    options.statistics = "somewhere";
    EXPECT_THAT(prune(model_, out_, options, {}).error().message, HasSubstr("--statistics"));
  }
}

TEST_F(Pipeline, SaysWhatAnInterruptBeforeTheBlocksKeeps) {
  PruneOptions options{.method = "wanda"};
  options.allocation.by = Allocation::kOwl;
  std::atomic<bool> interrupted = true;
  const auto stopped = [&] {
    const auto report = prune(model_, out_, options, calibration_, {.interrupted = &interrupted});
    EXPECT_EQ(report.error().code, Code::kInterrupted);
    return report.error().message;
  };
  EXPECT_THAT(stopped(), AllOf(HasSubstr("nothing is kept"), Not(HasSubstr("--resume"))));
  options.save_statistics = out_.string() + ".statistics";
  EXPECT_THAT(stopped(), HasSubstr("nothing is kept")) << "the statistics aren't whole";
  // The allocation comes after the statistics.
  const auto count = [&](int64_t, int64_t, const std::string& what) {
    interrupted = what.starts_with("allocation");
  };
  const auto later =
      prune(model_, out_, options, calibration_, {.step = count, .interrupted = &interrupted});
  EXPECT_THAT(later.error().message,
              AllOf(HasSubstr("the statistics are kept"), HasSubstr("--resume")));
  options.resume = true;
  interrupted = false;
  EXPECT_TRUE(prune(model_, out_, options, calibration_, {.interrupted = &interrupted}).ok());
}

TEST_F(Pipeline, RefinesTheWeightsThatItIsToldTo) {
  PruneOptions options{.method = "wanda", .refine = {"swaps"}};
  options.refine_target = {"self_attn"};
  // By statistics of the dense model, so that no layer sees what was done to another.
  options.save_statistics = out_.string() + ".statistics";
  ASSERT_TRUE(prune(model_, out_, options, calibration_).ok());
  PruneOptions all = options, none = options;
  all.statistics = none.statistics = options.save_statistics;
  all.save_statistics.clear(), none.save_statistics.clear();
  all.refine_target.clear(), none.refine_target.clear();
  none.refine.clear();
  const fs::path refined = out_.string() + "-all", plain = out_.string() + "-none";
  ASSERT_TRUE(prune(model_, refined, all, {}).ok());
  ASSERT_TRUE(prune(model_, plain, none, {}).ok());
  const auto some = io::Checkpoint::open(out_);
  for (const char* name :
       {"model.layers.1.self_attn.v_proj.weight", "model.layers.1.mlp.up_proj.weight"}) {
    const bool attention = std::string(name).find("self_attn") != std::string::npos;
    const auto like = io::Checkpoint::open(attention ? refined : plain),
               unlike = io::Checkpoint::open(attention ? plain : refined);
    const auto content = [&](const io::Checkpoint& of) {
      const Tensor tensor = *of.dense(name);
      return std::string(reinterpret_cast<const char*>(tensor.bytes.data()), tensor.bytes.size());
    };
    EXPECT_EQ(content(*some), content(*like)) << name;
    EXPECT_NE(content(*some), content(*unlike)) << name;
  }
  none.refine_target = {"self_attn"};
  EXPECT_THAT(prune(model_, plain, none, {}).error().message, HasSubstr("refines nothing"));
}

TEST_F(Pipeline, StoresDenseColumnsBesideAPatternAsABitmap) {
  PruneOptions options{.method = "sparsegpt"};
  options.request.rest = format::Pattern::keep_of(2, 4);
  options.request.sparsity = 0.375;
  const auto report = prune(model_, out_, options, calibration_);
  ASSERT_TRUE(report.ok()) << report.error().message;
  EXPECT_NEAR(report->sparsity, 0.375, 1e-4);
  const auto sparse = io::Checkpoint::open(out_);
  EXPECT_EQ(sparse->weights().at("model.layers.0.mlp.up_proj.weight").pattern,
            format::Pattern::unstructured());
  EXPECT_EQ(sparse->config().at("lacuna").at("dense_columns_beside"), "2:4");
  options.allocation.by = Allocation::kOwl;
  EXPECT_THAT(prune(model_, out_, options, calibration_).error().message,
              HasSubstr("not with dense columns"));
}

/// Files of statistics make the solver's work repeatable outside the pipeline.
TEST_F(Pipeline, WritesTheCodesThatTheSolverMadeUnderItsMask) {
  const fs::path statistics = out_.string() + ".statistics";
  PruneOptions options{.method = "alps"};
  options.request.pattern = format::Pattern::keep_of(2, 4);
  options.request.quantization = *format::Quantization::parse("int4g32");
  options.target = {"layers.1.mlp.(up|down)"};
  options.save_statistics = statistics;
  const auto report = prune(model_, out_, options, calibration_);
  ASSERT_TRUE(report.ok()) << report.error().message;
  EXPECT_EQ(report->quantization, "int4g32");
  EXPECT_EQ(report->sparsity, 0.5);
  const auto before = io::Checkpoint::open(model_), after = io::Checkpoint::open(out_);
  ASSERT_TRUE(after.ok()) << after.error().message;
  EXPECT_EQ(after->config().at("lacuna").at("quantization"), "int4g32");
  EXPECT_EQ(after->weights().at("model.embed_tokens.weight").quantization.text(), "int8");
  const auto folder = StatisticsFolder::open(statistics);
  ASSERT_TRUE(folder.ok());
  const InputsByTarget inputs = *folder->read(1);
  Request request = options.request;
  request.values = DType::kBF16;
  for (const char* linear : {"mlp.up_proj", "mlp.down_proj"}) {
    const std::string name = fmt::format("model.layers.1.{}.weight", linear);
    const at::Tensor weight = model::wrap(*before->dense(name)).to(at::kFloat);
    const Pruned pruned = *method_of(options)->prune(weight, *inputs.at(linear), request);
    auto matrix = std::get<format::CompactMatrix>(*after->weight(name));
    EXPECT_EQ(matrix.pattern, options.request.pattern);
    EXPECT_EQ(matrix.quantization, options.request.quantization);
    EXPECT_EQ(format::count_kept(matrix), pruned.mask.sum().item<int64_t>());
    matrix.values_dtype = DType::kF32;
    EXPECT_TRUE(at::equal(model::wrap(format::expand(matrix)), pruned.weight)) << name;
    for (format::RowWalk walk(matrix, 0); walk.row() < matrix.rows; walk.next())
      for (int64_t j = 0; j < matrix.columns; ++j)
        ASSERT_EQ((walk.bitmap()[j / 8] >> (j % 8) & 1) != 0,
                  pruned.mask[walk.row()][j].item<bool>());
  }
  options.save_statistics.clear();
  options.statistics = statistics;
  options.keep_head = true;
  ASSERT_TRUE(prune(model_, out_, options, {}).ok());
  EXPECT_TRUE(
      io::Checkpoint::open(out_)->weights().at("model.embed_tokens.weight").quantization.none());
  options.store = io::Store::kDense;
  const auto refused = prune(model_, out_, options, {});
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.error().code, Code::kUsage);
  EXPECT_THAT(refused.error().message, HasSubstr("only the compact store has codes"));
}

/// The model with one weight in another type.
fs::path model_with_type(const fs::path& model, const std::string& name, at::ScalarType type) {
  const fs::path copy = lacuna::testing::scratch_folder("retyped") / "model";
  const auto checkpoint = io::Checkpoint::open(model);
  auto writer = io::CheckpointWriter::create(copy, {});
  EXPECT_TRUE(writer.ok());
  for (const auto& [each, info] : checkpoint->weights()) {
    Tensor tensor = *checkpoint->dense(each);
    if (each == name) tensor = model::unwrap(model::wrap(tensor).to(type));
    EXPECT_TRUE(writer->add(each, tensor).ok());
  }
  EXPECT_TRUE(writer->finish(checkpoint->config()).ok());
  return copy;
}

TEST_F(Pipeline, RefusesATypeThatNoSparseStoreHoldsBeforeAnyWork) {
  const std::string name = "model.layers.5.mlp.down_proj.weight";
  for (const auto& [type, word] :
       {std::pair{at::kDouble, "float64"}, {at::kFloat8_e4m3fn, "float8"}}) {
    const fs::path model = model_with_type(model_, name, type);
    bool asked = false;
    const CalibrationSource source{6, 48, std::nullopt, [&]() -> Result<Calibration> {
                                     asked = true;
                                     return calibration_;
                                   }};
    const auto checkpoint = io::Checkpoint::open(model);
    const auto report = prune_model(*checkpoint, source, out_, {.method = "wanda"});
    ASSERT_FALSE(report.ok());
    EXPECT_EQ(report.error().code, Code::kBadInput);
    EXPECT_THAT(report.error().message,
                AllOf(HasSubstr(name), HasSubstr(word), HasSubstr("--exclude")));
    EXPECT_FALSE(asked);
    EXPECT_TRUE(
        prune(model, out_, {.method = "magnitude", .exclude = {"layers.5.mlp.down"}}, {}).ok())
        << "as it may stay dense";
    fs::remove_all(out_);
  }
}

TEST_F(Pipeline, StatesThePlanAndChecksOutBeforeItCalibrates) {
  const auto checkpoint = io::Checkpoint::open(model_);
  std::vector<std::string> said;
  const PruneProgress progress{.log = [&](const std::string& line) { said.push_back(line); }};
  const CalibrationSource source{6, 48, std::nullopt, [&]() -> Result<Calibration> {
                                   said.push_back("calibration");
                                   return calibration_;
                                 }};
  fs::create_directories(out_);
  ASSERT_TRUE(io::write_text(out_ / "thesis.txt", "mine").ok());
  EXPECT_FALSE(prune_model(*checkpoint, source, out_, {}, progress).ok());
  EXPECT_THAT(said, ElementsAre(HasSubstr("peak memory")));
  fs::remove_all(out_);
  fs::create_directories(out_.string() + ".journal/photos");
  EXPECT_FALSE(prune_model(*checkpoint, source, out_, {}, progress).ok());
  EXPECT_EQ(said.size(), 2u);
  fs::remove_all(out_.string() + ".journal");
  said.clear();
  ASSERT_TRUE(prune_model(*checkpoint, source, out_, {.method = "wanda"}, progress).ok());
  EXPECT_THAT(said, ElementsAre(HasSubstr("peak memory"), "calibration"));
}

TEST_F(Pipeline, ThePlanCountsTheModelThatCalibratesItself) {
  const auto checkpoint = io::Checkpoint::open(model_);
  const auto spec = model::spec_of(*checkpoint);
  const PruneOptions options{.working_bytes = 1};
  CalibrationSource source{.samples = 16, .length = 512};
  const uint64_t given = planned_peak_bytes(*spec, *checkpoint, source, options);
  source.self = model::Compute{};
  const uint64_t self = planned_peak_bytes(*spec, *checkpoint, source, options);
  EXPECT_GT(self, given);
  EXPECT_GE(self, static_cast<uint64_t>(spec->parameters()) * 4 +
                      16 * 512 * 2 *
                          static_cast<uint64_t>(spec->layers * spec->kv_heads * spec->head_dim) * 4)
      << "weights and caches";
}

TEST_F(Pipeline, RefusesAPlanBeyondTheMemoryThatItIsGivenAndTakesTheOneThatItNames) {
  const auto checkpoint = io::Checkpoint::open(model_);
  const auto refused = [&](PruneOptions options, CalibrationSource source) {
    options.memory = 1'000'000'000;
    source.make = []() -> Result<Calibration> { return check_failed("calibrated"); };
    const auto report = prune_model(*checkpoint, source, out_, options);
    EXPECT_FALSE(report.ok());
    EXPECT_EQ(report.error().code, Code::kNotPossible);
    return report.error().message;
  };
  const CalibrationSource many{20'000, 48};
  EXPECT_THAT(refused({}, many), AllOf(HasSubstr("--memory"), HasSubstr("got 1.00 GB"),
                                       HasSubstr("its activations in a file")));
  EXPECT_THAT(refused({.method = "magnitude"}, {}), Not(HasSubstr("activations")));
  CalibrationSource self = many;
  self.self = model::Compute{};
  EXPECT_THAT(refused({}, self), HasSubstr("with --calibration FILE"));
  PruneOptions trained;
  trained.reconstruct.block = true;
  EXPECT_THAT(refused(trained, many),
              AllOf(HasSubstr("without --reconstruct"), Not(HasSubstr("in a file"))));

  const std::string message = refused({}, many);
  const size_t begin = message.find("up to ") + 6, unit = message.find(' ', begin);
  const auto named = parse_bytes(message.substr(begin, unit - begin + 3));
  ASSERT_TRUE(named) << message;
  CalibrationSource source = many;
  source.make = []() -> Result<Calibration> { return check_failed("calibrated"); };
  const auto taken = prune_model(*checkpoint, source, out_, {.memory = *named});
  if (taken.error().message.find("lies in memory") != std::string::npos)
    GTEST_SKIP() << taken.error().message;
  EXPECT_THAT(taken.error().message, HasSubstr("calibrated"));
}

/// Its first Linears read the states themselves, which the block's outputs take the place of.
TEST_F(Pipeline, StatisticsOfABlockWithoutAFirstNormAreThoseOfItsInputs) {
  const fs::path model =
      lacuna::testing::source_folder() / "tests/golden/tiny_models/opt_post_norm";
  const auto checkpoint = io::Checkpoint::open(model);
  const auto spec = model::spec_of(*checkpoint);
  const Calibration calibration = random_calibration(3, 16, spec->vocab);
  const PruneOptions options{.method = "wanda", .save_statistics = out_.string() + ".statistics"};
  const auto report = prune(model, out_, options, calibration);
  ASSERT_TRUE(report.ok()) << report.error().message;
  const auto ends = model::Ends::load(*checkpoint, *spec, options.compute);
  const at::Tensor x = ends->embed(calibration.ids_of(0, 3, at::kCPU)).flatten(0, 1);
  const InputsByTarget inputs = *StatisticsFolder::open(options.save_statistics)->read(0);
  EXPECT_TRUE(at::allclose(inputs.at("self_attn.q_proj")->gram, x.t().mm(x), 1e-4, 1e-5));
}

TEST_F(Pipeline, LeavesNothingWhenNoBlockWasFinished) {
  const std::string journal = out_.string() + ".journal";
  EXPECT_FALSE(prune(model_with(model_, "model.layers.0.mlp.up_proj.weight", 0x7fc0), out_,
                     {.method = "magnitude"}, {})
                   .ok());
  EXPECT_FALSE(fs::exists(journal));
  std::atomic<bool> interrupted = true;
  const auto stopped =
      prune(model_, out_, {.method = "wanda"}, calibration_, {.interrupted = &interrupted});
  ASSERT_FALSE(stopped.ok());
  EXPECT_EQ(stopped.error().code, Code::kInterrupted);
  EXPECT_THAT(stopped.error().message, HasSubstr("nothing is kept"));
  EXPECT_TRUE(fs::is_empty(out_.parent_path()));
  EXPECT_FALSE(prune(model_with(model_, "model.layers.1.mlp.up_proj.weight", 0x7fc0), out_,
                     {.method = "magnitude"}, {})
                   .ok());
  EXPECT_TRUE(fs::exists(journal + "/block-000.safetensors")) << "that one is worth keeping";
}

TEST_F(Pipeline, IsAloneInItsFolder) {
  const auto lock = io::OutLock::take(out_);
  const auto second = prune(model_, out_, {.method = "magnitude"}, {});
  ASSERT_FALSE(second.ok());
  EXPECT_THAT(second.error().message, HasSubstr("another run writes here"));
}

TEST_F(Pipeline, OnResumeAStagingFolderThatIsNotOursStays) {
  PruneOptions options{.method = "magnitude"};
  std::atomic<bool> interrupted = false;
  EXPECT_FALSE(
      prune(model_, out_, options, {},
            {.step = [&](int64_t done, int64_t, const std::string&) { interrupted = done > 1; },
             .interrupted = &interrupted})
          .ok());
  const fs::path theirs = out_.string() + ".partial";
  fs::create_directories(theirs);
  ASSERT_TRUE(io::write_text(theirs / "diary.txt", "mine").ok());
  options.resume = true;
  const auto refused = prune(model_, out_, options, {});
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(content_of(theirs / "diary.txt"), "mine");
  EXPECT_TRUE(fs::exists(out_.string() + ".journal/block-000.safetensors"));
  fs::remove(theirs / "diary.txt");
  ASSERT_TRUE(io::write_text(theirs / "config.json.partial", "{").ok());  // a killed run's
  EXPECT_TRUE(prune(model_, out_, options, {}).ok());
}

TEST_F(Pipeline, RecordsTheSparsityThatWholeBlocksReach) {
  PruneOptions options{.method = "magnitude"};
  options.request.pattern = format::Pattern::block(48, 48);
  options.target = {"layers.0"};
  const auto report = prune(model_, out_, options, {});
  ASSERT_TRUE(report.ok()) << report.error().message;
  for (const LayerReport& layer : report->layers) {
    const Tensor tensor = *io::Checkpoint::open(out_)->dense(layer.name);
    EXPECT_EQ(layer.sparsity, sparsity_of(tensor));
    EXPECT_NEAR(layer.sparsity, 0.5, 0.5 * 48 * 48 / static_cast<double>(tensor.elements()));
  }
  const auto about = io::Checkpoint::open(out_)->config().at("lacuna");
  EXPECT_EQ(about.at("sparsity"), 0.5);
  EXPECT_EQ(about.at("sparsity_reached"), report->sparsity);

  options.request.pattern = format::Pattern::block(640, 256);  // one block: all or nothing
  const auto coarse = prune(model_, out_, options, {});
  ASSERT_TRUE(coarse.ok()) << coarse.error().message;
  ASSERT_FALSE(coarse->warnings.empty());
  EXPECT_THAT(coarse->warnings[0], HasSubstr("whole blocks reach sparsity"));
}

TEST_F(Pipeline, LeavesAFolderThatIsNotOursAlone) {
  fs::create_directories(out_);
  ASSERT_TRUE(io::write_text(out_ / "thesis.txt", "mine").ok());
  const auto report = prune(model_, out_, {}, calibration_);
  ASSERT_FALSE(report.ok());
  EXPECT_EQ(report.error().code, Code::kBadInput);
  EXPECT_EQ(content_of(out_ / "thesis.txt"), "mine");
  EXPECT_FALSE(fs::exists(out_.string() + ".journal"));
}

// ---- runs in a process of their own -------------------------------------------------------------

/// The most memory that this process ever had.
int64_t peak_bytes() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.rfind("VmHWM:", 0) == 0) return std::atoll(line.c_str() + 6) * 1024;
  return -1;
}

/// Not a test of its own: what the processes below run.
TEST(PruneProcess, DISABLED_Run) {
  const auto task = nlohmann::json::parse(std::getenv("LACUNA_TEST_TASK"));
  model::set_threads(2);
  const int64_t before = peak_bytes();  // of libtorch alone
  PruneOptions options{.method = task.at("method"),
                       .exclude = task.value("exclude", std::vector<std::string>()),
                       .statistics = task.value("statistics", ""),
                       .save_statistics = task.value("save_statistics", ""),
                       .resume = true,
                       .memory = task.value("memory", uint64_t{0}),
                       .working_bytes = task.value("working_bytes", PruneOptions().working_bytes)};
  options.request.quantization = *format::Quantization::parse(task.value("codes", "none"));
  const fs::path model = task.at("model").get<std::string>(),
                 out = task.at("out").get<std::string>();
  const auto checkpoint = io::Checkpoint::open(model);
  const int64_t samples = options.statistics.empty() ? task.at("samples").get<int64_t>() : 0,
                length = task.at("length");
  CalibrationSource source{samples, length, std::nullopt, [&]() -> Result<Calibration> {
                             return random_calibration(samples, length);
                           }};
  if (task.value("self", false)) {
    source.self = model::Compute{};
    source.make = [&]() -> Result<Calibration> {
      LACUNA_TRY(const auto decoder, model::Decoder::load(*checkpoint, model::Compute{}));
      return calibration_from_model(decoder, samples, length, 1);
    };
  }
  const auto report = prune_model(*checkpoint, source, out, options);
  ASSERT_TRUE(report.ok()) << report.error().message;
  const nlohmann::json answer = {{"planned", report->planned_peak_bytes},
                                 {"working", options.working_bytes},
                                 {"peak", peak_bytes()},
                                 {"taken", peak_bytes() - before}};
  ASSERT_TRUE(io::write_text(task.at("answer").get<std::string>(), answer.dump()).ok());
}

/// Starts this program anew with only the test above. (A forked copy would share torch's threads.)
pid_t start_process(const nlohmann::json& task) {
  const std::string text = task.dump();
  const pid_t pid = fork();
  if (pid != 0) return pid;
  const int nothing = open("/dev/null", O_WRONLY);
  dup2(nothing, STDOUT_FILENO);
  setenv("LACUNA_TEST_TASK", text.c_str(), 1);
  // From this size on glibc gives what is freed back to the system.
  if (task.value("frees_at_once", false)) setenv("MALLOC_MMAP_THRESHOLD_", "1048576", 1);
  execl("/proc/self/exe", "prune_test", "--gtest_filter=PruneProcess.DISABLED_Run",
        "--gtest_also_run_disabled_tests", nullptr);
  _exit(127);
}

bool succeeded(pid_t pid) {
  int status = 0;
  waitpid(pid, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

/// Waits until `moment` holds, kills the process and says whether it was still running.
bool kill_at(pid_t pid, const std::function<bool()>& moment) {
  int status = 0;
  while (!moment()) {
    if (waitpid(pid, &status, WNOHANG) == pid) return false;
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  kill(pid, SIGKILL);
  waitpid(pid, &status, 0);
  return WIFSIGNALED(status);
}

struct Job {
  std::string method, codes = "none";
};
void PrintTo(const Job& job, std::ostream* out) { *out << job.method << " " << job.codes; }

class Killed : public Pipeline, public ::testing::WithParamInterface<Job> {};
INSTANTIATE_TEST_SUITE_P(Solvers, Killed,
                         ::testing::Values(Job{"sparsegpt"}, Job{"alps"}, Job{"hessian"},
                                           Job{"sparsegpt", "int4"}));

TEST_P(Killed, AtAnyMomentAndResumedEndsInTheSameBytes) {
  using Clock = std::chrono::steady_clock;
  nlohmann::json task = {{"model", model_.string()},
                         {"out", out_.string()},
                         {"answer", out_.string() + ".answer"},
                         {"method", GetParam().method},
                         {"codes", GetParam().codes},
                         {"samples", 6},
                         {"length", 96}};
  // Wide matrices cost these most of their time, and there are many runs.
  if (GetParam().method != "sparsegpt") task["exclude"] = nlohmann::json::array({"mlp"});
  const auto start = Clock::now();
  ASSERT_TRUE(succeeded(start_process(task)));
  const auto whole_time = Clock::now() - start;
  const auto whole = weights_of(out_);

  const std::string journal = out_.string() + ".journal", partial = out_.string() + ".partial";
  std::vector<std::pair<std::string, std::function<bool()>>> moments;
  for (const char* file : {"", "/journal.json", "/block-000.safetensors", "/block-002.safetensors"})
    moments.emplace_back("journal" + std::string(file), [=] { return fs::exists(journal + file); });
  const auto last_block = [this, journal] {
    const auto spec = nlohmann::json::parse(content_of(fs::path(model_) / "config.json"));
    return fmt::format("{}/block-{:03}.safetensors", journal,
                       spec.at("num_hidden_layers").get<int>() - 1);
  }();
  moments.emplace_back("while OUT is staged",
                       [=] { return fs::exists(last_block) && fs::exists(partial); });
  moments.emplace_back("when OUT is there", [this] { return fs::exists(out_); });
  for (int i = 0; i < 8; ++i) {
    const double share = random_uniform(11, 0, static_cast<uint64_t>(i));
    moments.emplace_back(fmt::format("after {:.2f} of the time", share),
                         [=, begin = std::make_shared<std::optional<Clock::time_point>>()] {
                           if (!*begin) *begin = Clock::now();
                           return Clock::now() - **begin > whole_time * share;
                         });
  }
  int killed = 0;
  for (const auto& [name, moment] : moments) {
    fs::remove_all(out_);
    fs::remove_all(journal);
    killed += kill_at(start_process(task), moment);
    ASSERT_TRUE(succeeded(start_process(task))) << name;
    EXPECT_EQ(weights_of(out_), whole) << name;
    EXPECT_FALSE(fs::exists(journal)) << name;
    EXPECT_FALSE(fs::exists(partial)) << name;
  }
  EXPECT_GE(killed, 10) << "most kills must hit a living process";
}

TEST(PruneMemory, StaysBelowThePlan) {
  if (std::getenv("LACUNA_SANITIZED")) GTEST_SKIP() << "a sanitizer keeps what is freed";
  LACUNA_NEEDS_DATA(model, "models/lab-16m");
  const fs::path out = lacuna::testing::scratch_folder("memory") / "out";
  const fs::path answer = out.string() + ".answer";
  nlohmann::json task = {{"model", model.string()},
                         {"out", out.string()},
                         {"answer", answer.string()},
                         {"method", "sparsegpt"}};
  const auto measure = [&] {
    EXPECT_TRUE(succeeded(start_process(task)));
    const auto measured = nlohmann::json::parse(content_of(answer));
    return std::pair(measured.at("taken").get<int64_t>(), measured.at("planned").get<int64_t>());
  };
  // As everybody runs it. glibc keeps freed tensors for later ones, some 140 MB here, which no plan
  // names: the working bytes have to hold them.
  task["samples"] = 8;
  task["length"] = 2048;
  const auto [usual, usually_planned] = measure();
  EXPECT_LT(usual, usually_planned);

  // Working bytes are kept small here, so that what the plan names must be there: with the usual
  // gigabyte nothing that these models do could exceed it. What is freed counts no longer.
  constexpr int64_t kWorking = int64_t{48} << 20;
  task["working_bytes"] = kWorking;
  task["frees_at_once"] = true;
  for (const bool self : {false, true}) {
    task["self"] = self;
    task["length"] = self ? 256 : 2048;
    const auto [taken, planned] = measure();
    RecordProperty(self ? "planned_bytes_self" : "planned_bytes", planned);
    RecordProperty(self ? "taken_bytes_self" : "taken_bytes", taken);
    EXPECT_LT(taken, planned) << self;
    EXPECT_GT(taken, (planned - kWorking) / 2) << self << ": the plan is no mere upper bound";
  }

  // A limit moves the activations into a file: what is left is held to the lower plan, and nothing
  // of the result changes.
  task["self"] = false;
  task["length"] = 2048;
  const auto [usually, unlimited] = measure();
  const auto in_memory = weights_of(out);
  const int64_t states = int64_t{8} * 2048 * 384 * 4;
  task["memory"] = unlimited - states / 2;
  const auto [taken, planned] = measure();
  task.erase("memory");
  RecordProperty("planned_bytes_in_file", planned);
  RecordProperty("taken_bytes_in_file", taken);
  EXPECT_LT(planned, unlimited - states / 2);
  EXPECT_LT(taken, planned);
  EXPECT_LT(taken, usually - states / 2);
  EXPECT_EQ(weights_of(out), in_memory);

  const std::string folder = out.string() + ".statistics";
  task["length"] = 256;
  for (const char* flag : {"save_statistics", "statistics"}) {
    task.erase("save_statistics");
    task[flag] = folder;
    const auto [most, plan] = measure();
    RecordProperty(fmt::format("planned_bytes_{}", flag), plan);
    RecordProperty(fmt::format("taken_bytes_{}", flag), most);
    EXPECT_LT(most, plan) << flag;
  }
}

}  // namespace
}  // namespace lacuna::prune
