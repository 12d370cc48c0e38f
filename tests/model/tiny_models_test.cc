// Every architecture against logits made by Hugging Face transformers
// (tools/golden/tiny_models.py).
#include "lacuna/io/safetensors.h"
#include "model/models.h"
#include "support/data.h"

namespace lacuna::model {
namespace {
using testing::must;

constexpr double kBound = 1e-4;  // of the largest logit

class TinyModel : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    const auto folder = testing::source_folder() / "tests/golden/tiny_models" / GetParam();
    decoder_ = testing::open_decoder(folder);
    const auto golden = must(io::SafetensorsFile::open(folder / "golden.safetensors"));
    ids_ = wrap(must(golden.tensor("ids")));
    logits_ = wrap(must(golden.tensor("logits")));
    ASSERT_EQ(ids_.size(1), 24);
  }

  /// Logits of all positions when the tokens come in pieces of these sizes through one cache.
  at::Tensor cached(const std::vector<int64_t>& pieces) const {
    KvCache cache(decoder_.spec(), ids_.size(0), decoder_.compute());
    std::vector<at::Tensor> parts;
    for (const int64_t tokens : pieces)
      parts.push_back(decoder_.forward(ids_.narrow(1, cache.length(), tokens), &cache));
    return at::cat(parts, 1);
  }

  Decoder decoder_;
  at::Tensor ids_, logits_;
};

TEST_P(TinyModel, GivesTheLogitsOfTransformers) {
  EXPECT_LE(testing::relative_difference(decoder_.forward(ids_), logits_), kBound);
}

TEST_P(TinyModel, GivesTheSameLogitsTokenByTokenAfterAPrompt) {
  std::vector<int64_t> pieces(25 - 7, 1);
  pieces[0] = 7;
  EXPECT_LE(testing::relative_difference(cached(pieces), logits_), kBound);
}

TEST_P(TinyModel, GivesTheSameLogitsInChunks) {
  EXPECT_LE(testing::relative_difference(cached({5, 9, 1, 2, 7}), logits_), kBound);
  EXPECT_LE(testing::relative_difference(cached({1, 10, 13}), logits_), kBound);
}

TEST_P(TinyModel, GivesTheLastPositionAlone) {
  const at::Tensor last = decoder_.forward(ids_, nullptr, /*last_only=*/true);
  ASSERT_EQ(last.sizes(), at::IntArrayRef({2, 1, decoder_.spec().vocab}));
  EXPECT_LE(testing::relative_difference(last, logits_.narrow(1, 23, 1)), kBound);
}

TEST_P(TinyModel, StaysCloseInBfloat16) {
  const auto folder = testing::source_folder() / "tests/golden/tiny_models" / GetParam();
  const Decoder half = testing::open_decoder(folder, at::kBFloat16);
  EXPECT_EQ(half.forward(ids_).scalar_type(), at::kFloat);
  // Eight bits of fraction through two blocks of large random weights.
  EXPECT_LE(testing::relative_difference(half.forward(ids_), logits_), 0.1);
}

INSTANTIATE_TEST_SUITE_P(Architectures, TinyModel,
                         ::testing::Values("llama2", "llama3", "llama_linear_rope", "llama_biased",
                                           "mistral", "qwen2", "qwen3", "arcee", "opt",
                                           "opt_post_norm"),
                         [](const auto& test) { return std::string(test.param); });

io::Checkpoint tiny(const std::string& name) {
  return must(io::Checkpoint::open(testing::source_folder() / "tests/golden/tiny_models" / name));
}

TEST(Block, ShowsTheInputOfEveryLinearInForwardOrder) {
  const auto checkpoint = tiny("llama2");
  const auto spec = must(spec_of(checkpoint));
  const Compute compute;
  const Block block = must(Block::load(checkpoint, spec, 1, compute));
  std::vector<std::string> seen;
  const LinearObserver observer = [&](std::string_view name, const at::Tensor& input) {
    seen.emplace_back(name);
    EXPECT_EQ(input.size(-1), block.linear(name).in_features()) << name;
  };
  const at::Tensor hidden = at::randn({1, 3, spec.hidden});
  const Rotary rotary(spec, compute);
  EXPECT_FALSE(block.observe(hidden, rotary, observer, /*outputs=*/false).defined());
  EXPECT_EQ(seen, block.linear_names());
  EXPECT_TRUE(block.observe(hidden, rotary, observer, /*outputs=*/true)
                  .equal(block.forward(hidden, rotary)));
  EXPECT_EQ(seen.front(), "self_attn.q_proj");
  EXPECT_EQ(seen.back(), "mlp.down_proj");
}

TEST(Block, NamesTheTensorThatIsMissing) {
  const auto checkpoint = tiny("llama2");
  const auto spec = must(spec_of(checkpoint));
  const auto block = Block::load(checkpoint, spec, 7, {});
  ASSERT_FALSE(block.ok());
  EXPECT_EQ(block.error().code, Code::kBadInput);
  EXPECT_NE(block.error().message.find("model.layers.7.input_layernorm.weight"), std::string::npos)
      << block.error().message;
}

TEST(Block, NamesTheTensorOfTheWrongShape) {
  const auto checkpoint = tiny("llama2");
  auto spec = must(spec_of(checkpoint));
  spec.up.out = 45;
  const auto block = Block::load(checkpoint, spec, 0, {});
  ASSERT_FALSE(block.ok());
  EXPECT_NE(block.error().message.find("model.layers.0.mlp.up_proj.weight"), std::string::npos);
  EXPECT_NE(block.error().message.find("got [44, 32]; need [45, 32]"), std::string::npos)
      << block.error().message;
}

TEST(KvCache, GrowsWithoutLosingWhatItHolds) {
  const auto spec = must(spec_of(tiny("llama3")));  // 128 positions, above the first capacity
  KvCache cache(spec, 2, {});
  const at::Tensor all = at::randn({2, spec.kv_heads, 128, spec.head_dim});
  const size_t at_first = cache.bytes();
  for (int64_t t = 0; t < 128; ++t) {
    const at::Tensor piece = all.narrow(2, t, 1);
    const auto [keys, values] = cache.append(0, piece, piece * 2);
    ASSERT_EQ(keys.size(2), t + 1);
    cache.advance(1);
  }
  const auto [keys, values] = cache.append(0, all.narrow(2, 0, 0), all.narrow(2, 0, 0));
  EXPECT_TRUE(at::equal(keys, all));
  EXPECT_TRUE(at::equal(values, all * 2));
  EXPECT_GT(cache.bytes(), at_first);
  EXPECT_THROW(cache.append(0, all.narrow(2, 0, 1), all.narrow(2, 0, 1)), c10::Error);
}

}  // namespace
}  // namespace lacuna::model
