// Several sequences a step: each must be what it is alone.
#include "lacuna/model/decode_step.h"
#include "lacuna/model/generate.h"
#include "model/models.h"
#include "support/data.h"

namespace lacuna::model {
namespace {
using testing::must;

/// A GPU that can run decode steps, or why not.
Result<at::Device> gpu_for_steps() {
  LACUNA_TRY(const at::Device device, open_device("cuda"));
  if (const auto why_not = gpu_library_refusal()) return not_possible("{}", *why_not);
  return device;
}

std::vector<int32_t> some_ids(int64_t first, int64_t count, int64_t vocab) {
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < count; ++i)
    ids.push_back(static_cast<int32_t>(((first + i) * 37 + 11 * first) % vocab));
  return ids;
}

constexpr int64_t kSteps = 9;

/// Logits [steps, vocab] of a sequence: so many tokens through torch, then one a step.
at::Tensor alone(const Decoder& decoder, const std::vector<int32_t>& ids, int64_t prompt,
                 bool by_kernels) {
  const c10::InferenceMode inference;
  KvCache cache(decoder.spec(), 1, decoder.compute());
  decoder.forward(testing::ids_tensor({ids.begin(), ids.begin() + prompt}), &cache, true);
  std::optional<DecodeStep> step;
  if (by_kernels) step.emplace(decoder, cache);
  std::vector<at::Tensor> rows;
  for (int64_t i = prompt; i < prompt + kSteps; ++i) {
    const std::vector<int32_t> id = {ids[static_cast<size_t>(i)]};
    if (by_kernels) {
      step->run(id);
      rows.push_back(step->logits().clone());
    } else {
      rows.push_back(decoder.forward(testing::ids_tensor(id), &cache, true).view({-1}));
    }
  }
  return at::stack(rows);
}

/// The same of several sequences at once: [sequence] -> [steps, vocab].
std::vector<at::Tensor> together(const Decoder& decoder,
                                 const std::vector<std::vector<int32_t>>& ids,
                                 const std::vector<int64_t>& prompts) {
  const c10::InferenceMode inference;
  const auto count = static_cast<int64_t>(ids.size());
  KvCache cache(decoder.spec(), count, decoder.compute());
  const int64_t longest = *std::max_element(prompts.begin(), prompts.end());
  cache.reserve(longest);
  std::vector<int32_t> lengths;
  for (int64_t i = 0; i < count; ++i) {
    const auto& of = ids[static_cast<size_t>(i)];
    const int64_t prompt = prompts[static_cast<size_t>(i)];
    KvCache own(decoder.spec(), 1, decoder.compute());
    decoder.forward(testing::ids_tensor({of.begin(), of.begin() + prompt}), &own, true);
    for (int64_t layer = 0; layer < decoder.spec().layers; ++layer) {
      cache.keys(layer)[i].narrow(1, 0, prompt).copy_(own.keys(layer)[0].narrow(1, 0, prompt));
      cache.values(layer)[i].narrow(1, 0, prompt).copy_(own.values(layer)[0].narrow(1, 0, prompt));
    }
    lengths.push_back(static_cast<int32_t>(prompt));
  }
  cache.advance(longest);
  DecodeStep step(decoder, cache);
  std::vector<std::vector<at::Tensor>> rows(ids.size());
  for (int64_t i = 0; i < kSteps; ++i) {
    std::vector<int32_t> next;
    for (size_t s = 0; s < ids.size(); ++s)
      next.push_back(ids[s][static_cast<size_t>(prompts[s] + i)]);
    const std::vector<int32_t> best = step.run_each(next, lengths);
    const at::Tensor logits = step.logits().view({count, decoder.spec().vocab});
    for (size_t s = 0; s < ids.size(); ++s) {
      rows[s].push_back(logits[static_cast<int64_t>(s)].clone());
      EXPECT_EQ(best[s], rows[s].back().argmax().item<int64_t>());
      EXPECT_EQ(lengths[s], prompts[s] + i + 1);
    }
  }
  EXPECT_EQ(cache.length(), longest + kSteps);
  std::vector<at::Tensor> all;
  for (const auto& of : rows) all.push_back(at::stack(of));
  return all;
}

class BatchOf : public ::testing::TestWithParam<const char*> {
 protected:
  static Decoder open(const Compute& compute) {
    return must(Decoder::load(must(io::Checkpoint::open(testing::source_folder() /
                                                        "tests/golden/tiny_models" / GetParam())),
                              compute));
  }
  /// Of different lengths, of which one crosses the first capacity of the cache (64) and one is
  /// much longer than the first.
  void compare(const Decoder& decoder, int64_t sequences, double bound) const {
    const int64_t most = decoder.spec().max_positions - kSteps;
    std::vector<std::vector<int32_t>> ids;
    std::vector<int64_t> prompts;
    for (int64_t s = 0; s < sequences; ++s) {
      prompts.push_back(std::min<int64_t>(most, s == 0 ? 1 : s == 1 ? 60 : 3 + s * 7 % 71));
      ids.push_back(some_ids(s + 1, prompts.back() + kSteps, decoder.spec().vocab));
    }
    const auto got = together(decoder, ids, prompts);
    for (size_t s = 0; s < ids.size(); ++s)
      EXPECT_LE(testing::relative_difference(got[s].cpu(),
                                             alone(decoder, ids[s], prompts[s], false).cpu()),
                bound)
          << "sequence " << s << " of " << sequences;
  }
};

TEST_P(BatchOf, GivesEachSequenceItsLogitsOfTheTorchForward) {
  const Decoder decoder = open({});
  for (const int64_t sequences : {2, 3, 17}) compare(decoder, sequences, 4e-6);
}

TEST_P(BatchOf, GivesThemOnAGpuWhereStepsAreReplayed) {
  const auto device = gpu_for_steps();
  if (!device.ok()) GTEST_SKIP() << "needs a GPU: " << device.error().message;
  for (const auto& [dtype, bound] : {std::pair{at::kFloat, 1e-5}, {at::kBFloat16, 6e-2}})
    for (const int64_t sequences : {2, 8, 33}) compare(open({*device, dtype}), sequences, bound);
}

INSTANTIATE_TEST_SUITE_P(Architectures, BatchOf,
                         ::testing::Values("llama2", "llama3", "llama_biased", "mistral", "qwen2",
                                           "qwen3", "opt", "opt_post_norm"),
                         [](const auto& test) { return std::string(test.param); });

/// Prompts of different lengths, all different.
std::vector<std::vector<int32_t>> some_prompts(int64_t count, int64_t vocab) {
  std::vector<std::vector<int32_t>> prompts;
  for (int64_t i = 0; i < count; ++i) prompts.push_back(some_ids(i + 3, 17 + i * 5 % 23, vocab));
  return prompts;
}

void expect_as_alone(const Decoder& decoder, const GenerateOptions& options,
                     const std::vector<int64_t>& eos, int64_t count) {
  const auto prompts = some_prompts(count, decoder.spec().vocab);
  const auto all = must(generate_batch_ids(decoder, prompts, options, eos));
  ASSERT_EQ(all.size(), prompts.size());
  for (size_t i = 0; i < prompts.size(); ++i) {
    const Generation one = must(generate_ids(decoder, prompts[i], options, eos));
    EXPECT_EQ(all[i].token_ids, one.token_ids) << "prompt " << i << " of " << count;
    EXPECT_EQ(all[i].finish_reason, one.finish_reason) << "prompt " << i << " of " << count;
    EXPECT_GT(all[i].ttft_ms, 0);
  }
}

TEST(Batch, AnswersEachPromptAsAlone) {
  const Decoder decoder = testing::open_decoder(testing::demo_model_folder());
  for (const int64_t count : {1, 2, 7}) {
    expect_as_alone(decoder, {.max_new_tokens = 12, .ignore_eos = true}, {}, count);
    expect_as_alone(
        decoder,
        {.max_new_tokens = 9, .temperature = 0.9, .top_k = 40, .ignore_eos = true, .seed = 3}, {},
        count);
  }
  // What the first answer has as its fifth token ends answers, at different places.
  const auto first = must(generate_ids(decoder, some_prompts(1, decoder.spec().vocab).front(),
                                       {.max_new_tokens = 5}, {}));
  expect_as_alone(decoder, {.max_new_tokens = 30}, {first.token_ids.back()}, 6);
}

TEST(Batch, AnswersEachPromptAsAloneOnAGpu) {
  const auto device = gpu_for_steps();
  if (!device.ok()) GTEST_SKIP() << "needs a GPU: " << device.error().message;
  const Decoder decoder = must(Decoder::load(
      must(io::Checkpoint::open(testing::demo_model_folder())), {*device, at::kFloat}));
  for (const int64_t count : {1, 2, 16, 64})
    expect_as_alone(decoder, {.max_new_tokens = 16, .ignore_eos = true}, {}, count);
}

TEST(Batch, StopsAtTheLastPositionOfEachSequence) {
  const Decoder decoder = testing::open_decoder(testing::demo_model_folder());
  const int64_t most = decoder.spec().max_positions;
  const std::vector<std::vector<int32_t>> prompts = {some_ids(1, most - 3, decoder.spec().vocab),
                                                     some_ids(2, 5, decoder.spec().vocab)};
  const GenerateOptions options{.max_new_tokens = 8, .ignore_eos = true};
  const auto all = must(generate_batch_ids(decoder, prompts, options, {}));
  EXPECT_EQ(all[0].token_ids, must(generate_ids(decoder, prompts[0], options, {})).token_ids);
  EXPECT_LT(all[0].token_ids.size(), 8u);
  EXPECT_EQ(all[1].token_ids, must(generate_ids(decoder, prompts[1], options, {})).token_ids);
}

TEST(Batch, RefusesNoPromptsAndTooMany) {
  const Decoder decoder = testing::open_decoder(testing::demo_model_folder());
  for (const size_t count : {size_t{0}, size_t{65}}) {
    const auto refused = generate_batch_ids(decoder, std::vector<std::vector<int32_t>>(count, {1}),
                                            {.max_new_tokens = 1}, {});
    ASSERT_FALSE(refused.ok());
    EXPECT_EQ(refused.error().code, ::lacuna::Code::kUsage);
  }
  const auto empty = generate_batch_ids(decoder, {{1}, {}}, {.max_new_tokens = 1}, {});
  ASSERT_FALSE(empty.ok());
  EXPECT_EQ(empty.error().code, ::lacuna::Code::kBadInput);
}

}  // namespace
}  // namespace lacuna::model
