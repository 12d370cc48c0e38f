// The demo model pruned by us, against Hugging Face transformers on our dense export of it
// (tools/golden/dense_export.py).
#include "lacuna/api/jobs.h"
#include "model/models.h"
#include "support/data.h"

namespace lacuna::api {
namespace {
namespace fs = std::filesystem;
using format::Pattern;
using nlohmann::json;
using testing::must;

struct Export {
  const char* pattern;  ///< as the golden file and --pattern have it
  io::Store store;
};

class DenseExport : public ::testing::TestWithParam<Export> {};

/// As the script prunes: by magnitude, to half of the weights, everything else as it comes.
fs::path pruned(const Pattern& pattern, io::Store store) {
  PruneJob job;
  job.model = testing::source_folder() / "examples/demo-model";
  job.out = testing::scratch_folder("dense_export") / "model";
  job.options.method = "magnitude";
  job.options.request.pattern = pattern;
  job.options.request.sparsity = 0.5;
  job.options.store = store;
  must(prune(job));
  return job.out;
}

TEST_P(DenseExport, AnswersAsTransformersDoes) {
  const json golden =
      testing::read_json(testing::source_folder() / "tests/golden/dense_export.json");
  const json& prompts = golden["exports"].at(GetParam().pattern);
  ASSERT_EQ(prompts.size(), 3);
  const fs::path folder = pruned(must(Pattern::parse(GetParam().pattern)), GetParam().store);
  const model::Decoder decoder = testing::open_decoder(folder);
  EXPECT_EQ(decoder.blocks()[0].linear("mlp.up_proj").is_compact(),
            GetParam().store == io::Store::kCompact);
  const auto tokenizer = must(io::Tokenizer::open(folder));
  for (const json& prompt : prompts) {
    const std::string text = prompt["text"];
    const std::vector<int32_t> ids = prompt["ids"];
    EXPECT_EQ(tokenizer->encode(text, true), ids) << text;

    testing::expect_top_logits(testing::last_logits(decoder, ids), prompt["top10_ids"],
                               prompt["top10_logits"], " of " + text);
    const auto generation =
        must(model::generate(decoder, *tokenizer, ids, {.max_new_tokens = 32, .ignore_eos = true}));
    EXPECT_EQ(generation.token_ids, prompt["greedy_32_ids"].get<std::vector<int32_t>>()) << text;
  }
}

INSTANTIATE_TEST_SUITE_P(Stores, DenseExport,
                         ::testing::Values(Export{"2:4", io::Store::kDense},
                                           Export{"2:4", io::Store::kCompact},
                                           Export{"unstructured", io::Store::kDense},
                                           Export{"unstructured", io::Store::kCompact}),
                         [](const auto& test) {
                           return std::string(test.param.pattern[0] == '2' ? "TwoOfFour"
                                                                           : "Unstructured") +
                                  (test.param.store == io::Store::kDense ? "Dense" : "Compact");
                         });

}  // namespace
}  // namespace lacuna::api
