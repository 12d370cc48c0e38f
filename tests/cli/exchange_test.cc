// `convert --format csr|coo|bsr` from outside: there and back without a changed byte, proved, run.
#include <fmt/format.h>

#include <fstream>

#include "cli/run_tool.h"

namespace lacuna::testing {
namespace {
using ::testing::AllOf;
using ::testing::AnyOf;
using ::testing::HasSubstr;
using ::testing::Not;

const std::string kUp = "model.layers.2.mlp.up_proj.weight";  // 640 x 256
constexpr const char* kPatterns[] = {"unstructured", "2:4", "block:16x16"};
constexpr const char* kFormats[] = {"csr", "coo", "bsr", "bsr --block-size 5x24"};

std::string violations(const fs::path& model, const std::string& flags = "") {
  const Output run = lacuna_tool(fmt::format("verify {} {} --json -q", model.string(), flags));
  EXPECT_EQ(run.code, 1) << run.out << run.err;
  return run.report()["violations"].dump(1);
}

void expect_same_model(const fs::path& a, const fs::path& b) {
  for (const char* file : {"model.safetensors", "checksums.json"})
    EXPECT_TRUE(bytes_of(a / file) == bytes_of(b / file)) << a << " " << b << " " << file;
  EXPECT_TRUE(json_of(a / "config.json") == json_of(b / "config.json")) << a << " " << b;
}

TEST(Exchange, ThereAndBackGivesTheSameBytes) {
  const fs::path folder = scratch_folder("back");
  for (const char* pattern : kPatterns)
    for (const char* format : kFormats) {
      const std::string back = (folder / "back").string();
      const fs::path& exchanged = converted(pattern, format);
      EXPECT_EQ(json_of(exchanged / "config.json")["lacuna"]["format_version"], 3);
      done(
          fmt::format("convert {} -o {} --overwrite --store compact -q", exchanged.string(), back));
      expect_same_model(back, pruned(pattern).folder);
      done(fmt::format("convert {} -o {} --overwrite --store dense -q", exchanged.string(), back));
      expect_same_model(back, converted(pattern, "dense"));
    }
}

TEST(Exchange, ADenseFolderGivesTheSameFilesAsACompactOne) {
  const std::string out = (scratch_folder("dense") / "out").string();
  for (const char* format : kFormats) {
    done(fmt::format("convert {} -o {} --overwrite --format {} -q",
                     converted("2:4", "dense").string(), out, format));
    expect_same_model(out, converted("2:4", format));
  }
}

TEST(Exchange, AllVerbsReadThem) {
  const fs::path text = scratch_folder("text") / "text.txt";
  std::ofstream(text) << some_text(200);
  const std::string eval = fmt::format(
      "eval {{}} --text {} --length 32 --windows 2 --threads 1 -q --json", text.string());
  for (const char* pattern : kPatterns) {
    const std::string compact = pruned(pattern).folder.string();
    const auto run = [](const std::string& line, const std::string& model) {
      return done(fmt::format(fmt::runtime(line), model));
    };
    const std::string generate = "generate {} --prompt Once --max-new-tokens 8 --threads 1 -q";
    for (const char* format : kFormats) {
      const std::string model = converted(pattern, format).string();
      EXPECT_EQ(run(eval, model).report()["perplexity"], run(eval, compact).report()["perplexity"]);
      EXPECT_EQ(run(generate, model).out, run(generate, compact).out);
      const json verified =
          done(
              fmt::format("verify {} --expect-pattern {} --expect-sparsity 0.5 --against {} --json",
                          model, pattern, demo_model()))
              .report();
      EXPECT_EQ(verified["ok"], true);
      EXPECT_EQ(verified["checksums"], true);
      size_t seen = 0;
      const json inspected = done(fmt::format("inspect {} --json", model)).report();
      for (const json& layer : inspected["layers"]) {
        if (layer["name"] != kUp) continue;
        ++seen;
        EXPECT_EQ(layer["format"], std::string(format).substr(0, 3));
        EXPECT_EQ(layer["pattern"], pattern);
      }
      EXPECT_EQ(seen, 1u);
    }
  }
}

TEST(Exchange, PruneWritesThemToo) {
  const std::string out = (scratch_folder("pruned") / "out").string();
  done(fmt::format("prune {} -o {} --method magnitude --pattern 2:4 --threads 1 -q --store csr",
                   demo_model(), out));
  EXPECT_EQ(bytes_of(fs::path(out) / "model.safetensors"),
            bytes_of(converted("2:4", "csr") / "model.safetensors"));
}

TEST(Exchange, VerifyFindsOneFlippedBitAndNamesTensorAndChunk) {
  const struct {
    const char *format, *part;
  } cases[] = {{"csr", ".row_offsets"},   {"csr", ".columns"}, {"csr", ".values"},
               {"coo", ".rows"},          {"coo", ".columns"}, {"bsr", ".block_columns"},
               {"bsr", ".block_offsets"}, {"bsr", ".values"}};
  for (const auto& [format, part] : cases) {
    const fs::path model = copy_of(converted("unstructured", format));
    OpenFile weights = open_weights(model);
    const auto [begin, size] = weights.place(kUp + part);
    weights.flip_bit(begin + size / 2, 0);
    weights.save();
    EXPECT_THAT(violations(model), HasSubstr("tensor \\\"" + kUp + part + "\\\", chunk 1 of 1"))
        << format;
  }
}

TEST(Exchange, VerifyProvesTheStructureWhereChecksumsAgree) {
  const auto damaged = [](const char* format, const std::string& part, size_t element, int bit) {
    const fs::path model = copy_of(converted("unstructured", format));
    OpenFile weights = open_weights(model);
    weights.flip_bit(weights.place(kUp + part).first + element * 4, bit);
    weights.save_with_checksums();
    return model;
  };
  // The last offset (of 8 bytes each), a column early in a row, an early row.
  const fs::path offsets = damaged("csr", ".row_offsets", 2 * 640, 7);
  const fs::path columns = damaged("csr", ".columns", 1, 7), rows = damaged("coo", ".rows", 9, 6);
  for (const fs::path& model : {offsets, columns, rows}) {
    const std::string found = violations(model);
    EXPECT_THAT(found, AllOf(HasSubstr(kUp), HasSubstr("row "), HasSubstr(", column "),
                             Not(HasSubstr("chunk"))));
    EXPECT_THAT(found, AnyOf(HasSubstr("row offset"), HasSubstr("entry ")));
    const Output run = lacuna_tool("generate " + model.string() + " --prompt hi");
    EXPECT_EQ(run.code, 3) << "structure is checked whenever a weight is read";
    EXPECT_THAT(run.err, HasSubstr(kUp));
  }
}

TEST(Exchange, RefusesWhatCannotBeAndSaysWhy) {
  const std::string out = (scratch_folder("refused") / "out").string();
  const struct {
    const char *line, *why;
  } cases[] = {
      {"{} -o {} --format csc", "unknown store (got csc; need compact, dense"},
      {"{} -o {} --format bsr --block-size 4", "--block-size: not the size of a block (got 4"},
      {"{} -o {} --format bsr --block-size 0x4", "(got 0x4; need RxC"},
      {"{} -o {} --format csr --block-size 4x4", "only bsr has blocks (got csr)"},
      {"{} -o {} --block-size 4x4", "only bsr has blocks (got compact)"},
      {"{} -o {} --format csr --store coo", "--store"},
      {"{} -o {} --format csr --quantize int8", "only the compact store has codes"},
      {"{}/model.safetensors -o {} --format csr", "csr, coo and bsr need a model folder"},
  };
  for (const auto& [line, why] : cases) {
    const Output run = lacuna_tool(
        "convert " + fmt::format(fmt::runtime(line), pruned("2:4").folder.string(), out) + " -q");
    EXPECT_EQ(run.code, 2) << line << "\n" << run.err;
    EXPECT_THAT(run.err, HasSubstr(why)) << line;
  }
  const std::string coded = (scratch_folder("coded") / "model").string();
  done(fmt::format("convert {} -o {} --quantize int8 -q", pruned("2:4").folder.string(), coded));
  const Output run = lacuna_tool(fmt::format("convert {} -o {} --format csr -q", coded, out));
  EXPECT_EQ(run.code, 3);
  EXPECT_THAT(run.err, AllOf(HasSubstr("csr has no place for codes"), HasSubstr("--store dense")));
  EXPECT_FALSE(fs::exists(out));

  const fs::path later = copy_of(converted("2:4", "csr"));
  json config = json_of(later / "config.json");
  config["lacuna"]["format_version"] = 2;
  std::ofstream(later / "config.json") << config.dump();
  const Output old = lacuna_tool("inspect " + later.string());
  EXPECT_EQ(old.code, 3);
  EXPECT_THAT(old.err,
              HasSubstr("lies there as csr, which format version 2 doesn't know (need 3)"));
}

TEST(Exchange, CodesCanBeMadeOfWhatWasExchanged) {
  const fs::path folder = scratch_folder("codes");
  const std::string from_csr = (folder / "a").string(), direct = (folder / "b").string();
  done(fmt::format("convert {} -o {} --quantize int4 -q", converted("2:4", "csr").string(),
                   from_csr));
  done(fmt::format("convert {} -o {} --quantize int4 -q", pruned("2:4").folder.string(), direct));
  expect_same_model(from_csr, direct);
}

}  // namespace
}  // namespace lacuna::testing
