#include "lacuna/prune/activations.h"

#include <gtest/gtest.h>

#include "lacuna/core/random.h"
#include "support/data.h"

namespace lacuna::prune {
namespace {
namespace fs = std::filesystem;

/// Its first Linears read the states themselves.
fs::path post_norm_model() {
  return lacuna::testing::source_folder() / "tests/golden/tiny_models/opt_post_norm";
}

bool lies_within(const at::Tensor& part, const at::Tensor& whole) {
  const auto* const first = static_cast<const char*>(whole.data_ptr());
  const auto* const at = static_cast<const char*>(part.data_ptr());
  return at >= first && at < first + whole.nbytes();
}

TEST(Activations, InAFileAreTheSameAndNothingElseHoldsOnToIt) {
  const auto checkpoint = io::Checkpoint::open(post_norm_model());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.error().message;
  const auto spec = model::spec_of(*checkpoint);
  const PruneOptions options;
  Calibration calibration{"random", {}};
  for (uint64_t sample = 0; sample < 40; ++sample) {
    calibration.ids.emplace_back();
    for (uint64_t i = 0; i < 32; ++i)
      calibration.ids.back().push_back(
          static_cast<int32_t>(random_bits(1, sample, i) % static_cast<uint64_t>(spec->vocab)));
  }
  const fs::path folder = lacuna::testing::scratch_folder("activations");
  auto in_file = Activations::embed(*checkpoint, *spec, calibration, options, folder);
  if (!in_file.ok() && in_file.error().code == Code::kNotPossible)
    GTEST_SKIP() << in_file.error().message;
  ASSERT_TRUE(in_file.ok()) << in_file.error().message;
  auto in_memory = Activations::embed(*checkpoint, *spec, calibration, options, {});
  ASSERT_TRUE(in_memory.ok());
  EXPECT_TRUE(at::equal(in_file->hidden(), in_memory->hidden()));
  const auto block = model::Block::load(*checkpoint, *spec, 0, options.compute);
  ASSERT_TRUE(block.ok()) << block.error().message;
  for (const bool replace : {false, true}) {
    std::vector<std::vector<at::Tensor>> seen(static_cast<size_t>(in_file->at_once()));
    const auto observe = [&](int64_t place) -> model::LinearObserver {
      auto& mine = seen[static_cast<size_t>(place)];
      return [&mine](std::string_view, const at::Tensor& input) { mine.push_back(input); };
    };
    const auto go_on = [](int64_t) { return Status(); };
    ASSERT_TRUE(in_file->run(*block, replace, observe, go_on).ok());
    for (const auto& inputs : seen)
      for (const at::Tensor& input : inputs)
        EXPECT_FALSE(lies_within(input, in_file->hidden())) << replace;
    const auto nobody = [](int64_t) { return model::LinearObserver([](auto, const auto&) {}); };
    ASSERT_TRUE(in_memory->run(*block, replace, nobody, go_on).ok());
    EXPECT_TRUE(at::equal(in_file->hidden(), in_memory->hidden())) << replace;
  }
  EXPECT_TRUE(at::equal(in_file->copy().hidden(), in_memory->hidden()));
}

}  // namespace
}  // namespace lacuna::prune
