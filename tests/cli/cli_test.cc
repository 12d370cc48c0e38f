// The tool from outside on the model that comes with the repository: what each verb does and
// prints.
#include <fmt/ranges.h>

#include <fstream>
#include <map>

#include "cli/run_tool.h"

namespace lacuna::testing {
namespace {
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

void expect_keys(const json& object, const std::vector<std::string>& keys, const char* of) {
  for (const std::string& key : keys)
    EXPECT_TRUE(object.contains(key) && !object[key].is_null()) << of << " has no key " << key;
}

const fs::path& text_file() {
  static const fs::path file = [] {
    fs::path path = scratch_folder("text") / "text.txt";
    std::ofstream(path) << some_text(400);
    return path;
  }();
  return file;
}

json reference() { return json_of(source_folder() / "tests/golden/demo-5m-reference.json"); }

TEST(Usage, EveryVerbHasHelpWithTwoExamplesOrMore) {
  const std::vector<std::string> verbs = {"inspect",  "prune",   "sweep",  "verify", "eval",
                                          "generate", "convert", "diff",   "apply",  "tokenize",
                                          "synth",    "report",  "doctor", "bench",  "tune"};
  std::vector<std::string> lines;
  for (const std::string& verb : verbs) lines.push_back(verb + " --help");
  const auto runs = lacuna_tools(lines);
  for (size_t i = 0; i < verbs.size(); ++i) {
    EXPECT_EQ(runs[i].code, 0) << verbs[i];
    size_t examples = 0;
    for (size_t at = runs[i].out.find("Examples:");
         (at = runs[i].out.find("lacuna " + verbs[i], at)) != std::string::npos; ++at)
      ++examples;
    EXPECT_GE(examples, 2u) << verbs[i] << "\n" << runs[i].out;
    for (const char* flag : {"--json", "-q", "-v"})
      EXPECT_THAT(runs[i].out, HasSubstr(flag)) << verbs[i];
    // Only flags that the verb has a use for.
    const std::map<std::string, std::set<std::string>> users = {
        {"--dtype", {"prune", "sweep", "eval", "generate", "bench", "tune"}},
        {"--activations", {"prune", "sweep", "eval", "generate", "bench", "tune"}},
        {"--device", {"prune", "sweep", "eval", "generate", "bench"}},
        {"--threads", {"prune", "sweep", "eval", "generate", "convert", "synth", "bench", "tune"}},
        {"--seed", {"prune", "sweep", "generate", "synth", "bench", "tune"}}};
    for (const auto& [flag, uses] : users)
      EXPECT_EQ(runs[i].out.find(flag + " ") != std::string::npos, uses.contains(verbs[i]))
          << verbs[i] << " " << flag << "\n"
          << runs[i].out;
  }
}

TEST(Usage, AnUnknownVerbIsNamed) {
  const Output run = lacuna_tool("frobnicate x");
  EXPECT_EQ(run.code, 2);
  EXPECT_THAT(run.err, HasSubstr("frobnicate: no such verb"));
  const Output store = lacuna_tool("convert x -o y --store csc");
  EXPECT_EQ(store.code, 2);
  EXPECT_THAT(store.err, AllOf(HasSubstr("unknown store"), Not(HasSubstr("--store: --store"))));
}

TEST(Usage, WhatLacunaForceNamesMustExist) {
  for (const char* wrong : {"linear_dense:magic", "linear_magic:reference"}) {
    setenv("LACUNA_FORCE", wrong, 1);
    const Output run = lacuna_tool("generate " + demo_model() + " --prompt hi --threads 1");
    unsetenv("LACUNA_FORCE");
    EXPECT_EQ(run.code, 2) << run.err;
    EXPECT_THAT(run.err, AllOf(HasSubstr("LACUNA_FORCE"), HasSubstr("magic")));
  }
}

TEST(Json, TheErrorOfOneWindowIsUnknown) {
  const std::string line = fmt::format("eval {} --text {} --length 64 --windows 1 --threads 1 -q",
                                       demo_model(), text_file().string());
  EXPECT_TRUE(done(line + " --json").report().at("stderr").is_null());
  EXPECT_THAT(done(line).out, HasSubstr("± - ("));
}

TEST(Usage, OnlyTheResultGoesToStdoutAndQuietSaysNothingElse) {
  const std::string line = "verify " + pruned("2:4").folder.string();
  const Output loud = done(line + " -v"), quiet = done(line + " --quiet");
  EXPECT_EQ(loud.out, quiet.out);
  EXPECT_EQ(quiet.err, "");
  EXPECT_THAT(loud.err, AllOf(HasSubstr("verify: "), HasSubstr("B of memory")));
}

TEST(Json, EveryVerbHasTheKeysOfItsContract) {
  const auto binary = [](const std::string& line) { return done(line, How::kBinary); };
  const std::string sparse = pruned("2:4").folder.string(), text = text_file().string();
  const json prune = pruned("2:4").report;
  expect_keys(prune, {"out", "seconds", "phases", "sparsity", "bytes_dense", "bytes_out", "layers"},
              "prune");
  ASSERT_EQ(prune["layers"].size(), 42u);
  expect_keys(prune["layers"][0], {"name", "sparsity", "damping", "seconds"}, "prune layer");
  EXPECT_TRUE(prune["layers"][0].contains("error"));  // null: magnitude sees no inputs
  EXPECT_EQ(prune["sparsity"], 0.5);
  EXPECT_EQ(prune["bytes_dense"], 5180672 * 2);
  expect_keys(prune["phases"], {"load", "solve", "journal", "write"}, "prune phases");

  const json inspect = binary("inspect " + sparse + " --json").report();
  expect_keys(inspect, {"architecture", "parameters", "bytes", "sparsity", "layers"}, "inspect");
  ASSERT_FALSE(inspect["layers"].empty());
  for (const json& layer : inspect["layers"])
    expect_keys(layer, {"name", "shape", "dtype", "format", "pattern", "sparsity", "bytes"},
                "inspect layer");
  EXPECT_EQ(inspect["bytes"], prune["bytes_out"]);

  const json verify = binary("verify " + sparse + " --json -q").report();
  expect_keys(verify, {"ok", "sparsity", "layers", "violations"}, "verify");
  ASSERT_EQ(verify["layers"].size(), 42u);
  for (const json& layer : verify["layers"]) {
    expect_keys(layer, {"name", "pattern", "sparsity", "zeros", "elements"}, "verify layer");
    EXPECT_EQ(layer["pattern"], "2:4");
    EXPECT_EQ(layer["zeros"].get<int64_t>() * 2, layer["elements"].get<int64_t>());
  }

  const json eval = binary(fmt::format("eval {} --text {} --length 64 --windows 3 --compare {} "
                                       "--threads 1 --json -q",
                                       sparse, text, demo_model()))
                        .report();
  expect_keys(eval,
              {"perplexity", "stderr", "tokens", "windows", "length", "protocol", "kl_mean",
               "kl_median", "kl_max", "same_top", "perplexity_reference", "ppl_delta"},
              "eval");
  EXPECT_EQ(eval["windows"], 3);
  EXPECT_EQ(eval["length"], 64);
  EXPECT_EQ(eval["protocol"], "raw-file");
  EXPECT_GT(eval["kl_mean"], 0.0);
  EXPECT_NEAR(eval["ppl_delta"].get<double>(),
              eval["perplexity"].get<double>() - eval["perplexity_reference"].get<double>(), 1e-9);

  const json generate =
      binary("generate " + sparse + " --prompt 'The city' --max-new-tokens 4 --threads 1 --json")
          .report();
  expect_keys(generate,
              {"text", "prompt_ids", "token_ids", "finish_reason", "ttft_ms", "tpot_ms",
               "tokens_per_second"},
              "generate");
  EXPECT_GT(generate["tokens_per_second"], 0.0);

  const json tokenize =
      binary(fmt::format("tokenize {} --text {} --json", demo_model(), text)).report();
  expect_keys(tokenize, {"ids"}, "tokenize");

  const json doctor = binary("doctor --json").report();
  expect_keys(doctor, {"cpu", "gpus", "features", "libraries", "missing"}, "doctor");
  EXPECT_FALSE(doctor["cpu"].get<std::string>().empty());
  EXPECT_THAT(doctor["libraries"].dump(), AllOf(HasSubstr("lacuna"), HasSubstr("torch")));
  EXPECT_TRUE(!doctor["gpus"].empty() || !doctor["missing"].empty()) << "what a GPU would need";
}

TEST(Inspect, ReportsTheDemoModel) {
  const json report = done("inspect " + demo_model() + " --json").report();
  EXPECT_EQ(report["architecture"], "LlamaForCausalLM");
  EXPECT_EQ(report["parameters"], 5180672);
  EXPECT_EQ(report["bytes"], 5180672 * 2);
  EXPECT_LT(report["sparsity"], 0.01);
  for (const json& layer : report["layers"]) EXPECT_EQ(layer["pattern"], "dense");
}

TEST(Prune, PrunedTensorsTakeAtMost57PercentOfTheirDenseBytes) {
  for (const char* pattern : {"2:4", "unstructured"}) {
    const json report = done("inspect " + pruned(pattern).folder.string() + " --json").report();
    uint64_t dense = 0, compact = 0;
    for (const json& layer : report["layers"]) {
      if (layer["format"] != "compact") continue;
      EXPECT_EQ(layer["pattern"], pattern);
      EXPECT_NEAR(layer["sparsity"].get<double>(), 0.5, 1e-4);
      dense += 2 * layer["shape"][0].get<uint64_t>() * layer["shape"][1].get<uint64_t>();
      compact += layer["bytes"].get<uint64_t>();
    }
    EXPECT_EQ(dense, 2u * 6 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 640));
    EXPECT_LE(static_cast<double>(compact), 0.57 * static_cast<double>(dense)) << pattern;
  }
}

TEST(Prune, TargetAndExcludeChooseTheWeights) {
  const fs::path out = scratch_folder("target") / "out";
  const json report = done(fmt::format("prune {} -o {} --method magnitude --sparsity 0.6 --target "
                                       "q_proj 'mlp.*up' --exclude 'layers.[3-5]' --threads 1 "
                                       "--json -q",
                                       demo_model(), out.string()))
                          .report();
  ASSERT_EQ(report["layers"].size(), 6u);
  EXPECT_NEAR(report["sparsity"].get<double>(), 0.6, 1e-3);
  const json verified = done(fmt::format("verify {} --expect-sparsity 0.6 --against {} --json -q",
                                         out.string(), demo_model()))
                            .report();
  for (const json& layer : verified["layers"]) {
    const auto name = layer["name"].get<std::string>();
    const bool chosen = (name.find("q_proj") != name.npos || name.find("up_proj") != name.npos) &&
                        name.find_first_of("345") == name.npos;
    EXPECT_EQ(layer["pattern"], chosen ? "unstructured" : "dense") << name;
  }
}

TEST(Writing, AFinishedModelIsReplacedOnlyWhenAsked) {
  const fs::path folder = scratch_folder("overwrite");
  const std::string out = (folder / "out").string(),
                    prune = fmt::format("prune {} -o {} --method magnitude --threads 1",
                                        demo_model(), out),
                    convert = fmt::format("convert {} -o {} --store dense", demo_model(), out);
  const Output first = done(prune);
  EXPECT_THAT(first.out, Not(HasSubstr("q_proj"))) << "a line, not a table";
  const std::string before = bytes_of(folder / "out/model.safetensors");
  for (const std::string& line :
       {prune, prune + " --resume", convert, fmt::format("synth --like opt-125m -o {}", out)}) {
    const Output refused = lacuna_tool(line);
    EXPECT_EQ(refused.code, 3) << line;
    EXPECT_THAT(refused.err, HasSubstr("--overwrite")) << line;
  }
  EXPECT_EQ(bytes_of(folder / "out/model.safetensors"), before);
  const Output table = done(prune + " --sparsity 0.7 --overwrite -v");
  EXPECT_THAT(table.out, HasSubstr("q_proj"));
  EXPECT_NE(bytes_of(folder / "out/model.safetensors"), before);
  const Output again = done(fmt::format(
      "prune {} -o {}/2 --method magnitude --sparsity 0.8 --threads 1", out, folder.string()));
  EXPECT_THAT(again.err, HasSubstr("is sparse already (42 weights)"));
}

TEST(Convert, EveryStoreAndBackGivesTheSameBytes) {
  for (const char* pattern : {"2:4", "unstructured", "block:16x16"}) {
    const fs::path& compact = pruned(pattern).folder;
    const fs::path& dense = converted(pattern, "dense");
    const fs::path& legacy = converted(pattern, "compressed-tensors");
    const fs::path folder = scratch_folder("convert");
    const json report = done(fmt::format("convert {} -o {}/a --store compact --json -q",
                                         dense.string(), folder.string()))
                            .report();
    expect_keys(report, {"bytes_in", "bytes_out"}, "convert");
    EXPECT_EQ(report["bytes_in"], 5180672 * 2);
    EXPECT_EQ(report["bytes_out"], pruned(pattern).report["bytes_out"]);
    for (const char* file : {"model.safetensors", "checksums.json"})
      EXPECT_EQ(bytes_of(folder / "a" / file), bytes_of(compact / file)) << pattern;
    for (const char* file : {"tokenizer.json", "generation_config.json"})
      EXPECT_EQ(bytes_of(folder / "a" / file), bytes_of(fs::path(demo_model()) / file));

    done(fmt::format("verify {} --against {} -q", legacy.string(), demo_model()));
    done(fmt::format("convert {} -o {}/b --store dense -q", legacy.string(), folder.string()));
    EXPECT_EQ(bytes_of(folder / "b/model.safetensors"), bytes_of(dense / "model.safetensors"));
    if (pattern == std::string("block:16x16")) continue;  // bitmasks don't remember blocks
    done(fmt::format("convert {} -o {}/c -q", legacy.string(), folder.string()));
    EXPECT_EQ(bytes_of(folder / "c/model.safetensors"), bytes_of(compact / "model.safetensors"));
    const json inspected = done("inspect " + legacy.string() + " --json").report();
    EXPECT_THAT(inspected["layers"].dump(),
                HasSubstr(pattern == std::string("2:4") ? "sparse-24-bitmask" : "sparse-bitmask"));
  }
}

TEST(Eval, EveryStoreHasTheSamePerplexity) {
  std::vector<double> perplexities;
  for (const fs::path& model :
       {pruned("2:4").folder, converted("2:4", "dense"), converted("2:4", "compressed-tensors")})
    perplexities.push_back(done(fmt::format("eval {} --text {} --length 64 --windows 3 --dtype "
                                            "float32 --threads 1 --json -q",
                                            model.string(), text_file().string()))
                               .report()["perplexity"]);
  // The products sum in another order: a few float32 roundings on a mean of 189 logarithms.
  EXPECT_NEAR(perplexities[1] / perplexities[0], 1.0, 1e-4);
  EXPECT_NEAR(perplexities[2] / perplexities[0], 1.0, 1e-4);
}

TEST(Generate, ReproducesTheReferenceTokens) {
  const json expected = reference();
  const json report = done(fmt::format("generate {} --prompt '{}' --max-new-tokens 64 --dtype "
                                       "float32 --device cpu --threads 1 --json",
                                       demo_model(), expected["prompt"].get<std::string>()))
                          .report();
  EXPECT_EQ(report["prompt_ids"], expected["prompt_ids"]);
  EXPECT_EQ(report["token_ids"], expected["greedy_64_ids"]);
  EXPECT_EQ(report["dtype"], "float32");
  EXPECT_EQ(report["device"], "cpu");
}

TEST(Generate, ReadsThePromptFromStdin) {
  const Output run =
      lacuna_tool("generate " + demo_model() + " --prompt - --max-new-tokens 3 --threads 1 --json",
                  "The history of the city began when\n");
  ASSERT_EQ(run.code, 0) << run.err;
  EXPECT_EQ(run.report()["prompt_ids"], reference()["prompt_ids"]);
  EXPECT_EQ(run.report()["token_ids"].size(), 3u);
}

TEST(Generate, FlagsDoWhatTheySay) {
  const auto line = [](const std::string& flags) {
    return fmt::format(
        "generate {} --prompt 'The history of the city' --dtype float32 --threads 1 --json {}",
        demo_model(), flags);
  };
  const std::string many = "--max-new-tokens 24 --ignore-eos ";
  const std::string random =
      many + "--temperature 1.2 --top-k 200 --top-p 0.95 --min-p 0.001 --repetition-penalty 1.1 ";
  const std::vector<std::string> flags = {many,
                                          random + "--seed 5",
                                          random + "--seed 5",
                                          random + "--seed 6",
                                          many + "--temperature 1 --top-k 1 --seed 9",
                                          many + "--temperature 1 --top-p 0 --seed 9",
                                          many + "--temperature 1 --min-p 1 --seed 9",
                                          many + "--repetition-penalty 2"};
  std::vector<std::string> lines;
  for (const std::string& f : flags) lines.push_back(line(f));
  std::vector<json> ids;
  json greedy;
  for (const Output& run : lacuna_tools(lines)) {
    EXPECT_EQ(run.code, 0) << run.err;
    const json report = run.report();
    if (ids.empty()) greedy = report;
    ids.push_back(report["token_ids"]);
    EXPECT_EQ(ids.back().size(), 24u) << "--ignore-eos goes on to --max-new-tokens";
    EXPECT_EQ(report["finish_reason"], "length");
  }
  EXPECT_EQ(ids[1], ids[2]) << "same seed, same tokens";
  EXPECT_NE(ids[1], ids[3]) << "another seed";
  EXPECT_NE(ids[1], ids[0]) << "not greedy";
  EXPECT_EQ(ids[4], ids[0]) << "--top-k 1 leaves the likeliest token only";
  EXPECT_EQ(ids[5], ids[0]) << "--top-p 0 too";
  EXPECT_EQ(ids[6], ids[0]) << "--min-p 1 too";
  EXPECT_NE(ids[7], ids[0]) << "greedy text repeats itself; the penalty keeps it from that";

  const auto text = greedy["text"].get<std::string>();
  const std::string stop = text.substr(text.size() / 2, 3);
  const Output stopped = done(line(many + "--stop nowhere --stop '" + stop + "'"));
  EXPECT_EQ(stopped.report()["finish_reason"], "stop");
  EXPECT_EQ(stopped.report()["text"], text.substr(0, text.find(stop)));
}

TEST(Tokenize, PrintsIds) {
  const fs::path file = scratch_folder("tokenize") / "t.txt";
  std::ofstream(file) << "The history of the city began when";
  const std::string line = fmt::format("tokenize {} --text {}", demo_model(), file.string());
  const json expected = reference()["prompt_ids"];
  EXPECT_EQ(done(line + " --json").report()["ids"], expected);
  EXPECT_EQ(done(line + " --json --no-special").report()["ids"], expected) << "it adds none";
  EXPECT_EQ(done(line).out, fmt::format("{}\n", fmt::join(expected.get<std::vector<int>>(), " ")));
}

TEST(Synth, AKnownShapeIsSparseAtOnceAndVerifies) {
  const fs::path out = scratch_folder("synth") / "model";
  const json report =
      done(fmt::format("synth --like smollm2-135m --pattern 2:4 -o {} --json -q", out.string()))
          .report();
  expect_keys(report, {"parameters", "bytes"}, "synth");
  EXPECT_EQ(report["parameters"], 134515008);
  const json verified =
      done(fmt::format("verify {} --expect-pattern 2:4 --expect-sparsity 0.5 --json -q",
                       out.string()))
          .report();
  EXPECT_EQ(verified["ok"], true);
  EXPECT_EQ(verified["checksums"], true);
  EXPECT_EQ(verified["layers"].size(), 210u);
  // 106 of the 135 million are pruned to 9/16 of their 2 bytes.
  EXPECT_LT(report["bytes"].get<double>(), 0.66 * 2 * 134515008);
}

TEST(Synth, QuantisesAsConvertDoes) {
  const fs::path out = scratch_folder("synth") / "model";
  const json report = done(fmt::format("synth --like smollm2-135m --pattern 2:4 --quantize int4 "
                                       "-o {} --json -q",
                                       out.string()))
                          .report();
  // 106 million at 3.25 bits, 28 million of the embedding at 8.
  EXPECT_LT(report["bytes"].get<double>(), 0.29 * 2 * 134515008);
  const json verified =
      done(fmt::format("verify {} --expect-pattern 2:4 --json -q", out.string())).report();
  EXPECT_EQ(verified["ok"], true);
}

TEST(Report, OnePageShowsTheRunsAndNeedsNoNetwork) {
  const fs::path folder = scratch_folder("report");
  const std::string sparse = pruned("2:4").folder.string();
  const std::vector<std::string> names = {"inspect", "verify", "eval", "generate"};
  const auto runs = lacuna_tools(
      {"inspect " + sparse + " --json", "verify " + sparse + " --json",
       fmt::format("eval {} --text {} --length 64 --windows 2 --threads 1 --json", sparse,
                   text_file().string()),
       "generate " + sparse + "/ --prompt 'The city' --max-new-tokens 8 --threads 1 --json"});
  std::string files;
  std::ofstream(folder / "prune.json") << pruned("2:4").report;
  for (size_t i = 0; i < runs.size(); ++i) {
    std::ofstream(folder / (names[i] + ".json")) << runs[i].out;
    files += (folder / (names[i] + ".json")).string() + " ";
  }
  const json report =
      done(fmt::format("report {0}/prune.json {1} -o {0}/r.html --json", folder.string(), files))
          .report();
  expect_keys(report, {"path"}, "report");
  const std::string page = bytes_of(report["path"].get<std::string>());
  EXPECT_EQ(page.substr(0, 15), "<!doctype html>");
  for (const char* remote : {"http:", "https:", "src=", "href=", "url(", "@import", "<script"})
    EXPECT_THAT(page, Not(HasSubstr(remote)));
  for (const std::string& shown :
       {std::string("<h2>Size</h2>"), std::string("<h2>Quality</h2>"),
        std::string("<h2>Proof</h2>"), std::string("<h2>Answers</h2>"),
        std::string("<h2>Layers of model</h2>"), std::string("<h3>model</h3>"),
        fmt::format("{:.3f}", runs[2].report()["perplexity"].get<double>()),
        std::string("Sparsity by block"), std::string("<svg")})
    EXPECT_THAT(page, HasSubstr(shown));
  size_t html_files = 0;
  for (const auto& entry : fs::recursive_directory_iterator(folder))
    html_files += entry.path().extension() == ".html";
  EXPECT_EQ(html_files, 1u);
}

}  // namespace
}  // namespace lacuna::testing
