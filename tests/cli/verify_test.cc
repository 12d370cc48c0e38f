// `verify`, and --verify of the other verbs: whatever is wrong inside a model is found and named.
#include <fmt/format.h>

#include <fstream>

#include "cli/run_tool.h"
#include "lacuna/core/half.h"
#include "lacuna/io/checkpoint.h"

namespace lacuna::testing {
namespace {
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

const std::string kUp = "model.layers.2.mlp.up_proj.weight";  // 640 x 256
constexpr int64_t kColumns = 256;
constexpr const char* kEmbedding = "model.embed_tokens.weight";  // two chunks of 1 MiB

/// All violations of a model in one text; the run must have ended with exit code 1.
std::string violations(const fs::path& model, const std::string& flags = "") {
  const Output run = lacuna_tool(fmt::format("verify {} {} --json -q", model.string(), flags));
  EXPECT_EQ(run.code, 1) << run.out << run.err;
  const json report = run.report();
  EXPECT_EQ(report["ok"], false);
  return report["violations"].dump(1);
}

/// The bits of an element of a 2-byte matrix that is stored dense.
uint16_t element(const OpenFile& weights, const std::string& tensor, int64_t row, int64_t column) {
  const size_t at = weights.place(tensor).first + static_cast<size_t>(row * kColumns + column) * 2;
  return read_unaligned<uint16_t>(weights.data.data() + at);
}

void set_element(OpenFile& weights, const std::string& tensor, int64_t row, int64_t column,
                 uint16_t bits) {
  const size_t at = weights.place(tensor).first + static_cast<size_t>(row * kColumns + column) * 2;
  std::memcpy(weights.data.data() + at, &bits, 2);
}

TEST(Verify, SoundModelsPass) {
  const Output run =
      done(fmt::format("verify {} --expect-pattern 2:4 --expect-sparsity 0.5 --against {} --json",
                       pruned("2:4").folder.string(), demo_model()));
  EXPECT_EQ(run.report()["ok"], true);
  EXPECT_EQ(run.report()["checksums"], true);
  EXPECT_EQ(run.report()["tensors"], 56);
  done(fmt::format("verify {} --expect-pattern unstructured --expect-sparsity 0.5",
                   pruned("unstructured").folder.string()));
  done(
      fmt::format("verify {} --expect-pattern block:16x16", pruned("block:16x16").folder.string()));
  done(fmt::format("verify {} --expect-pattern 2:4 --against {}",
                   converted("2:4", "dense").string(), demo_model()));
}

TEST(Verify, ExpectationsThatFailAreExitCodeOne) {
  const fs::path& model = pruned("2:4").folder;
  EXPECT_THAT(violations(model, "--expect-sparsity 0.7"), HasSubstr("sparsity is 0.5000"));
  EXPECT_THAT(violations(model, "--expect-pattern 1:4"), HasSubstr("row 0, column 0: group of 4"));
  EXPECT_THAT(violations(model, "--expect-pattern block:16x16"),
              HasSubstr("follows 2:4 (need block:16x16)"));
  EXPECT_THAT(violations(demo_model(), "--expect-pattern 2:4"), HasSubstr("no layer is sparse"));
  EXPECT_THAT(violations(pruned("unstructured").folder, "--expect-pattern 2:4"),
              AllOf(HasSubstr("row "), HasSubstr("column "), HasSubstr("for 2:4")));
}

TEST(Verify, FindsOneFlippedBitAndNamesTensorAndChunk) {
  const struct {
    const char* pattern;
    std::string tensor;
  } cases[] = {
      {"2:4", kUp + ".values"},
      {"2:4", kUp + ".bitmap"},
      {"2:4", "model.norm.weight"},
      {"2:4", kEmbedding},
      {"unstructured", kUp + ".values"},
      {"unstructured", kUp + ".bitmap"},
      {"unstructured", kUp + ".offsets"},
      {"block:16x16", kUp + ".values"},
      {"block:16x16", kUp + ".block_columns"},
      {"block:16x16", kUp + ".block_offsets"},
  };
  std::vector<std::string> lines, named;
  for (const auto& [pattern, tensor] : cases) {
    const fs::path model = copy_of(pruned(pattern).folder);
    OpenFile weights = open_weights(model);
    const auto [begin, size] = weights.place(tensor);
    const size_t byte = size * 3 / 4;
    weights.flip_bit(begin + byte, 3);
    weights.save();
    lines.push_back(fmt::format("verify {} --json -q", model.string()));
    constexpr size_t kChunk = 1 << 20;
    named.push_back(fmt::format("tensor \"{}\", chunk {} of {} (bytes {} to {}) differs", tensor,
                                byte / kChunk + 1, (size + kChunk - 1) / kChunk,
                                byte / kChunk * kChunk,
                                std::min(size, (byte / kChunk + 1) * kChunk)));
  }
  const auto runs = lacuna_tools(lines);
  for (size_t i = 0; i < runs.size(); ++i) {
    EXPECT_EQ(runs[i].code, 1) << named[i] << "\n" << runs[i].err;
    const json report = runs[i].report();
    std::string all;
    for (const json& line : report["violations"]) all += line.get<std::string>() + "\n";
    EXPECT_THAT(all, HasSubstr(named[i]));
    EXPECT_THAT(runs[i].err, HasSubstr(named[i])) << "the person who doesn't read JSON";
  }
}

TEST(Verify, FindsATruncatedOrMissingShard) {
  const auto whole = io::Checkpoint::open(pruned("2:4").folder).value();
  const fs::path model = scratch_folder("shards") / "model";
  auto writer = io::CheckpointWriter::create(model, {.shard_bytes = 1 << 20}).value();
  for (const auto& [name, info] : whole.weights()) {
    const io::Weight weight = whole.weight(name).value();
    ASSERT_TRUE(
        std::visit([&, &n = name](const auto& held) { return writer.add(n, held); }, weight).ok());
  }
  ASSERT_TRUE(writer.finish(whole.config()).ok());
  done("verify " + model.string());
  fs::path shard;
  for (const auto& entry : fs::directory_iterator(model))
    if (entry.path().filename().string().starts_with("model-00003-of-")) shard = entry.path();
  ASSERT_FALSE(shard.empty());
  const std::string content = bytes_of(shard);

  fs::resize_file(shard, content.size() - 1);
  EXPECT_THAT(violations(model), AllOf(HasSubstr(shard.filename().string()), HasSubstr("tensor"),
                                       HasSubstr("truncated")));
  fs::resize_file(shard, 100);
  EXPECT_THAT(violations(model),
              AllOf(HasSubstr(shard.filename().string()), HasSubstr("truncated")));
  fs::remove(shard);
  EXPECT_THAT(violations(model),
              AllOf(HasSubstr(shard.filename().string()), HasSubstr("No such file")));
}

TEST(Verify, FindsATruncatedFile) {
  const fs::path model = copy_of(pruned("2:4").folder);
  fs::resize_file(model / "model.safetensors", fs::file_size(model / "model.safetensors") - 1000);
  EXPECT_THAT(violations(model), AllOf(HasSubstr("model.safetensors"), HasSubstr("truncated")));
}

TEST(Verify, FindsAGroupWithThreeNonZerosInADenseFileThatDeclaresTwoOfFour) {
  const fs::path model = copy_of(converted("2:4", "dense"));
  OpenFile weights = open_weights(model);
  int64_t column = 8;
  while (column < 12 && element(weights, kUp, 5, column) != 0) ++column;
  ASSERT_LT(column, 12) << "a group of 2:4 holds a zero";
  set_element(weights, kUp, 5, column, float_to_bf16(0.5f));
  weights.save_with_checksums();
  const std::string found = violations(model);
  EXPECT_THAT(found, HasSubstr(kUp + ": row 5, column 8: group of 4 holds 3 non-zeros"));
  EXPECT_THAT(found, Not(HasSubstr("chunk"))) << "the checksums are right; the pattern is not";
  fs::remove(model / "checksums.json");
  EXPECT_THAT(violations(model), HasSubstr("row 5, column 8"));
}

TEST(Verify, FindsAGroupWithThreeNonZerosInACompactFile) {
  const fs::path model = copy_of(pruned("2:4").folder);
  OpenFile weights = open_weights(model);
  const size_t byte = weights.place(kUp + ".bitmap").first + 7 * kColumns / 8 + 1;
  int bit = 0;
  while (weights.data[byte] >> bit & 1) ++bit;
  ASSERT_LT(bit, 4);
  weights.flip_bit(byte, bit);
  weights.save_with_checksums();
  const std::string found = violations(model);
  EXPECT_THAT(found, AllOf(HasSubstr(kUp), HasSubstr("row 7, column 8: group of 4 keeps 3")));
  EXPECT_THAT(found, Not(HasSubstr("chunk")));
  const Output run = lacuna_tool("generate " + model.string() + " --prompt hi");
  EXPECT_EQ(run.code, 3) << "structure is checked whenever a weight is read";
  EXPECT_THAT(run.err, AllOf(HasSubstr(kUp), HasSubstr("row 7, column 8")));
}

TEST(Verify, FindsNumbersThatAreNotFiniteAndWeightsThatAreNotWhatTheConfigSays) {
  const fs::path model = copy_of(converted("2:4", "dense"));
  OpenFile weights = open_weights(model);
  set_element(weights, kUp, 9, 17, 0x7f80);  // infinity
  weights.save_with_checksums();
  EXPECT_THAT(violations(model), HasSubstr(kUp + ": row 9, column 17: not a finite number"));

  const fs::path other = copy_of(demo_model());
  OpenFile retyped = open_weights(other);
  retyped.header[kUp] = {{"dtype", "I32"},
                         {"shape", {640, 128}},
                         {"data_offsets", retyped.header[kUp]["data_offsets"]}};
  retyped.header["model.layers.1.mlp.gate_proj.weight"]["shape"] = {256, 640};
  retyped.save();
  EXPECT_THAT(violations(other), AllOf(HasSubstr(kUp), HasSubstr("wrong type (got int32"),
                                       HasSubstr("wrong shape (got [256, 640]; need [640, 256])")));
}

TEST(Verify, AgainstTheDenseModelFindsAChangedKeptValue) {
  const std::string against = "--against " + demo_model();
  const fs::path dense = copy_of(converted("2:4", "dense"));
  OpenFile weights = open_weights(dense);
  int64_t column = 100;
  while (element(weights, kUp, 5, column) == 0) ++column;
  set_element(weights, kUp, 5, column, element(weights, kUp, 5, column) ^ 1);
  weights.save_with_checksums();
  EXPECT_THAT(violations(dense, against),
              HasSubstr(fmt::format("{}: row 5, column {}: kept value differs", kUp, column)));

  const fs::path compact = copy_of(pruned("2:4").folder);
  OpenFile parts = open_weights(compact);
  parts.flip_bit(parts.place(kUp + ".values").first + 1, 7);  // the sign of the first value
  parts.save_with_checksums();
  done("verify " + compact.string());
  EXPECT_THAT(violations(compact, against),
              AllOf(HasSubstr(kUp + ": row 0, column "), HasSubstr("kept value differs")));
  EXPECT_EQ(lacuna_tool(fmt::format("verify {} --against /nowhere", compact.string())).code, 3);
}

TEST(Verify, AgainstTheDenseModelExcusesZerosOnlyWhereWeightsWereDropped) {
  const std::string against = "--against " + demo_model();
  const auto with_zero = [&](const fs::path& model, const std::string& tensor) {
    const fs::path copy = copy_of(model);
    OpenFile weights = open_weights(copy);
    const auto [begin, size] = weights.place(tensor);
    weights.data[begin] = weights.data[begin + 1] = 0;
    if (fs::exists(copy / "checksums.json"))
      weights.save_with_checksums();
    else
      weights.save();
    return copy;
  };
  for (const char* tensor : {"model.norm.weight", "model.embed_tokens.weight"})
    for (const fs::path& model : {converted("2:4", "dense"), fs::path(demo_model())})
      EXPECT_THAT(violations(with_zero(model, tensor), against),
                  AllOf(HasSubstr(tensor), HasSubstr("row 0, column 0"), HasSubstr("differs")));
  // Of a weight that nobody pruned a lost value is a damage too.
  EXPECT_THAT(violations(with_zero(demo_model(), kUp), against),
              AllOf(HasSubstr(kUp), HasSubstr("row 0, column 0"), HasSubstr("differs")));
  done("verify " + converted("2:4", "dense").string() + " " + against);
}

TEST(Verify, FindsATensorThatIsLost) {
  const fs::path lost = copy_of(demo_model());
  OpenFile weights = open_weights(lost);
  const std::string kNorm = "model.layers.2.input_layernorm.weight";
  // Its bytes become those of a tensor that nobody knows: a file leaves no gap.
  weights.header["stray"] = weights.header[kNorm];
  weights.header.erase(kNorm);
  weights.save();
  EXPECT_THAT(violations(lost), AllOf(HasSubstr(kNorm), HasSubstr("missing")));
  EXPECT_THAT(violations(lost, "--against " + demo_model()),
              AllOf(HasSubstr(kNorm), HasSubstr("missing"), HasSubstr("stray")));
}

TEST(Verify, TellsAFolderThatIsNoModelAndShowsTheFirstOfManyFaults) {
  const Output none = lacuna_tool("verify " + scratch_folder("verify_none").string());
  EXPECT_EQ(none.code, 3);
  EXPECT_THAT(none.err, HasSubstr("no config.json"));
  // Another model: every kept value differs.
  const std::string line = "verify " + pruned("unstructured").folder.string() + " --against " +
                           demo_model() + " --expect-pattern 2:4";
  const Output shown = lacuna_tool(line), all = lacuna_tool(line + " -v");
  EXPECT_EQ(shown.code, 1);
  EXPECT_THAT(shown.out, HasSubstr("more; -v lists all"));
  EXPECT_THAT(all.out, Not(HasSubstr("more; -v lists all")));
  EXPECT_LT(std::count(shown.out.begin(), shown.out.end(), '\n'), 15);
  EXPECT_GT(std::count(all.out.begin(), all.out.end(), '\n'), 42);
}

TEST(VerifyFlag, OtherVerbsCompareChecksumsOnlyWhenAsked) {
  const fs::path sound = pruned("2:4").folder, broken = copy_of(sound);
  OpenFile weights = open_weights(broken);
  const auto [begin, size] = weights.place(kUp + ".values");
  weights.flip_bit(begin + size / 2, 0);  // a number is a little different: nothing else shows it
  weights.save();
  const fs::path folder = scratch_folder("verify_flag");
  std::ofstream(folder / "text.txt") << some_text(200);
  const std::string verbs[] = {
      "inspect {}",
      "generate {} --prompt hi --max-new-tokens 2 --threads 1",
      fmt::format("eval {{}} --text {} --length 32 --windows 1 --threads 1",
                  (folder / "text.txt").string()),
      fmt::format("convert {{}} -o {} --overwrite --store dense", (folder / "converted").string()),
      fmt::format("prune {{}} -o {} --overwrite --method magnitude --sparsity 0.7 --threads 1",
                  (folder / "pruned").string()),
  };
  std::vector<std::string> refused, fine;
  for (const std::string& verb : verbs) {
    refused.push_back(fmt::format(fmt::runtime(verb), broken.string()) + " --verify -q");
    fine.push_back(fmt::format(fmt::runtime(verb), broken.string()) + " -q");
    fine.push_back(fmt::format(fmt::runtime(verb), sound.string()) + " --verify -q");
  }
  for (const Output& run : lacuna_tools(refused)) {
    EXPECT_EQ(run.code, 3) << run.err;
    EXPECT_THAT(run.err, HasSubstr("tensor \"" + kUp + ".values\", chunk 1 of 1"));
    EXPECT_EQ(run.out, "");
  }
  EXPECT_FALSE(fs::exists(folder / "converted"));
  EXPECT_FALSE(fs::exists(folder / "pruned"));
  for (size_t i = 0; i < fine.size(); ++i) done(fine[i]);  // one after the other: they share OUT
  const Output none = lacuna_tool("inspect " + demo_model() + " --verify");
  EXPECT_EQ(none.code, 3) << "nothing to compare with is not a pass";
  EXPECT_THAT(none.err, HasSubstr("checksums.json"));
}

}  // namespace
}  // namespace lacuna::testing
