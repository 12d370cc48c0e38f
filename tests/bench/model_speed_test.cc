#include "lacuna/bench/model_speed.h"

#include <gmock/gmock.h>

#include "model/models.h"
#include "support/data.h"

namespace lacuna::bench {
namespace {
using ::testing::HasSubstr;
using testing::must;

TEST(ModelSpeed, timesModelsInTurns) {
  const auto decoder = testing::open_decoder(testing::demo_model_folder());
  const ModelSpeedOptions options{.prompt = 20, .tokens = 5, .repetitions = 3, .profile = true};
  int64_t steps = 0;
  const auto speeds =
      must(time_models({&decoder, &decoder}, options, [&](int64_t, int64_t) { ++steps; }));
  ASSERT_EQ(speeds.size(), 2u);
  EXPECT_EQ(steps, 4);
  for (const ModelSpeed& speed : speeds) {
    EXPECT_EQ(speed.prefill_samples_ms.size(), 3u);
    EXPECT_EQ(speed.decode_samples_ms.size(), 3u);
    EXPECT_DOUBLE_EQ(speed.prefill_tokens_per_second, 20 * 1000 / speed.prefill_ms.median);
    EXPECT_DOUBLE_EQ(speed.decode_tokens_per_second, 1000 / speed.decode_ms.median);
    EXPECT_EQ(speed.weight_bytes, decoder.weight_bytes());
    for (const double share : {speed.prefill_linear_share, speed.decode_linear_share}) {
      EXPECT_GT(share, 0);
      EXPECT_LT(share, 1);
    }
  }
  EXPECT_LT(must(time_models({&decoder}, {.prompt = 4, .tokens = 1, .repetitions = 1}))
                .front()
                .decode_linear_share,
            0)
      << "nothing is counted unless asked for";
}

TEST(ModelSpeed, refusesMoreThanThePositions) {
  const auto decoder = testing::open_decoder(testing::demo_model_folder());
  const auto wrong = time_models({&decoder}, {.prompt = decoder.spec().max_positions});
  ASSERT_FALSE(wrong.ok());
  EXPECT_EQ(wrong.error().code, Code::kUsage);
  EXPECT_THAT(wrong.error().message, HasSubstr("positions"));
}

TEST(ModelSpeed, takesTurnsInAnOrderFromOutside) {
  const auto decoder = testing::open_decoder(testing::demo_model_folder());
  const std::vector<size_t> order = {1, 0, 1, 1};
  size_t next = 0;
  std::vector<size_t> done;
  std::vector<double> second;
  const ModelTurns turns = {
      .next = [&] { return next < order.size() ? std::optional(order[next++]) : std::nullopt; },
      .done =
          [&](size_t model, const ModelTurn& turn) {
            done.push_back(model);
            if (model == 1) second.push_back(turn.decode_ms);
          }};
  const auto speeds =
      must(time_models_by_turns({&decoder, &decoder, &decoder}, {.prompt = 3, .tokens = 2}, turns));
  EXPECT_EQ(done, order);
  EXPECT_EQ(speeds[0].decode_samples_ms.size(), 1u);
  EXPECT_EQ(speeds[1].decode_samples_ms, second);
  EXPECT_TRUE(speeds[2].decode_samples_ms.empty()) << "it had no turn";
  EXPECT_EQ(speeds[2].decode_tokens_per_second, 0);

  next = 0;
  const auto wrong = time_models_by_turns({&decoder}, {.prompt = 3, .tokens = 2}, turns);
  ASSERT_FALSE(wrong.ok());
  EXPECT_EQ(wrong.error().code, Code::kUsage);
}

TEST(LinearClock, countsOnlyWhileItIsSet) {
  const auto linear = model::Linear::dense(at::ones({8, 8}), {});
  model::LinearClock clock;
  model::set_linear_clock(&clock);
  linear.forward(at::ones({1, 8}));
  linear.forward(at::ones({40, 8}));
  model::set_linear_clock(nullptr);
  linear.forward(at::ones({1, 8}));
  EXPECT_EQ(clock.calls, 2);
  EXPECT_GT(clock.nanoseconds, 0);
}

}  // namespace
}  // namespace lacuna::bench
