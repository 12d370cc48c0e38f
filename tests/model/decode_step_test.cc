// A decode step in kernels is the torch forward in other words.
#include "lacuna/model/decode_step.h"

#include "lacuna/model/synth.h"
#include "model/models.h"
#include "support/data.h"

namespace lacuna::model {
namespace {
using testing::must;

std::vector<int32_t> some_ids(int64_t count, int64_t vocab) {
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < count; ++i) ids.push_back(static_cast<int32_t>((i * 37 + 11) % vocab));
  return ids;
}

/// Logits after each step, a row a step, through one cache: steps of as many tokens as `pieces`
/// says, while the model has positions for them; by DecodeStep or by the torch forward.
at::Tensor by_steps(const Decoder& decoder, const std::vector<int64_t>& pieces, bool by_kernels,
                    const kernels::decode::Operations* operations = nullptr) {
  const c10::InferenceMode inference;
  KvCache cache(decoder.spec(), 1, decoder.compute());
  const std::vector<int32_t> ids = some_ids(decoder.spec().max_positions, decoder.spec().vocab);
  std::vector<at::Tensor> rows;
  std::optional<DecodeStep> step;
  if (by_kernels) step.emplace(decoder, cache, operations);
  for (const int64_t piece : pieces) {
    if (cache.length() + piece > decoder.spec().max_positions) break;
    const int64_t before = cache.length();
    const std::vector<int32_t> next(ids.begin() + cache.length(),
                                    ids.begin() + cache.length() + piece);
    if (!by_kernels) {
      rows.push_back(decoder.forward(testing::ids_tensor(next), &cache, true).view({-1}));
    } else {
      const int32_t best = step->run(next);
      rows.push_back(step->logits().clone());
      EXPECT_EQ(best, rows.back().argmax().item<int64_t>());
    }
    EXPECT_EQ(cache.length(), before + piece);
  }
  EXPECT_GE(rows.size(), 6u);
  return at::stack(rows);
}

// Across the first capacity of the cache (64), and past a window of attention.
const std::vector<int64_t> kPieces = {5, 1, 1, 16, 3, 1, 16, 2, 15, 1, 4, 1, 1, 9};

class DecodeStepOf : public ::testing::TestWithParam<const char*> {
 protected:
  Decoder open(at::ScalarType dtype) const {
    return testing::open_decoder(testing::source_folder() / "tests/golden/tiny_models" / GetParam(),
                                 dtype);
  }
};

TEST_P(DecodeStepOf, GivesTheLogitsOfTheTorchForward) {
  const Decoder decoder = open(at::kFloat);
  const at::Tensor expected = by_steps(decoder, kPieces, false);
  for (const auto* operations : kernels::decode::cpu_operations())
    EXPECT_LE(testing::relative_difference(by_steps(decoder, kPieces, true, operations), expected),
              2e-6)
        << operations->name;
}

// Both forms round every intermediate, at the same places but not always to the same side: each is
// as far off the float32 model as the other.
TEST_P(DecodeStepOf, IsAsCloseInHalfTypesAsTorch) {
  const at::Tensor exact = by_steps(open(at::kFloat), kPieces, false);
  for (const at::ScalarType dtype : {at::kBFloat16, at::kHalf}) {
    const Decoder decoder = open(dtype);
    const double off = testing::relative_difference(by_steps(decoder, kPieces, false), exact);
    EXPECT_LE(testing::relative_difference(by_steps(decoder, kPieces, true), exact), 1.5 * off)
        << dtype;
  }
}

// Single tokens among the pieces are recorded and replayed there.
TEST_P(DecodeStepOf, GivesTheLogitsOfTheTorchForwardOnAGpu) {
  const auto device = open_device("cuda");
  if (!device.ok()) GTEST_SKIP() << "needs a GPU: " << device.error().message;
  if (const auto why_not = gpu_library_refusal())
    GTEST_SKIP() << "needs the GPU kernels: " << *why_not;
  const at::Tensor exact = by_steps(open(at::kFloat), kPieces, false);
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const auto folder = testing::source_folder() / "tests/golden/tiny_models" / GetParam();
    const Decoder decoder =
        must(Decoder::load(must(io::Checkpoint::open(folder)), {*device, dtype}));
    ASSERT_EQ(DecodeStep::refusal(decoder), std::nullopt);
    const double off = std::max(
        testing::relative_difference(by_steps(decoder, kPieces, false).cpu(), exact), 2e-6);
    EXPECT_LE(testing::relative_difference(by_steps(decoder, kPieces, true).cpu(), exact),
              1.5 * off)
        << dtype;
  }
}

INSTANTIATE_TEST_SUITE_P(Architectures, DecodeStepOf,
                         ::testing::Values("llama2", "llama3", "llama_linear_rope", "llama_biased",
                                           "mistral", "qwen2", "qwen3", "arcee", "opt",
                                           "opt_post_norm"),
                         [](const auto& test) { return std::string(test.param); });

TEST(DecodeStep, GivesTheSameBitsForTheSameThreads) {
  const Decoder decoder = testing::open_decoder(testing::demo_model_folder(), at::kBFloat16);
  const at::Tensor first = by_steps(decoder, kPieces, true);
  for (int repeat = 0; repeat < 5; ++repeat)
    EXPECT_TRUE(at::equal(by_steps(decoder, kPieces, true), first));
}

TEST(DecodeStep, SaysWhenALogitIsNotFinite) {
  Decoder decoder = testing::open_decoder(testing::demo_model_folder());
  Block block = decoder.blocks().front();  // shares its weights
  const at::Tensor weight = block.linear("mlp.up_proj").weight().clone();
  weight[0][0] = std::numeric_limits<float>::quiet_NaN();
  block.linear("mlp.up_proj").set_weight(weight);
  KvCache cache(decoder.spec(), 1, decoder.compute());
  EXPECT_EQ(DecodeStep(decoder, cache).run({5, 6}), -1);
}

}  // namespace
}  // namespace lacuna::model
