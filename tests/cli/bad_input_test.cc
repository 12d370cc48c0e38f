// Wrong flags are told before anything is read (2); wrong files by name (3).
#include <fmt/format.h>
#include <sys/mount.h>

#include <fstream>

#include "cli/run_tool.h"

namespace lacuna::testing {
namespace {
using ::testing::AllOf;
using ::testing::HasSubstr;

const std::string kUp = "model.layers.1.mlp.up_proj.weight";  // 640 x 256

TEST(Usage, WrongFlagValuesAreUsageErrorsBeforeAnythingIsRead) {
  const std::string prune = "prune /nowhere -o /tmp/lacuna_never_written ";
  const std::string generate = "generate /nowhere --prompt x ";
  const struct {
    std::string line, named;
  } cases[] = {
      {"", "VERB --help"},
      {"nonsense", "nonsense"},
      {"prune", "MODEL"},
      {"prune /nowhere", "--out"},
      {prune + "--sparsity 1.5", "1.5"},
      {prune + "--sparsity -0.1", "-0.1"},
      {prune + "--sparsity nan", "nan"},
      {prune + "--sparsity half", "half"},
      {prune + "--pattern 5:4", "5:4"},
      {prune + "--pattern 4:4", "4:4"},
      {prune + "--pattern 0:4", "0:4"},
      {prune + "--pattern dense", "dense"},
      {prune + "--pattern block:0x4", "block:0x4"},
      {prune + "--pattern stripes", "stripes"},
      {prune + "--pattern 2:4 --sparsity 0.7", "disagrees"},
      {prune + "--sparsity 0.5 --pattern 1:4", "disagrees"},
      {prune + "--method magic", "magic"},
      {prune + "--group column", "column"},
      {prune + "--store zip", "zip"},
      {prune + "--samples 0", "--samples"},
      {prune + "--samples 9000000000000", "--samples"},
      {prune + "--length 9000000000000", "--length"},
      {"convert " + demo_model() + " --store dense -o .", "current folder"},
      {"convert " + demo_model() + " --store dense -o ..", "current folder"},
      {"prune " + demo_model() + " --method magnitude -o .", "current folder"},
      {"verify /nowhere --threads 1", "--threads"},
      {"inspect /nowhere --device cpu", "--device"},
      {prune + "--length 1", "--length"},
      {prune + "--pattern 2:4+dense --sparsity 0.6", "0.6"},
      {prune + "--refine none,swaps", "stands alone"},
      {prune + "--keep-mask --quantize int4 --sparsity 0.7", "--keep-mask"},
      {prune + "--statistics s --calibration c", "--calibration"},
      {prune + "--statistics s --calibration-ids c", "--calibration-ids"},
      {prune + "--statistics s --save-calibration-ids c", "--save-calibration-ids"},
      {prune + "--memory 1e-3B", "1e-3B"},
      {prune + "--memory 1e30GB", "1e30GB"},
      {prune + "--memory compact", "12GB"},
      {prune + "--budget bytes=0", "bytes=0"},
      {prune + "--damping nan", "--damping"},
      {prune + "--target '['", "--target"},
      {prune + "--exclude '('", "--exclude"},
      {prune + "--seed -1", "--seed"},
      {prune + "--no-such-flag", "--no-such-flag"},
      {generate + "--temperature -1", "--temperature"},
      {generate + "--top-k -1", "--top-k"},
      {generate + "--top-p 1.5", "--top-p"},
      {generate + "--min-p nan", "--min-p"},
      {generate + "--repetition-penalty 0", "--repetition-penalty"},
      {generate + "--max-new-tokens 0", "--max-new-tokens"},
      {generate + "--dtype int3", "int3"},
      {generate + "--threads -2", "--threads"},
      {"eval /nowhere --text x --protocol mine", "mine"},
      {"eval /nowhere --text x --length 1", "--length"},
      {"eval /nowhere --text x --windows -1", "--windows"},
      {"eval /nowhere --text x --device tpu", "tpu"},
      {"eval /nowhere", "--text"},
      {"verify /nowhere --expect-pattern 9:1", "9:1"},
      {"verify /nowhere --expect-pattern dense", "dense"},
      {"verify /nowhere --expect-sparsity 2", "--expect-sparsity"},
      {"convert /nowhere -o /tmp/lacuna_never_written --store zip", "zip"},
      {"synth --like gpt-9 -o /tmp/lacuna_never_written", "gpt-9"},
      {"synth --like opt-125m -o /tmp/lacuna_never_written --pattern 2:4 --sparsity 0.7",
       "disagrees"},
      {"synth --like opt-125m -o /tmp/lacuna_never_written --store compressed-tensors", "--store"},
      {"synth --like opt-125m -o /tmp/lacuna_never_written --quantize int3", "int3"},
      {"synth --like opt-125m -o /tmp/lacuna_never_written --quantize int8 --store dense",
       "--quantize"},
      {"report -o /tmp/lacuna_never_written", "RUN"},
      {"bench", "PROBLEM"},
      {"bench linear_dense:bf17:8x8x1", "bf17"},
      {"bench linear_dense:bf16:8x8", "an extent"},
      {"bench linear_magic:bf16:8x8x1", "linear_magic"},
      {"bench linear_dense:bf16:8x8x1 --seconds 0", "--seconds"},
      {"bench linear_dense:bf16:8x8x1 --threads -1", "--threads"},
      {"bench model", "MODEL"},
      {"bench model /nowhere --tokens 0", "--tokens"},
      {"bench model /nowhere --prompt 0", "--prompt"},
      {"bench model /nowhere --repetitions 0", "--repetitions"},
      {"bench linear_dense:bf16:8x8x1 model /nowhere", "a model alone"},
      {"bench model /nowhere --like opt-125m", "no folder"},
      {"bench model /nowhere --pattern 2:4", "--like"},
      {"bench model --like gpt-9", "gpt-9"},
      {"bench model --like opt-125m --compare /nowhere", "--compare: /nowhere: unknown pattern"},
      {"bench model --like opt-125m --windows 2", "--text"},
      {"bench model /nowhere --quick", "--quick"},
      {"bench model --like opt-125m --text /nowhere", "--text"},
      {"bench model /nowhere --chart a.svg", "--chart"},
      {"bench linear_dense:bf16:8x8x1 --table a.txt", ".jsonl"},
      {"bench op", "PROBLEM"},
      {"bench model --like opt-125m --pattern 2:4 --sparsity 0.7", "disagrees"},
      {"bench model --like opt-125m --quantize int9", "int9"},
      {"bench model --like opt-125m --compare unstructured", "unstructured@0.5"},
      {"bench model --like opt-125m --compare 2:4@0.5", "no variant"},
      {"bench model --like opt-125m --compare dense/int9", "int9"},
      {"tune", "MODEL"},
      {"tune /nowhere", "/nowhere"},
      {"tune linear_dense:bf16:8x8x1 nonsense", "nonsense"},
      {"tune /nowhere --tokens 17", "--tokens"},
      {"doctor --op nonsense", "nonsense"},
      {"doctor --op linear_magic:bf16:8x8x1", "linear_magic"},
  };
  std::vector<std::string> lines;
  for (const auto& wrong : cases) lines.push_back(wrong.line);
  const auto runs = lacuna_tools(lines);
  for (size_t i = 0; i < runs.size(); ++i) {
    EXPECT_EQ(runs[i].code, 2) << lines[i] << "\n" << runs[i].err;
    EXPECT_EQ(runs[i].out, "") << lines[i];
    EXPECT_THAT(runs[i].err, HasSubstr(cases[i].named)) << lines[i];
  }
  EXPECT_FALSE(fs::exists("/tmp/lacuna_never_written"));
}

/// Copies of the demo model, each with one fault.
fs::path with_config(const std::string& key, const json& value) {
  fs::path model = copy_of(demo_model());
  json config = json_of(model / "config.json");
  config[key] = value;
  std::ofstream(model / "config.json") << config;
  return model;
}

template <class Change>
fs::path with_weights(Change&& change) {
  fs::path model = copy_of(demo_model());
  OpenFile weights = open_weights(model);
  change(weights);
  weights.save();
  return model;
}

fs::path with_tokenizer(const std::string& section, const json& component) {
  fs::path model = copy_of(demo_model());
  json tokenizer = json_of(model / "tokenizer.json");
  tokenizer[section] = component;
  std::ofstream(model / "tokenizer.json") << tokenizer;
  return model;
}

TEST(BadInput, EachFaultHasItsOwnMessageAndExitCodeThree) {
  const fs::path folder = scratch_folder("bad");
  const auto text_file = [&](const char* name, const std::string& text) {
    std::ofstream(folder / name) << text;
    return (folder / name).string();
  };
  const std::string empty = text_file("empty.txt", ""), blank = text_file("blank.txt", " \n \n");
  const std::string few = text_file("short.txt", "A few words only.");
  const std::string text = text_file("text.txt", some_text(400));
  const std::string rows = text_file("rows.jsonl", "{\"text\": \"one\"}\n{\"txt\": \"two\"}\n");
  const std::string odd_run = text_file("odd.json", R"({"verb": "verify", "ok": true})");
  const std::string ids = text_file("ids.json", "[[1, 2, 3], [4, 5, 99999]]");
  const std::string nested = std::string(200'000, '[') + std::string(200'000, ']');
  const std::string deep = text_file("deep.json", nested);
  const std::string deep_rows = text_file("deep.jsonl", "{\"text\": " + nested + "}\n");
  const fs::path deep_config = copy_of(demo_model()), deep_generation = copy_of(demo_model());
  const fs::path deep_tokenizer = copy_of(demo_model());
  for (const fs::path& file : {deep_config / "config.json", deep_tokenizer / "tokenizer.json",
                               deep_generation / "generation_config.json"})
    std::ofstream(file) << "{\"architectures\": " << nested << "}";
  fs::create_directories(folder / "theirs");
  text_file("theirs/thesis.tex", "x");
  text_file("file", "x");

  const fs::path truncated = copy_of(demo_model()), no_weights = copy_of(demo_model());
  const fs::path no_tokenizer = copy_of(demo_model()), huge_header = copy_of(demo_model());
  const fs::path no_json = copy_of(demo_model());
  fs::resize_file(truncated / "model.safetensors", 5000000);
  fs::remove(no_weights / "model.safetensors");
  fs::remove(no_tokenizer / "tokenizer.json");
  const uint64_t header_bytes = uint64_t{1} << 60;
  std::fstream(huge_header / "model.safetensors", std::ios::in | std::ios::out | std::ios::binary)
      .write(reinterpret_cast<const char*>(&header_bytes), 8);
  std::ofstream(no_json / "config.json") << "{\"architectures\": ";
  const fs::path overlapping = with_weights([](OpenFile& weights) {
    json& offsets = weights.header[kUp]["data_offsets"];
    offsets = {offsets[0].get<int64_t>() - 64, offsets[1].get<int64_t>() - 64};
  });
  const fs::path integers = with_weights([](OpenFile& weights) {
    weights.header[kUp]["dtype"] = "I32";
    weights.header[kUp]["shape"] = {640, 128};
  });
  const fs::path unknown_dtype =
      with_weights([](OpenFile& weights) { weights.header[kUp]["dtype"] = "Q4"; });
  const fs::path nan = with_weights([](OpenFile& weights) {
    const size_t at = weights.place(kUp).first + (3 * 256 + 5) * 2;
    weights.data[at] = static_cast<char>(0xc0), weights.data[at + 1] = 0x7f;
  });

  const std::string demo = demo_model();
  int outs = 0;  // runs that share one would be in each other's way
  const auto pruning = [&](const fs::path& model, const std::string& flags) {
    return fmt::format("prune {} -o {}/out{} {}", model.string(), folder.string(), outs++, flags);
  };
  const struct {
    std::string line;
    std::vector<std::string> named;
  } cases[] = {
      // Files that are missing.
      {"inspect /nowhere", {"/nowhere/config.json", "No such file"}},
      {"verify /nowhere", {"/nowhere", "no such model folder"}},
      {"inspect " + no_weights.string(), {"model.safetensors", "No such file"}},
      {"generate " + no_tokenizer.string() + " --prompt hi", {no_tokenizer.string(), "tokenizer"}},
      {"convert /nowhere.gguf -o " + (folder / "out").string(), {"/nowhere.gguf"}},
      {"generate " + demo + "/config.json --prompt hi", {"is a file", "lacuna convert"}},
      {"eval " + demo + " --text /no/such/text", {"/no/such/text"}},
      {pruning(demo, "--calibration /no/such/calibration"), {"/no/such/calibration"}},
      // Weights.
      {"inspect " + truncated.string(), {"model.safetensors", "truncated"}},
      {"inspect " + huge_header.string(), {"model.safetensors", "1152921504606846976"}},
      {"inspect " + overlapping.string(), {kUp, "overlaps", "model.layers.1.mlp.gate_proj"}},
      {"inspect " + unknown_dtype.string(), {kUp, "unknown dtype (got Q4"}},
      {"generate " + integers.string() + " --prompt hi", {kUp, "wrong type (got int32"}},
      {pruning(integers, "--method magnitude"), {kUp, "wrong type (got int32"}},
      {pruning(nan, "--method magnitude"), {kUp, "finite", "row 3, column 5"}},
      {"eval " + nan.string() + " --length 64 --text " + text,
       {kUp, "row 3, column 5: not a finite number"}},
      // Configs and tokenizers.
      {"inspect " + no_json.string(), {"config.json", "not a JSON object"}},
      {"inspect " + with_config("architectures", {"MambaForCausalLM"}).string(),
       {"config.json", "unknown architecture (got \"MambaForCausalLM\""}},
      {"inspect " + with_config("hidden_act", "swishish").string(), {"config.json", "swishish"}},
      {"generate " + with_config("intermediate_size", 768).string() + " --prompt hi",
       {"mlp.gate_proj.weight", "wrong shape (got [640, 256]; need [768, 256])"}},
      {"tokenize " + with_tokenizer("normalizer", {{"type", "Frobnicate"}}).string() + " --text " +
           text,
       {"tokenizer.json", "normalizer", "Frobnicate"}},
      {"tokenize " + with_tokenizer("pre_tokenizer", {{"type", "Hyphens"}}).string() + " --text " +
           text,
       {"tokenizer.json", "pre_tokenizer", "Hyphens"}},
      {"generate " + with_tokenizer("decoder", {{"type", "Upside"}}).string() + " --prompt hi",
       {"tokenizer.json", "decoder", "Upside"}},
      {"tokenize " + folder.string() + " --text " + text, {folder.string(), "tokenizer"}},
      {"generate " + demo + " --prompt hi --chat", {"chat_template"}},
      // JSON that nests without end, wherever JSON is read.
      {"inspect " + deep_config.string(), {"config.json", "too deep"}},
      {"inspect " + deep_generation.string(), {"generation_config.json", "too deep"}},
      {"tokenize " + deep_tokenizer.string() + " --text " + text, {"tokenizer.json", "too deep"}},
      {pruning(demo, "--calibration " + deep_rows), {"deep.jsonl: line 1", "too deep"}},
      {pruning(demo, "--calibration-ids " + deep), {"deep.json", "too deep"}},
      {"report " + deep + " -o " + (folder / "r.html").string(), {"deep.json", "too deep"}},
      // Texts.
      {pruning(demo, "--calibration " + empty), {"empty.txt", "holds no text"}},
      {pruning(demo, "--calibration " + blank), {"blank.txt", "holds no text"}},
      {pruning(demo, "--length 64 --calibration " + few), {"short.txt", "shorter than one window"}},
      {pruning(demo, "--calibration " + rows), {"rows.jsonl", "line 2"}},
      {pruning(demo, "--calibration-ids " + ids), {"ids.json", "row 1, column 2", "99999"}},
      {"eval " + demo + " --text " + few, {"window"}},
      {"generate " + demo + " --prompt ''", {"prompt"}},
      // Folders to write that are not ours.
      {fmt::format("prune {} --method magnitude -o {}/theirs", demo, folder.string()),
       {"theirs", "not written by this tool"}},
      {fmt::format("convert {} --store dense -o {}/theirs", demo, folder.string()),
       {"theirs", "not written by this tool"}},
      {fmt::format("synth --like opt-125m -o {}/theirs", folder.string()),
       {"theirs", "not written by this tool"}},
      {fmt::format("convert {} --store dense -o {}/file", demo, folder.string()),
       {"file", "exists and is not a folder"}},
      // Runs for the report.
      {"report " + few + " -o " + (folder / "r.html").string(), {"short.txt", "not JSON"}},
      {"report " + odd_run + " -o " + (folder / "r.html").string(), {"odd.json", "violations"}},
  };
  std::vector<std::string> lines;
  for (const auto& bad : cases)
    lines.push_back(bad.line + (bad.line.starts_with("prune") || bad.line.starts_with("eval") ||
                                        bad.line.starts_with("generate")
                                    ? " --threads 1"
                                    : ""));
  const auto runs = lacuna_tools(lines);
  for (size_t i = 0; i < runs.size(); ++i) {
    EXPECT_EQ(runs[i].code, 3) << lines[i] << "\n" << runs[i].err;
    EXPECT_EQ(runs[i].out, "") << lines[i];
    for (const std::string& part : cases[i].named)
      EXPECT_THAT(runs[i].err, HasSubstr(part)) << lines[i];
  }
  std::vector<std::string> left;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with("out") || name.ends_with(".partial") || name.ends_with(".journal") ||
        name.ends_with(".lock") || name == "r.html")
      left.push_back(name);
  }
  // Of the third run of prune, which had finished block 0 when it met the NaN in block 1. Nothing
  // else is left, and of that run nothing but this.
  EXPECT_THAT(left, ::testing::ElementsAre("out2.journal"));
  EXPECT_EQ(bytes_of(folder / "theirs/thesis.tex"), "x");
}

TEST(BadInput, AReferenceThatIsNotFiniteFailsTheComparison) {
  const fs::path nan = with_weights([](OpenFile& weights) {
    const size_t at = weights.place(kUp).first + (3 * 256 + 5) * 2;
    weights.data[at] = static_cast<char>(0xc0), weights.data[at + 1] = 0x7f;
  });
  const fs::path text = scratch_folder("bad") / "text.txt";
  std::ofstream(text) << some_text(400);
  const Output eval =
      lacuna_tool(fmt::format("eval {} --compare {} --text {} --length 64 --windows 2 --threads 1",
                              demo_model(), nan.string(), text.string()));
  EXPECT_EQ(eval.code, 3) << eval.out;
  EXPECT_EQ(eval.out, "");
  EXPECT_THAT(eval.err,
              AllOf(HasSubstr(nan.string()), HasSubstr(kUp), HasSubstr("row 3, column 5")));
  const Output answer =
      lacuna_tool("generate " + nan.string() + " --prompt 'The city' --threads 1");
  EXPECT_EQ(answer.code, 1) << answer.out;
  EXPECT_EQ(answer.out, "");
  EXPECT_THAT(answer.err, AllOf(HasSubstr(kUp), HasSubstr("row 3, column 5: not a finite number")));
}

TEST(BadInput, CudaWithoutAGpuIsExitCodeFour) {
  const json doctor = done("doctor --json").report();
  if (!doctor["gpus"].empty()) GTEST_SKIP() << "this machine has a GPU";
  const Output run = lacuna_tool("generate " + demo_model() + " --prompt hi --device cuda");
  EXPECT_EQ(run.code, 4) << run.err;
}

/// A small file system, mounted for one test.
class DiskFull : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = scratch_folder("tmpfs");
    if (::mount("tmpfs", folder_.c_str(), "tmpfs", 0, "size=4m") != 0)
      GTEST_SKIP() << "the disk-full test needs root and tmpfs: " << std::strerror(errno);
    mounted_ = true;
  }
  void TearDown() override {
    if (mounted_) {
      EXPECT_EQ(::umount(folder_.c_str()), 0) << std::strerror(errno);
    }
  }
  void resize(const char* size) const {
    ASSERT_EQ(::mount("tmpfs", folder_.c_str(), "tmpfs", MS_REMOUNT, size), 0)
        << std::strerror(errno);
  }
  fs::path folder_;
  bool mounted_ = false;
};

TEST_F(DiskFull, NothingGetsTheFinalNameAndAResumedRunEndsWell) {
  // What core/status.h has for a run that failed for a reason that is not in its input.
  constexpr int kFailed = 3;
  const fs::path out = folder_ / "out";
  const std::string prune =
      fmt::format("prune {} -o {} --method magnitude --pattern 2:4 --threads 1 -q --resume",
                  demo_model(), out.string());
  Output run = lacuna_tool(prune, "", How::kBinary);
  EXPECT_EQ(run.code, kFailed) << "in the journal";
  EXPECT_THAT(run.err, AllOf(HasSubstr("out.journal"), HasSubstr("No space left"),
                             HasSubstr("Free some space")));
  EXPECT_FALSE(fs::exists(out));

  resize("size=10m");  // holds the journal, but not the model beside it
  run = lacuna_tool(prune, "", How::kBinary);
  EXPECT_EQ(run.code, kFailed) << "in the model";
  EXPECT_THAT(run.err, AllOf(HasSubstr("out.partial"), HasSubstr("No space left")));
  EXPECT_FALSE(fs::exists(out));

  resize("size=64m");
  done(prune);
  for (const char* file : {"model.safetensors", "checksums.json"})
    EXPECT_EQ(bytes_of(out / file), bytes_of(pruned("2:4").folder / file)) << file;
  EXPECT_FALSE(fs::exists(folder_ / "out.journal"));

  resize("size=16m");
  run = lacuna_tool(fmt::format("convert {0} -o {0}-dense --store dense", out.string()));
  EXPECT_EQ(run.code, kFailed);
  EXPECT_THAT(run.err, HasSubstr("No space left"));
  EXPECT_FALSE(fs::exists(folder_ / "out-dense"));
  EXPECT_FALSE(fs::exists(folder_ / "out-dense.partial")) << "the space is free again";
}

}  // namespace
}  // namespace lacuna::testing
