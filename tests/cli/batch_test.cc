// Several prompts at once, from outside.
#include <fstream>

#include "cli/run_tool.h"
#include "lacuna/core/gpu.h"

namespace lacuna::testing {
namespace {
using ::testing::HasSubstr;

TEST(Prompts, AreAnsweredAsEachAlone) {
  const std::vector<std::string> prompts = {"The history of the city began when", "She said",
                                            "In the year of the great storm the people"};
  const fs::path file = scratch_folder("prompts") / "prompts.txt";
  std::ofstream text(file);
  for (const std::string& prompt : prompts) text << prompt << "\n\n";
  text.close();
  const std::string model = demo_model_folder().string();
  const std::string rest = " --device cpu --dtype float32 --max-new-tokens 12 --json -q";
  const json all =
      json::parse(done("generate " + model + " --prompts " + file.string() + rest).out);
  ASSERT_EQ(all["generations"].size(), prompts.size());
  for (size_t i = 0; i < prompts.size(); ++i) {
    const json one =
        json::parse(done("generate " + model + " --prompt '" + prompts[i] + "'" + rest).out);
    EXPECT_EQ(all["generations"][i]["token_ids"], one["token_ids"]) << prompts[i];
    EXPECT_EQ(all["generations"][i]["text"], one["text"]) << prompts[i];
  }
}

TEST(Prompts, OneOfThemOrAFile) {
  const std::string model = demo_model_folder().string();
  EXPECT_EQ(lacuna_tool("generate " + model).code, 2);
  const fs::path empty = scratch_folder("prompts") / "empty.txt";
  std::ofstream(empty) << "\n";
  const Output none = lacuna_tool("generate " + model + " --prompts " + empty.string());
  EXPECT_EQ(none.code, 3);
  EXPECT_THAT(none.err, HasSubstr("holds no prompt"));
}

TEST(Bench, TimesABatchOfPrompts) {
  const json report = json::parse(done("bench model " + demo_model_folder().string() +
                                       " --batch 3 --prompt 8 --tokens 4 --repetitions 2 "
                                       "--device cpu --json -q")
                                      .out);
  EXPECT_EQ(report["batch"], 3);
  const json& model = report["models"][0];
  EXPECT_NEAR(model["tokens_per_second"].get<double>(), 3000 / model["tpot_ms"].get<double>(),
              1e-6 * model["tokens_per_second"].get<double>());
}

TEST(Bench, OfAProblemOnAGpuSaysWhereThereIsNone) {
  if (!gpus().empty()) GTEST_SKIP() << "there is a GPU";
  const Output run = lacuna_tool("bench linear_nm:bf16:64x128x1:2:4 --device cuda --quick");
  EXPECT_EQ(run.code, 4);
  EXPECT_THAT(run.err, HasSubstr("GPU"));
}

}  // namespace
}  // namespace lacuna::testing
