#include "lacuna/model/synth.h"

#include <gmock/gmock.h>

#include "model/models.h"
#include "support/data.h"

namespace lacuna::model {
namespace {
using ::testing::HasSubstr;
using testing::must;

bool equal(const Bytes& a, const Bytes& b) {
  return std::equal(a.span().begin(), a.span().end(), b.span().begin(), b.span().end());
}

TEST(Synth, theModelInMemoryIsTheOneThatWouldBeWritten) {
  const SynthOptions shape{.like = "opt-125m", .seed = 3};
  for (const char* variant : {"dense", "unstructured@0.5", "2:4/int8", "block:32x32@0.75/int4"}) {
    const auto options = must(shape.as_variant(variant));
    const auto folder = testing::scratch_folder("synth") / "model";
    must(synth(options, folder));
    const auto written = must(io::Checkpoint::open(folder));
    const auto memory = must(synth_in_memory(options));
    EXPECT_EQ(memory.config(), written.config()) << variant;
    EXPECT_EQ(memory.total_bytes(), written.total_bytes());
    ASSERT_EQ(memory.weights().size(), written.weights().size());
    for (const auto& [name, info] : written.weights()) {
      const io::WeightInfo& same = memory.weights().at(name);
      EXPECT_EQ(same.pattern, info.pattern) << name;
      EXPECT_EQ(same.quantization, info.quantization) << name;
      for (const std::string& part : info.parts)
        EXPECT_TRUE(equal(must(memory.part(part)).bytes, must(written.part(part)).bytes)) << part;
    }
  }
}

TEST(Synth, quantisesBlocksAsAskedAndTheEndsToInt8) {
  const auto options = must(SynthOptions{.like = "opt-125m"}.as_variant("2:4/int4"));
  const auto model = must(synth_in_memory(options));
  const auto& weights = model.weights();
  EXPECT_EQ(weights.at("model.decoder.layers.3.fc1.weight").quantization.text(), "int4g64");
  EXPECT_EQ(weights.at("model.decoder.layers.3.fc1.weight").pattern.text(), "2:4");
  EXPECT_EQ(weights.at("model.decoder.embed_tokens.weight").quantization.text(), "int8");
  EXPECT_EQ(weights.at("model.decoder.embed_tokens.weight").pattern.text(), "dense");
  EXPECT_TRUE(weights.at("model.decoder.embed_positions.weight").quantization.none());
}

TEST(SynthVariant, isReadAndWrittenBack) {
  for (const char* text : {"dense", "dense/int8", "unstructured@0.7", "unstructured@0.125/int4g64",
                           "2:4", "1:4/fp8", "block:32x32@0.9"})
    EXPECT_EQ(must(SynthOptions().as_variant(text)).variant(), text);
  EXPECT_DOUBLE_EQ(must(SynthOptions().as_variant("1:4")).sparsity, 0.75);
  for (const char* text :
       {"", "unstructured", "unstructured@", "unstructured@x", "unstructured@1.5",
        "unstructured@nan", "2:4@0.5", "dense@0", "dense/", "dense/int9", "4:2", "block:32x32"}) {
    const auto wrong = SynthOptions().as_variant(text);
    ASSERT_FALSE(wrong.ok()) << text;
    EXPECT_EQ(wrong.error().code, Code::kUsage) << text;
    EXPECT_THAT(wrong.error().message, HasSubstr("need")) << text;
  }
}

}  // namespace
}  // namespace lacuna::model
