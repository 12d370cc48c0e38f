// The tool from outside: exit codes, messages, JSON, on the model that comes with the repository.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <array>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>

#include "lacuna/io/file.h"
#include "lacuna/io/safetensors.h"
#include "support/data.h"

namespace lacuna {
namespace {
namespace fs = std::filesystem;
using nlohmann::json;
using ::testing::HasSubstr;

struct Output {
  int code = -1;
  std::string out, err;
};

/// Runs the tool with a shell's words; stdin is empty unless `input` is given.
Output lacuna_tool(const std::string& arguments, const std::string& input = "") {
  const fs::path folder = testing::scratch_folder("cli_run");
  std::ofstream(folder / "in") << input;
  const std::string command =
      fmt::format("{}/lacuna {} <{} >{} 2>{}", LACUNA_BINARY_DIR, arguments,
                  (folder / "in").string(), (folder / "out").string(), (folder / "err").string());
  const int status = std::system(command.c_str());
  Output output;
  output.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  output.out = io::read_text(folder / "out").value();
  output.err = io::read_text(folder / "err").value();
  return output;
}

std::string demo_model() { return (testing::source_folder() / "examples/demo-model").string(); }

/// A copy of the demo model that a test may damage.
fs::path demo_copy() {
  const fs::path folder = testing::scratch_folder("demo") / "model";
  fs::copy(demo_model(), folder);
  return folder;
}

/// Magnitude 2:4 of the demo model, made once: no calibration, a second or two.
const fs::path& pruned_model() {
  static const fs::path folder = [] {
    const fs::path out = testing::scratch_folder("pruned") / "model";
    const Output run = lacuna_tool(fmt::format("prune {} -o {} --method magnitude --pattern 2:4 -q",
                                               demo_model(), out.string()));
    EXPECT_EQ(run.code, 0) << run.err;
    return out;
  }();
  return folder;
}

fs::path pruned_copy() {
  const fs::path folder = testing::scratch_folder("pruned_copy") / "model";
  fs::copy(pruned_model(), folder);
  return folder;
}

/// Where a tensor's bytes begin in model.safetensors, and how many there are.
std::pair<uint64_t, uint64_t> place(const fs::path& model, const std::string& tensor) {
  const auto file = io::SafetensorsFile::open(model / "model.safetensors").value();
  uint64_t header = 0;
  std::ifstream(model / "model.safetensors", std::ios::binary)
      .read(reinterpret_cast<char*>(&header), 8);
  for (const auto& entry : file.entries())
    if (entry.name == tensor) return {8 + header + entry.begin, entry.end - entry.begin};
  ADD_FAILURE() << "no tensor " << tensor;
  return {0, 0};
}

void flip_bit(const fs::path& file, uint64_t position, int bit = 0) {
  std::fstream stream(file, std::ios::in | std::ios::out | std::ios::binary);
  stream.seekg(static_cast<std::streamoff>(position));
  char byte = static_cast<char>(stream.get());
  byte = static_cast<char>(byte ^ (1 << bit));
  stream.seekp(static_cast<std::streamoff>(position));
  stream.put(byte);
}

TEST(Usage, WrongFlagValuesAreUsageErrorsBeforeAnythingIsRead) {
  for (const char* arguments :
       {"", "nonsense", "prune", "prune /nowhere -o /tmp/x --sparsity 1.5",
        "prune /nowhere -o /tmp/x --pattern 5:4", "prune /nowhere -o /tmp/x --pattern 4:4",
        "prune /nowhere -o /tmp/x --pattern block:0x4", "prune /nowhere -o /tmp/x --method magic",
        "prune /nowhere -o /tmp/x --pattern 2:4 --sparsity 0.7",
        "prune /nowhere -o /tmp/x --store zip", "eval /nowhere --text x --protocol mine",
        "verify /nowhere --expect-pattern 9:1", "synth --like gpt-9 -o /tmp/x",
        "eval /nowhere --text x --device tpu"}) {
    const Output run = lacuna_tool(arguments);
    EXPECT_EQ(run.code, 2) << arguments << "\n" << run.err;
    EXPECT_EQ(run.out, "") << arguments;
  }
}

TEST(Usage, EveryVerbHasHelpWithTwoExamples) {
  for (const char* verb : {"inspect", "prune", "verify", "eval", "generate", "convert", "tokenize",
                           "synth", "report", "doctor"}) {
    const Output run = lacuna_tool(std::string(verb) + " --help");
    EXPECT_EQ(run.code, 0) << verb;
    size_t examples = 0;
    for (size_t at = run.out.find("Examples:");
         (at = run.out.find("lacuna " + std::string(verb), at)) != std::string::npos; ++at)
      ++examples;
    EXPECT_EQ(examples, std::string(verb) == "doctor" ? 2u : 2u) << verb << "\n" << run.out;
  }
}

TEST(Inspect, ReportsTheDemoModel) {
  const Output run = lacuna_tool("inspect " + demo_model() + " --json");
  ASSERT_EQ(run.code, 0) << run.err;
  const json report = json::parse(run.out);
  EXPECT_EQ(report["architecture"], "LlamaForCausalLM");
  EXPECT_EQ(report["parameters"], 5180672);
  EXPECT_EQ(report["bytes"], 5180672 * 2);
  EXPECT_LT(report["sparsity"], 0.01);
}

TEST(Prune, WritesASmallerModelThatVerifies) {
  const Output inspected = lacuna_tool("inspect " + pruned_model().string() + " --json");
  ASSERT_EQ(inspected.code, 0) << inspected.err;
  uint64_t dense = 0, compact = 0;
  const json report = json::parse(inspected.out);
  for (const json& layer : report["layers"]) {
    if (layer["format"] != "compact") continue;
    EXPECT_EQ(layer["pattern"], "2:4");
    EXPECT_EQ(layer["sparsity"], 0.5);
    dense += 2 * layer["shape"][0].get<uint64_t>() * layer["shape"][1].get<uint64_t>();
    compact += layer["bytes"].get<uint64_t>();
  }
  EXPECT_GT(dense, 0u);
  EXPECT_LE(static_cast<double>(compact), 0.57 * static_cast<double>(dense));
  const Output verified = lacuna_tool(
      fmt::format("verify {} --expect-pattern 2:4 --expect-sparsity 0.5 --against {} --json",
                  pruned_model().string(), demo_model()));
  EXPECT_EQ(verified.code, 0) << verified.out << verified.err;
  EXPECT_EQ(json::parse(verified.out)["ok"], true);
}

TEST(Verify, ExpectationsThatFailAreExitCodeOne) {
  EXPECT_EQ(
      lacuna_tool(fmt::format("verify {} --expect-sparsity 0.7", pruned_model().string())).code, 1);
  EXPECT_EQ(
      lacuna_tool(fmt::format("verify {} --expect-pattern 1:4", pruned_model().string())).code, 1);
  EXPECT_EQ(lacuna_tool(fmt::format("verify {} --expect-pattern 2:4", demo_model())).code, 1);
}

TEST(Verify, FindsOneFlippedBitAndNamesTensorAndChunk) {
  const std::string weight = "model.layers.2.mlp.up_proj.weight";
  for (const std::string& part :
       {weight + ".values", weight + ".bitmap", std::string("model.norm.weight")}) {
    const fs::path model = pruned_copy();
    const auto [begin, size] = place(model, part);
    flip_bit(model / "model.safetensors", begin + size / 2, 3);
    const Output run = lacuna_tool("verify " + model.string() + " --json");
    EXPECT_EQ(run.code, 1) << part << run.err;
    const std::string violations = json::parse(run.out)["violations"].dump();
    EXPECT_THAT(violations, HasSubstr(part));
    EXPECT_THAT(violations, HasSubstr("chunk"));
  }
}

TEST(Verify, FindsATruncatedFile) {
  const fs::path model = pruned_copy();
  fs::resize_file(model / "model.safetensors", fs::file_size(model / "model.safetensors") - 1000);
  const Output run = lacuna_tool("verify " + model.string());
  EXPECT_EQ(run.code, 1);
  EXPECT_THAT(run.out + run.err, HasSubstr("model.safetensors"));
}

TEST(Convert, CompactDenseCompactGivesTheSameBytes) {
  const fs::path folder = testing::scratch_folder("convert");
  ASSERT_EQ(lacuna_tool(fmt::format("convert {} -o {}/dense --store dense", pruned_model().string(),
                                    folder.string()))
                .code,
            0);
  ASSERT_EQ(lacuna_tool(fmt::format("convert {0}/dense -o {0}/compact", folder.string())).code, 0);
  EXPECT_EQ(io::read_text(folder / "compact/model.safetensors").value(),
            io::read_text(pruned_model() / "model.safetensors").value());
  EXPECT_EQ(io::read_text(folder / "compact/checksums.json").value(),
            io::read_text(pruned_model() / "checksums.json").value());
}

TEST(Convert, CompressedTensorsAndBackKeepsEveryValue) {
  const fs::path folder = testing::scratch_folder("convert");
  ASSERT_EQ(lacuna_tool(fmt::format("convert {} -o {}/ct --store compressed-tensors",
                                    pruned_model().string(), folder.string()))
                .code,
            0);
  const Output run = lacuna_tool(fmt::format(
      "verify {}/ct --expect-pattern 2:4 --against {} --json", folder.string(), demo_model()));
  EXPECT_EQ(run.code, 0) << run.out << run.err;
}

TEST(Generate, ReproducesTheReferenceTokens) {
  const json reference = json::parse(
      io::read_text(testing::source_folder() / "tests/golden/demo-5m-reference.json").value());
  const Output run = lacuna_tool(fmt::format(
      "generate {} --prompt '{}' --max-new-tokens 64 --dtype float32 --device cpu --json",
      demo_model(), reference["prompt"].get<std::string>()));
  ASSERT_EQ(run.code, 0) << run.err;
  const json report = json::parse(run.out);
  EXPECT_EQ(report["prompt_ids"], reference["prompt_ids"]);
  EXPECT_EQ(report["token_ids"], reference["greedy_64_ids"]);
}

TEST(Generate, ReadsThePromptFromStdin) {
  const Output run = lacuna_tool(
      "generate " + demo_model() + " --prompt - --max-new-tokens 3 --json", "The history\n");
  ASSERT_EQ(run.code, 0) << run.err;
  EXPECT_EQ(json::parse(run.out)["token_ids"].size(), 3u);
}

TEST(Generate, ChatWithoutATemplateIsRefused) {
  const Output run = lacuna_tool("generate " + demo_model() + " --prompt hi --chat");
  EXPECT_EQ(run.code, 3);
  EXPECT_THAT(run.err, HasSubstr("chat_template"));
}

TEST(BadInput, EachFaultHasItsOwnMessageAndExitCodeThree) {
  const fs::path folder = testing::scratch_folder("bad");
  const auto copy_with_config = [&](const std::string& key, const json& value) {
    const fs::path model = demo_copy();
    json config = json::parse(io::read_text(model / "config.json").value());
    config[key] = value;
    EXPECT_TRUE(io::write_text(model / "config.json", config.dump()).ok());
    return model.string();
  };
  std::ofstream(folder / "empty.txt");
  std::ofstream(folder / "short.txt") << "A few words only.";
  fs::create_directories(folder / "theirs");
  std::ofstream(folder / "theirs/thesis.tex") << "x";
  const fs::path truncated = demo_copy();
  fs::resize_file(truncated / "model.safetensors", 5000000);
  const std::string out = " -o " + (folder / "out").string();
  const struct {
    std::string arguments, message;
  } cases[] = {
      {"inspect /nowhere", "/nowhere"},
      {"inspect " + truncated.string(), "model.safetensors"},
      {"inspect " + copy_with_config("architectures", {"MambaForCausalLM"}), "MambaForCausalLM"},
      {"inspect " + copy_with_config("hidden_act", "swishish"), "swishish"},
      {"prune " + demo_model() + out + " --calibration " + (folder / "empty.txt").string(),
       "empty.txt"},
      {"prune " + demo_model() + out + " --length 64 --calibration " +
           (folder / "short.txt").string(),
       "short.txt"},
      {"prune " + demo_model() + out + " --calibration /no/such/text", "/no/such/text"},
      {"prune " + demo_model() + " --method magnitude -o " + (folder / "theirs").string(),
       "theirs"},
      {"eval " + demo_model() + " --text " + (folder / "short.txt").string(), "window"},
      {"convert /nowhere.gguf" + out, "/nowhere.gguf"},
      {"tokenize " + folder.string() + " --text " + (folder / "short.txt").string(), "tokenizer"},
      {"report " + (folder / "short.txt").string() + " -o " + (folder / "r.html").string(),
       "short.txt"},
  };
  for (const auto& bad : cases) {
    const Output run = lacuna_tool(bad.arguments);
    EXPECT_EQ(run.code, 3) << bad.arguments << "\n" << run.err;
    EXPECT_THAT(run.err, HasSubstr(bad.message)) << bad.arguments;
    EXPECT_EQ(run.out, "") << bad.arguments;
  }
  EXPECT_FALSE(fs::exists(folder / "out"));
  EXPECT_TRUE(fs::exists(folder / "theirs/thesis.tex"));
}

TEST(BadInput, CudaWithoutAGpuIsExitCodeFour) {
  const json doctor = json::parse(lacuna_tool("doctor --json").out);
  if (!doctor["gpus"].empty()) GTEST_SKIP() << "this machine has a GPU";
  const Output run = lacuna_tool("generate " + demo_model() + " --prompt hi --device cuda");
  EXPECT_EQ(run.code, 4) << run.err;
}

TEST(Tokenize, PrintsIds) {
  const fs::path folder = testing::scratch_folder("tokenize");
  std::ofstream(folder / "t.txt") << "The history of the city began when";
  const json reference = json::parse(
      io::read_text(testing::source_folder() / "tests/golden/demo-5m-reference.json").value());
  const Output run = lacuna_tool(
      fmt::format("tokenize {} --text {} --json", demo_model(), (folder / "t.txt").string()));
  ASSERT_EQ(run.code, 0) << run.err;
  EXPECT_EQ(json::parse(run.out)["ids"], reference["prompt_ids"]);
}

}  // namespace
}  // namespace lacuna
