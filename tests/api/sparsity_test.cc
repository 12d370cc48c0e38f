#include "lacuna/api/sparsity.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <nlohmann/json.hpp>

#include "lacuna/model/torch.h"
#include "support/data.h"

namespace lacuna {
namespace {
using ::testing::AnyOf;
using ::testing::HasSubstr;

std::string demo_model() { return (testing::source_folder() / "examples/demo-model").string(); }

TEST(SparsityManager, PrunesTheNamedLayersAndProvesIt) {
  SparsityConfig config;
  config.pattern = "n:m";
  config.n = 1, config.m = 4;
  config.target_layers = {"self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"};
  config.exclude_layers = {"layers.5"};
  SparsityManager manager(config);
  EXPECT_TRUE(manager.report().empty()) << "nothing was measured yet";
  const auto out = testing::scratch_folder("manager") / "sparse";
  const auto pruned = manager.prune(demo_model(), out.string());
  ASSERT_TRUE(pruned.ok()) << pruned.error().message;
  const auto zeros = manager.verify_sparsity(*pruned);
  ASSERT_TRUE(zeros.ok()) << zeros.error().message;
  EXPECT_EQ(zeros->at("model.layers.0.self_attn.q_proj.weight"), 0.75);
  EXPECT_EQ(zeros->at("model.layers.4.mlp.up_proj.weight"), 0.75);
  EXPECT_LT(zeros->at("model.layers.5.mlp.up_proj.weight"), 0.01) << "excluded";
  EXPECT_LT(zeros->at("model.layers.0.mlp.down_proj.weight"), 0.01) << "not a target";
  const auto report = manager.report();
  EXPECT_DOUBLE_EQ(report.at("avg_sparsity"), 0.75);
  EXPECT_GT(report.at("memory_saving"), 0.1);
  EXPECT_FALSE(report.contains("speedup"));
  EXPECT_FALSE(report.contains("perplexity_delta"));
  const auto decoder = manager.load_sparse_model(*pruned);
  ASSERT_TRUE(decoder.ok()) << decoder.error().message;
  EXPECT_TRUE((*decoder)->blocks()[0].linear("self_attn.q_proj").is_compact());
  EXPECT_FALSE((*decoder)->blocks()[0].linear("self_attn.k_proj").is_compact());
}

TEST(SparsityManager, RefusesByNameWhatIsNotThereYet) {
  const struct {
    void (*change)(SparsityConfig&);
    const char* named;
  } cases[] = {
      {[](SparsityConfig& c) { c.pattern = "dynamic"; }, "dynamic"},
      {[](SparsityConfig& c) { c.enable_dynamic = true; }, "enable_dynamic"},
      {[](SparsityConfig& c) { c.use_gradient = true, c.pruning_method = "alps"; },
       "use_gradient: alps has no form"},
      {[](SparsityConfig& c) { c.fuse_with_quant = true; }, "fuse_with_quant: true needs"},
      {[](SparsityConfig& c) { c.quant_dtype = "int3"; }, "quant_dtype"},
      {[](SparsityConfig& c) { c.quant_dtype = "int4", c.format = "csr"; }, "quant_dtype"},
      {[](SparsityConfig& c) { c.dynamic_threshold = 0.2; }, "dynamic_threshold: \"0.2\""},
      {[](SparsityConfig& c) { c.use_hardware_accel = false; }, "use_hardware_accel"},
      {[](SparsityConfig& c) { c.format = "csc"; },
       "SparsityConfig.format: unknown store (got csc"},
      {[](SparsityConfig& c) { c.format = "bsr", c.block_size = 0; }, "block:0x0"},
      {[](SparsityConfig& c) { c.backend = "triton"; }, "triton"},
      {[](SparsityConfig& c) { c.pruning_method = "magic"; }, "magic"},
      {[](SparsityConfig& c) { c.n = 5; }, "5:4"},
      {[](SparsityConfig& c) { c.sparsity_ratio = 1.5; }, "1.5"},
      {[](SparsityConfig& c) { c.pattern = "stripes"; }, "stripes"},
  };
  for (const auto& bad : cases) {
    SparsityConfig config;
    bad.change(config);
    const auto pruned = SparsityManager(config).prune(demo_model(), "/nonexistent/out");
    ASSERT_FALSE(pruned.ok()) << bad.named;
    EXPECT_EQ(pruned.error().code, Code::kUsage) << bad.named;
    EXPECT_THAT(pruned.error().message, HasSubstr(bad.named));
  }
}

TEST(SparsityManager, UsesGradientsWhereItIsAskedTo) {
  const std::pair<const char*, const char*> cases[] = {
      {"magnitude", "gradient"},
      {"gradient", "gradient"},
      {"wanda", "score=regional solve=none"},
      {"hessian", "score=fisher solve=exact"},
  };
  for (const auto& [method, made] : cases) {
    SparsityManager manager({.pattern = "n:m",
                             .pruning_method = method,
                             .calibration_samples = 2,
                             .calibration_length = 24,
                             .use_gradient = true});
    const auto out = testing::scratch_folder("manager") / "sparse";
    const auto pruned = manager.prune(demo_model(), out.string());
    ASSERT_TRUE(pruned.ok()) << method << ": " << pruned.error().message;
    const auto checkpoint = io::Checkpoint::open(*pruned);
    ASSERT_TRUE(checkpoint.ok());
    EXPECT_EQ(checkpoint->config().at("lacuna").at("method"), made);
    EXPECT_EQ(manager.report().at("avg_sparsity"), 0.5);
  }
}

TEST(SparsityManager, QuantisesWhatItPruned) {
  for (const char* codes : {"int8", "int4g32z", "fp8"}) {
    SparsityManager manager({.pattern = "n:m", .quant_dtype = codes});
    const auto out = testing::scratch_folder("manager") / "sparse";
    const auto pruned = manager.prune(demo_model(), out.string());
    ASSERT_TRUE(pruned.ok()) << pruned.error().message;
    EXPECT_EQ(*pruned, out.string());
    EXPECT_FALSE(std::filesystem::exists(out.string() + "-unquantized"));
    const auto checkpoint = io::Checkpoint::open(*pruned);
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.error().message;
    const io::WeightInfo& info = checkpoint->weights().at("model.layers.0.mlp.up_proj.weight");
    EXPECT_EQ(info.pattern, format::Pattern::keep_of(2, 4));
    EXPECT_EQ(info.quantization.text(), codes);
    EXPECT_GT(manager.report().at("memory_saving"), 0.4) << codes;
    const auto zeros = manager.verify_sparsity(*pruned);
    ASSERT_TRUE(zeros.ok()) << zeros.error().message;
    EXPECT_GE(zeros->at(info.name), 0.5);  // a kept weight may be rounded to zero
    const auto decoder = manager.load_sparse_model(*pruned);
    ASSERT_TRUE(decoder.ok()) << decoder.error().message;
    EXPECT_FALSE(manager.prune(demo_model(), *pruned).ok()) << "a finished model lies there";
  }
}

/// The configurations that the interface was asked for with, for a small model and few tokens.
TEST(SparsityManager, RunsTheConfigurationsItWasAskedFor) {
  const auto folder = testing::scratch_folder("manager");
  std::filesystem::create_directories(folder / "sets/wikitext-2");
  for (const char* name : {"wikitext-2/wiki.train.tokens", "c4.txt"})
    std::filesystem::copy(testing::source_folder() / "README.md", folder / "sets" / name);
  ::setenv("LACUNA_DATASETS", (folder / "sets").c_str(), 1);
  const std::shared_ptr<void> afterwards(nullptr, [](void*) { ::unsetenv("LACUNA_DATASETS"); });
  const std::string layer = "model.layers.3.mlp.up_proj.weight";

  SparsityConfig structured{
      .pattern = "n:m",
      .n = 2,
      .m = 4,
      .pruning_method = "magnitude",
      .target_layers = {"self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"},
      .backend = "cuda",
      .use_hardware_accel = true,
  };
  const bool gpu = model::open_device("cuda").ok();
  if (!gpu) {
    const auto refused = SparsityManager(structured).prune(demo_model(), (folder / "a").string());
    ASSERT_FALSE(refused.ok());
    EXPECT_EQ(refused.error().code, Code::kNotPossible);
    EXPECT_THAT(refused.error().message, HasSubstr("cpu"));
    structured.backend = "auto";
  }
  SparsityManager manager(structured);
  const auto sparse = manager.prune(demo_model(), (folder / "a").string());
  ASSERT_TRUE(sparse.ok()) << sparse.error().message;
  ASSERT_TRUE(manager.load_sparse_model(*sparse).ok());
  EXPECT_EQ(manager.report().at("avg_sparsity"), 0.5);

  SparsityManager sparsegpt({.pattern = "unstructured",
                             .sparsity_ratio = 0.5,
                             .pruning_method = "sparsegpt",
                             .exclude_layers = {"embed_tokens", "lm_head"},
                             .calibration_dataset = "wikitext-2",
                             .calibration_samples = 4,
                             .calibration_length = 64,
                             .format = "csr"});
  const auto exchanged = sparsegpt.prune(demo_model(), (folder / "b").string());
  ASSERT_TRUE(exchanged.ok()) << exchanged.error().message;
  const auto zeros = sparsegpt.verify_sparsity(*exchanged);
  ASSERT_TRUE(zeros.ok()) << zeros.error().message;
  EXPECT_NEAR(zeros->at(layer), 0.5, 1e-5);
  EXPECT_EQ(io::Checkpoint::open(*exchanged)->weights().at(layer).form.text(), "csr");

  SparsityManager joint({.pattern = "n:m",
                         .n = 2,
                         .m = 4,
                         .pruning_method = "wanda",
                         .calibration_dataset = "c4",
                         .calibration_samples = 4,
                         .calibration_length = 64,
                         .fuse_with_quant = true,
                         .quant_dtype = "int4"});
  const auto codes = joint.prune(demo_model(), (folder / "c").string());
  ASSERT_TRUE(codes.ok()) << codes.error().message;
  const io::Checkpoint checkpoint = *io::Checkpoint::open(*codes);
  EXPECT_EQ(checkpoint.weights().at(layer).quantization.text(), "int4g64");
  EXPECT_EQ(checkpoint.weights().at(layer).pattern, format::Pattern::keep_of(2, 4));
  EXPECT_EQ(joint.report().at("avg_sparsity"), 0.5);
  EXPECT_TRUE(joint.load_sparse_model(*codes).ok());
  EXPECT_GE(joint.verify_sparsity(*codes).value().at(layer), 0.5);
}

TEST(SparsityManager, WritesTheFormatsThatOtherProgramsRead) {
  for (const char* format : {"csr", "coo", "bsr"}) {
    SparsityManager manager({.pattern = "n:m",
                             .target_layers = {"layers.0.mlp.up_proj"},
                             .block_size = 8,
                             .format = format});
    const auto pruned =
        manager.prune(demo_model(), (testing::scratch_folder("manager") / "sparse").string());
    ASSERT_TRUE(pruned.ok()) << pruned.error().message;
    const auto checkpoint = io::Checkpoint::open(*pruned);
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.error().message;
    const io::WeightInfo& info = checkpoint->weights().at("model.layers.0.mlp.up_proj.weight");
    EXPECT_EQ(info.form.text(), std::string(format) == "bsr" ? "bsr:8x8" : format);
    EXPECT_EQ(info.pattern, format::Pattern::keep_of(2, 4));
    const auto zeros = manager.verify_sparsity(*pruned);
    ASSERT_TRUE(zeros.ok()) << zeros.error().message;
    EXPECT_EQ(zeros->at(info.name), 0.5);
    const auto decoder = manager.load_sparse_model(*pruned);
    ASSERT_TRUE(decoder.ok()) << decoder.error().message;
    EXPECT_TRUE((*decoder)->blocks()[0].linear("mlp.up_proj").is_compact());
  }
}

TEST(SparsityManager, NamesTheOutputAfterTheModelWhateverItsSlashes) {
  const auto folder = testing::scratch_folder("manager");
  std::filesystem::copy(demo_model(), folder / "model");
  SparsityManager manager({.pattern = "n:m", .target_layers = {"layers.0.mlp.up_proj"}});
  const auto pruned = manager.prune((folder / "model/").string());
  ASSERT_TRUE(pruned.ok()) << pruned.error().message;
  EXPECT_EQ(*pruned, (folder / "model-2-4").string());
  EXPECT_TRUE(std::filesystem::exists(folder / "model-2-4/model.safetensors"));
}

TEST(SparsityManager, UnknownDatasetNameSaysWhereItLooked) {
  SparsityConfig config;
  config.pruning_method = "wanda";
  config.calibration_dataset = "wikitext-9";
  const auto pruned = SparsityManager(config).prune(demo_model(), "/nonexistent/out");
  ASSERT_FALSE(pruned.ok());
  EXPECT_EQ(pruned.error().code, Code::kBadInput);
  EXPECT_THAT(pruned.error().message, HasSubstr("wikitext-9"));
}

TEST(SparsityManager, NamesTheKernelThatWouldRun) {
  const auto kernel = SparsityManager({.pattern = "n:m"}).select_kernel();
  ASSERT_TRUE(kernel.ok()) << kernel.error().message;
  EXPECT_THAT(*kernel, AnyOf(HasSubstr("linear_stream"), HasSubstr("linear_nm")));
  const auto bitmap = SparsityManager({.pattern = "unstructured"}).select_kernel();
  ASSERT_TRUE(bitmap.ok()) << bitmap.error().message;
  EXPECT_THAT(*bitmap, AnyOf(HasSubstr("linear_stream"), HasSubstr("linear_bitmap")));
  const auto sparse =
      SparsityManager({.pattern = "unstructured", .sparsity_ratio = 0.95}).select_kernel();
  ASSERT_TRUE(sparse.ok()) << sparse.error().message;
  EXPECT_THAT(*sparse, HasSubstr("linear_csr"));
}

}  // namespace
}  // namespace lacuna
