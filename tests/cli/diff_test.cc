// `diff` and `apply`: a pruned model as a patch on the dense one.
#include <fmt/format.h>

#include "cli/run_tool.h"

namespace lacuna::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

struct Patch {
  fs::path file = scratch_folder("patch") / "mask.lacuna", out = scratch_folder("patch") / "model";
};

TEST(Diff, AndApplyGiveTheSameModelAgain) {
  for (const char* pattern : {"unstructured", "2:4", "3:8", "block:16x16"}) {
    const Patch patch;
    const json made = done(fmt::format("diff {} {} -o {} --json -q", demo_model(),
                                       pruned(pattern).folder.string(), patch.file.string()))
                          .report();
    EXPECT_TRUE(made.at("changed").empty());
    EXPECT_EQ(made.at("weights"), pruned(pattern).report.at("layers").size());
    EXPECT_EQ(made.at("bytes").get<uint64_t>(), fs::file_size(patch.file));
    EXPECT_GT(made.at("bits_per_weight").get<double>(), 1);
    EXPECT_LT(made.at("bits_per_weight").get<double>(), 1.15);  // notes and checksums included
    const json applied = done(fmt::format("apply {} {} -o {} --json -q", demo_model(),
                                          patch.file.string(), patch.out.string()))
                             .report();
    EXPECT_NEAR(applied.at("sparsity").get<double>(),
                pruned(pattern).report.at("sparsity").get<double>(), 1e-9);
    for (const char* file : {"model.safetensors", "config.json", "checksums.json"})
      EXPECT_EQ(bytes_of(patch.out / file), bytes_of(pruned(pattern).folder / file))
          << pattern << " " << file;
  }
}

TEST(Diff, ReadsAnyStoreAndApplyWritesAny) {
  const Patch patch;
  done(fmt::format("diff {} {} -o {} -q", demo_model(), converted("2:4", "dense").string(),
                   patch.file.string()));
  done(fmt::format("apply {} {} -o {} --store dense -q", demo_model(), patch.file.string(),
                   patch.out.string()));
  EXPECT_EQ(bytes_of(patch.out / "model.safetensors"),
            bytes_of(converted("2:4", "dense") / "model.safetensors"));
}

TEST(Diff, NamesAndCountsChangedValuesAndWritesTheMaskAloneWhenTold) {
  // One kept value of one weight, and one of an embedding.
  const fs::path changed = copy_of(converted("2:4", "dense"));
  OpenFile file = open_weights(changed);
  const std::string weight = "model.layers.1.mlp.up_proj.weight";
  size_t at = file.place(weight).first;
  while (file.data[at] == 0 && file.data[at + 1] == 0) at += 2;
  file.flip_bit(at, 0);
  file.flip_bit(file.place("model.embed_tokens.weight").first, 1);
  file.save_with_checksums();
  const Patch patch;
  const std::string line =
      fmt::format("diff {} {} -o {} -q", demo_model(), changed.string(), patch.file.string());
  const Output refused = lacuna_tool(line);
  EXPECT_EQ(refused.code, 3);
  EXPECT_THAT(refused.err, AllOf(HasSubstr(weight + " (1 of "), HasSubstr("model.embed_tokens"),
                                 HasSubstr("--mask-only")));
  EXPECT_FALSE(fs::exists(patch.file));
  const json report = done(line + " --mask-only --json").report();
  ASSERT_EQ(report.at("changed").size(), 2u);
  done(fmt::format("apply {} {} -o {} -q", demo_model(), patch.file.string(), patch.out.string()));
  EXPECT_EQ(bytes_of(patch.out / "model.safetensors"),
            bytes_of(pruned("2:4").folder / "model.safetensors"));
}

TEST(Diff, TakesTheMaskOfCodes) {
  const fs::path coded = scratch_folder("coded") / "model";
  done(fmt::format("convert {} -o {} --quantize int8 -q", pruned("2:4").folder.string(),
                   coded.string()));
  const Patch patch;
  const std::string line =
      fmt::format("diff {} {} -o {} -q", demo_model(), coded.string(), patch.file.string());
  EXPECT_EQ(lacuna_tool(line).code, 3);
  done(line + " --mask-only");
  done(fmt::format("apply {} {} -o {} -q", demo_model(), patch.file.string(), patch.out.string()));
  EXPECT_EQ(bytes_of(patch.out / "model.safetensors"),
            bytes_of(pruned("2:4").folder / "model.safetensors"));
}

TEST(Diff, RefusesWhatIsNotTheSameModel) {
  const Patch patch;
  const Output dense =
      lacuna_tool(fmt::format("diff {0} {0} -o {1}", demo_model(), patch.file.string()));
  EXPECT_EQ(dense.code, 3);
  EXPECT_THAT(dense.err, HasSubstr("no weight of it is sparse"));
  const fs::path other = copy_of(demo_model());
  OpenFile file = open_weights(other);
  file.header["model.norm2.weight"] = file.header["model.norm.weight"];
  file.header.erase("model.norm.weight");
  file.save();
  const Output names = lacuna_tool(fmt::format("diff {} {} -o {}", other.string(),
                                               pruned("2:4").folder.string(), patch.file.string()));
  EXPECT_EQ(names.code, 3);
  EXPECT_THAT(names.err, HasSubstr("model.norm"));
}

TEST(Apply, RefusesAnotherModelAndADamagedFileByName) {
  const Patch patch;
  done(fmt::format("diff {} {} -o {} -q", demo_model(), pruned("2:4").folder.string(),
                   patch.file.string()));
  const fs::path other = copy_of(demo_model());
  OpenFile file = open_weights(other);
  file.flip_bit(file.place("model.layers.2.self_attn.v_proj.weight").first + 100, 3);
  file.save();
  const auto apply = [&](const fs::path& model, const fs::path& mask) {
    const Output run = lacuna_tool(
        fmt::format("apply {} {} -o {}", model.string(), mask.string(), patch.out.string()));
    EXPECT_EQ(run.code, 3) << run.err;
    EXPECT_FALSE(fs::exists(patch.out));
    return run.err;
  };
  EXPECT_THAT(apply(other, patch.file), AllOf(HasSubstr(other.string()),
                                              HasSubstr("model.layers.2.self_attn.v_proj.weight")));
  OpenFile damaged(patch.file);
  damaged.flip_bit(damaged.place("model.layers.0.mlp.up_proj.weight.mask").first + 5, 2);
  damaged.path = patch.file.string() + ".damaged";
  damaged.save();
  EXPECT_THAT(apply(demo_model(), damaged.path),
              AllOf(HasSubstr(".damaged"), HasSubstr("model.layers.0.mlp.up_proj.weight"),
                    HasSubstr("damaged")));
  EXPECT_THAT(apply(demo_model(), fs::path(demo_model()) / "model.safetensors"),
              HasSubstr("not a file of masks"));
}

}  // namespace
}  // namespace lacuna::testing
