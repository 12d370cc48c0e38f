// `convert --quantize` from outside: a pruned or dense model becomes codes, is proved, and runs.
#include <fmt/format.h>

#include <fstream>
#include <map>

#include "cli/run_tool.h"
#include "lacuna/io/checkpoint.h"

namespace lacuna::testing {
namespace {
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

const std::string kUp = "model.layers.2.mlp.up_proj.weight";  // 640 x 256
constexpr const char* kEmbedding = "model.embed_tokens.weight";

/// `pruned(pattern)`, or the demo model itself for "dense", as codes; made once each.
const fs::path& quantized(const std::string& pattern, const std::string& flags) {
  static std::map<std::string, fs::path> models;
  fs::path& folder = models[pattern + " " + flags];
  if (folder.empty()) {
    folder = scratch_folder("quantized") / "model";
    const std::string model = pattern == "dense" ? demo_model() : pruned(pattern).folder.string();
    done(fmt::format("convert {} -o {} --quantize {} -q", model, folder.string(), flags));
  }
  return folder;
}

double perplexity(const fs::path& model, const std::string& flags = "") {
  static const fs::path text = [] {
    fs::path file = scratch_folder("text") / "text.txt";
    std::ofstream(file) << some_text(300);
    return file;
  }();
  return done(fmt::format("eval {} --text {} --length 64 --windows 4 {} -q --json", model.string(),
                          text.string(), flags))
      .report()["perplexity"];
}

std::string violations(const fs::path& model, const std::string& flags = "") {
  const Output run = lacuna_tool(fmt::format("verify {} {} --json -q", model.string(), flags));
  EXPECT_EQ(run.code, 1) << run.out << run.err;
  return run.report()["violations"].dump(1);
}

TEST(Quantize, PrunedModelsAreProvedAndAnswerAlmostAsBefore) {
  const struct {
    const char *pattern, *flags, *code;
    double within;          // of the perplexity before
    double within_default;  // the same where x is rounded to int8 too
  } cases[] = {
      {"unstructured", "int8", "int8", 0.02, 0.02},
      {"unstructured", "int4", "int4g64", 0.15, 0.15},
      {"2:4", "int4 --group 32 --zero-points", "int4g32z", 0.15, 0.15},
      {"2:4", "fp8", "fp8", 0.05, 0.05},
      // Blocks alone make four times the perplexity of it: near nothing that it is sure of.
      {"block:16x16", "int8 --group 128", "int8g128", 0.02, 0.03},
      {"dense", "int4", "int4g64", 0.15, 0.15}};
  for (const auto& [pattern, flags, code, within, within_default] : cases) {
    const bool sparse = std::string(pattern) != "dense";
    const fs::path& model = quantized(pattern, flags);
    const fs::path before = sparse ? pruned(pattern).folder : fs::path(demo_model());
    const std::string expected =
        sparse ? fmt::format("--expect-pattern {} --expect-sparsity 0.5", pattern) : "";
    const json verified = done(fmt::format("verify {} {} --against {} --json -q", model.string(),
                                           expected, before.string()))
                              .report();
    EXPECT_EQ(verified["ok"], true);
    for (const json& layer : verified["layers"]) EXPECT_EQ(layer["quantization"], code);
    const double was = perplexity(before), is = perplexity(model);
    EXPECT_NEAR(is / was, 1.0, within_default) << pattern << " " << flags;
    const double weights_alone = perplexity(model, "--activations bf16");
    EXPECT_NEAR(weights_alone / was, 1.0, within) << pattern << " " << flags;
    std::printf(
        "[ MEASURED ] demo model, %s, %s: perplexity %.4f, x not rounded %.4f, before %.4f\n",
        pattern, code, is, weights_alone, was);
  }
}

TEST(Quantize, SaysWhatBecameWhatAndThatMasksAreUnchanged) {
  const fs::path out = scratch_folder("quantized") / "model";
  const std::string line =
      fmt::format("convert {} -o {} --quantize int4", pruned("2:4").folder.string(), out.string());
  EXPECT_THAT(done(line + " -q").out,
              AllOf(HasSubstr("42 weights, 2:4 bfloat16 to int4g64: "),
                    HasSubstr("model.embed_tokens.weight, dense bfloat16 to int8: "),
                    HasSubstr("masks unchanged in what was written"), HasSubstr("stays kept")));
  const json report = done(line + " -q --json --overwrite").report();
  EXPECT_EQ(report["quantization"], "int4g64");
  EXPECT_EQ(report["masks_equal"], true);
  EXPECT_LT(report["bytes_out"].get<double>(), 0.5 * report["bytes_in"].get<double>());
  ASSERT_EQ(report["quantized"].size(), 43u);
  for (const json& weight : report["quantized"]) {
    EXPECT_EQ(weight["from"], "bfloat16");
    const bool head = weight["name"] == kEmbedding;
    EXPECT_EQ(weight["to"], head ? "int8" : "int4g64");
    EXPECT_EQ(weight["pattern"], head ? "dense" : "2:4");
    EXPECT_LT(weight["bytes_out"], weight["bytes_in"]);
  }
}

TEST(Quantize, InspectShowsTheCodesAndTheirBytes) {
  const fs::path& model = quantized("2:4", "int4");
  EXPECT_THAT(done("inspect " + model.string()).out,
              AllOf(HasSubstr("int4g64"), HasSubstr("int8")));
  const json report = done(fmt::format("inspect {} --json", model.string())).report();
  size_t seen = 0;
  for (const json& layer : report["layers"]) {
    if (layer["name"] != kUp) continue;
    ++seen;
    EXPECT_EQ(layer["quantization"], "int4g64");
    EXPECT_EQ(layer["dtype"], "bfloat16");
    EXPECT_EQ(layer["format"], "compact");
    EXPECT_EQ(layer["pattern"], "2:4");
    EXPECT_GE(layer["sparsity"].get<double>(), 0.5);
    // A bit each, half a byte for half of them, a scale for each 64 columns.
    EXPECT_EQ(layer["bytes"], 640 * 256 / 8 + 640 * 256 / 4 + 640 * 4 * 2);
  }
  EXPECT_EQ(seen, 1u);
}

TEST(Quantize, KeepHeadLeavesTheEmbeddingAsItIs) {
  const fs::path& model = quantized("2:4", "int8 --keep-head");
  const json report = done(fmt::format("inspect {} --json", model.string())).report();
  EXPECT_GT(report["layers"].size(), 7u);
  for (const json& layer : report["layers"])
    EXPECT_EQ(layer["quantization"], layer["name"] == kEmbedding ? "none" : "int8");
  done(fmt::format("generate {} --prompt hi --max-new-tokens 4 -q", model.string()));
}

TEST(Quantize, ConvertsBackToDenseAndCopiesCodesUnchanged) {
  const fs::path& model = quantized("unstructured", "int4");
  const fs::path folder = scratch_folder("back");
  const std::string dense = (folder / "dense").string(), copy = (folder / "copy").string();
  done(fmt::format("convert {} -o {} --store dense -q", model.string(), dense));
  done(fmt::format("verify {} -q", dense));
  const json report = done(fmt::format("inspect {} --json", dense)).report();
  for (const json& layer : report["layers"]) {
    EXPECT_EQ(layer["quantization"], "none");
    EXPECT_EQ(layer["format"], "dense");
  }
  EXPECT_NEAR(perplexity(dense) / perplexity(model), 1.0, 0.01) << "bf16 instead of float32";
  done(fmt::format("convert {} -o {} -q", model.string(), copy));
  EXPECT_EQ(bytes_of(fs::path(copy) / "model.safetensors"), bytes_of(model / "model.safetensors"));
  EXPECT_EQ(json_of(fs::path(copy) / "config.json"), json_of(model / "config.json"));
  const Output legacy = lacuna_tool(fmt::format("convert {} -o {} --store compressed-tensors -q",
                                                model.string(), (folder / "legacy").string()));
  EXPECT_EQ(legacy.code, 3);
  EXPECT_THAT(legacy.err, AllOf(HasSubstr("no place for codes"), HasSubstr("--store dense")));
  EXPECT_FALSE(fs::exists(folder / "legacy"));
}

TEST(Quantize, RefusesWhatCannotBeAndSaysWhatToDo) {
  const fs::path folder = scratch_folder("refused");
  const std::string out = (folder / "out").string(), sparse = pruned("2:4").folder.string();
  const Output twice = lacuna_tool(
      fmt::format("convert {} -o {} --quantize int4 -q", quantized("2:4", "int4").string(), out));
  EXPECT_EQ(twice.code, 3);
  EXPECT_THAT(twice.err, AllOf(HasSubstr("is quantised already"), HasSubstr("--store dense")));
  const char* usage[] = {"{} -o {} --quantize int8 --store dense",
                         "{} -o {} --quantize int8 --store compressed-tensors",
                         "{} -o {} --quantize int2",
                         "{} -o {} --quantize int8 --zero-points",
                         "{} -o {} --quantize int4 --group 48",
                         "{} -o {} --group 64",
                         "{} -o {} --zero-points",
                         "{} -o {} --keep-head",
                         "{}/model.safetensors -o {} --quantize int8"};
  for (const char* line : usage) {
    const Output run =
        lacuna_tool("convert " + fmt::format(fmt::runtime(line), sparse, out) + " -q");
    EXPECT_EQ(run.code, 2) << line << "\n" << run.err;
    EXPECT_NE(run.err, "") << line;
  }
  EXPECT_FALSE(fs::exists(out));
  const fs::path broken = copy_of(demo_model());
  OpenFile weights = open_weights(broken);
  const uint16_t infinity = 0x7f80;
  std::memcpy(weights.data.data() + weights.place(kUp).first + (3 * 256 + 5) * 2, &infinity, 2);
  weights.save();
  const Output refused =
      lacuna_tool(fmt::format("convert {} -o {} --quantize int8 -q", broken.string(), out));
  EXPECT_EQ(refused.code, 3);
  EXPECT_THAT(refused.err, AllOf(HasSubstr(kUp), HasSubstr("row 3, column 5")));
  EXPECT_FALSE(fs::exists(out));
}

TEST(Quantize, VerifyFindsOneFlippedBitInCodesScalesAndMask) {
  for (const std::string& part : {kUp + ".values", kUp + ".scales", kUp + ".bitmap", kUp + ".zeros",
                                  std::string(kEmbedding) + ".values"}) {
    const fs::path model = copy_of(quantized("2:4", "int4 --group 32 --zero-points"));
    OpenFile weights = open_weights(model);
    weights.flip_bit(weights.place(part).first + 41, 1);  // of a scale: in its exponent
    weights.save();
    EXPECT_THAT(violations(model), HasSubstr("tensor \\\"" + part + "\\\", chunk 1 of "));
    if (part.ends_with(".bitmap")) continue;
    // With checksums that say so, the model that was quantised knows better.
    weights.save_with_checksums();
    EXPECT_THAT(
        violations(model, "--against " + pruned("2:4").folder.string()),
        AllOf(HasSubstr(part.substr(0, part.rfind('.')) + ": row "), Not(HasSubstr("chunk"))))
        << part;
  }
}

TEST(Quantize, VerifyAgainstAnotherModelFindsItsMask) {
  EXPECT_THAT(violations(quantized("2:4", "int4"), "--against " + std::string(demo_model())),
              HasSubstr(" was dropped"));
}

TEST(PruneQuantize, MakesCodesThatVerifyRunAndLoseLessThanRoundingAfterwards) {
  const fs::path folder = scratch_folder("joint"), ids = folder / "ids.safetensors";
  const std::string calibration =
      "--calibration self --samples 4 --length 64 --save-calibration-ids " + ids.string();
  const auto prune = [&](const std::string& name, const std::string& flags) {
    const fs::path out = folder / name;
    done(fmt::format("prune {} -o {} --pattern 2:4 {} {} -q", demo_model(), out.string(),
                     fs::exists(ids) ? "--calibration-ids " + ids.string() : calibration, flags));
    return out;
  };
  const fs::path joint = prune("joint", "--method sparsegpt --quantize int4 --group 32");
  const json verified =
      done(fmt::format("verify {} --expect-pattern 2:4 --json -q", joint.string())).report();
  EXPECT_EQ(verified["ok"], true);
  for (const json& layer : verified["layers"]) EXPECT_EQ(layer["quantization"], "int4g32");
  const json about = json_of(joint / "config.json")["lacuna"];
  EXPECT_EQ(about["quantization"], "int4g32");
  EXPECT_EQ(about["coding"], "gptq");
  EXPECT_EQ(about["sparsity_reached"], 0.5);
  EXPECT_EQ(about["weights"][kEmbedding]["quantization"], "int8");

  const fs::path plain = prune("plain", "--method sparsegpt"), rounded = folder / "rounded";
  done(fmt::format("convert {} -o {} --quantize int4 --group 32 -q", plain.string(),
                   rounded.string()));
  const double together = perplexity(joint), after = perplexity(rounded);
  std::printf("[ MEASURED ] demo model, 2:4, int4g32: perplexity together %.4f, after %.4f\n",
              together, after);
  EXPECT_GT(together, 1);

  const fs::path kept = folder / "kept";
  done(
      fmt::format("prune {} -o {} --keep-mask --quantize int4row --keep-head --calibration-ids {} "
                  "-q",
                  plain.string(), kept.string(), ids.string()));
  const auto before = io::Checkpoint::open(plain), coded = io::Checkpoint::open(kept);
  ASSERT_TRUE(coded.ok()) << coded.error().message;
  EXPECT_EQ(coded->weights().at(kUp).quantization.text(), "int4row");
  EXPECT_TRUE(coded->weights().at(kEmbedding).quantization.none());
  EXPECT_TRUE(
      std::ranges::equal(std::get<format::CompactMatrix>(*before->weight(kUp)).bitmap.span(),
                         std::get<format::CompactMatrix>(*coded->weight(kUp)).bitmap.span()));
}

TEST(PruneQuantize, RefusesWhatDoesNotGoTogether) {
  const struct {
    const char *flags, *says;
  } cases[] = {
      {"--group 64", "need --quantize"},
      {"--zero-points", "need --quantize int4"},
      {"--keep-head", "without --quantize"},
      {"--keep-mask", "nothing to do without --quantize"},
      {"--quantize int3", "unknown code"},
      {"--quantize none", "none asks for nothing"},
      {"--quantize int8 --zero-points", "int8 has no zero points"},
      {"--quantize int4g64 --group 32", "unknown code"},
      {"--quantize int4 --group 48", "--group"},
      {"--quantize int4 --store dense", "only the compact store has codes"},
      {"--quantize int4 --coding magic", "--coding"},
  };
  const std::string out = scratch_folder("refused") / "model";
  for (const auto& [flags, says] : cases) {
    const Output run = lacuna_tool(fmt::format("prune {} -o {} {}", demo_model(), out, flags));
    EXPECT_EQ(run.code, 2) << flags;
    EXPECT_THAT(run.err, HasSubstr(says)) << flags;
  }
  EXPECT_FALSE(fs::exists(out));
}

}  // namespace
}  // namespace lacuna::testing
