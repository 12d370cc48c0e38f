#include "lacuna/api/quantization.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "lacuna/api/sparsity.h"
#include "lacuna/io/checkpoint.h"
#include "support/data.h"

namespace lacuna {
namespace {
using ::testing::HasSubstr;

const std::string kUp = "model.layers.0.mlp.up_proj.weight";

std::string demo_model() { return (testing::source_folder() / "examples/demo-model").string(); }

TEST(QuantizationManager, MakesCodesOfADenseModelAndOfASparseOneWithItsMask) {
  const auto sparse = testing::scratch_folder("quantizer") / "sparse";
  ASSERT_TRUE(SparsityManager({.pattern = "n:m"}).prune(demo_model(), sparse.string()).ok());
  for (const char* calibration : {"none", "awq", "gptq"})
    for (const std::string& model : {demo_model(), sparse.string()}) {
      const QuantizationManager manager({.weight_dtype = "int4",
                                         .activation_dtype = "w8a16",
                                         .calibration = calibration,
                                         .calibration_samples = 4,
                                         .calibration_length = 32});
      const auto out = testing::scratch_folder("quantizer") / "model";
      const auto coded = manager.calibrate(model, "", out.string());
      ASSERT_TRUE(coded.ok()) << coded.error().message;
      const auto before = io::Checkpoint::open(model), after = io::Checkpoint::open(*coded);
      ASSERT_TRUE(after.ok()) << after.error().message;
      EXPECT_EQ(after->weights().at(kUp).quantization.text(), "int4g64");
      EXPECT_EQ(after->weights().at(kUp).pattern, before->weights().at(kUp).pattern);
      EXPECT_EQ(after->weights().at("model.embed_tokens.weight").quantization.text(), "int8");
      if (model == sparse) {
        const auto mask = std::get<format::CompactMatrix>(*before->weight(kUp)).bitmap;
        const auto kept = std::get<format::CompactMatrix>(*after->weight(kUp)).bitmap;
        EXPECT_TRUE(std::ranges::equal(mask.span(), kept.span())) << calibration;
      }
      EXPECT_TRUE(manager.load(*coded).ok());
    }
}

TEST(QuantizationManager, RefusesByNameWhatItDoesNotKnow) {
  const struct {
    QuantConfig config;
    const char* named;
  } cases[] = {
      {{.weight_dtype = "int3"}, "QuantConfig.weight_dtype: "},
      {{.weight_dtype = "none"}, "QuantConfig.weight_dtype: none"},
      {{.activation_dtype = "int2"}, "QuantConfig.activation_dtype: unknown type (got int2"},
      {{.weight_dtype = "fp8", .activation_dtype = "int8"}, "doesn't go with fp8 weights"},
      {{.calibration = "magic"}, "QuantConfig.calibration: unknown way (got magic"},
  };
  for (const auto& [config, named] : cases) {
    const auto coded = QuantizationManager(config).calibrate(demo_model(), "", "/nonexistent/out");
    ASSERT_FALSE(coded.ok()) << named;
    EXPECT_EQ(coded.error().code, Code::kUsage);
    EXPECT_THAT(coded.error().message, HasSubstr(named));
  }
}

}  // namespace
}  // namespace lacuna
