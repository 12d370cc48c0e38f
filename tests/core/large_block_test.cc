#include "lacuna/core/large_block.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

namespace lacuna {
namespace {

bool all(const LargeBlock& block, uint8_t value) {
  return std::all_of(block.data(), block.data() + block.size(),
                     [&](uint8_t byte) { return byte == value; });
}

TEST(LargeBlock, IsZeroAlignedAndItsOwn) {
  std::vector<LargeBlock> blocks;
  uint8_t value = 0;
  for (const size_t size : {size_t{1}, size_t{63}, size_t{4096}, size_t{300'001}, size_t{3'000'000},
                            size_t{61} << 20, size_t{5'000'001}, size_t{70} << 20}) {
    LargeBlock block(size);
    ASSERT_EQ(block.size(), size);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(block.data()) % 64, 0u) << size;
    ASSERT_TRUE(all(block, 0)) << size;
    std::fill(block.data(), block.data() + size, ++value);
    blocks.push_back(std::move(block));
  }
  for (size_t i = 0; i < blocks.size(); ++i)
    EXPECT_TRUE(all(blocks[i], static_cast<uint8_t>(i + 1))) << blocks[i].size();
}

TEST(LargeBlock, LeavesItsNeighboursAloneWhenItGoes) {
  std::vector<LargeBlock> blocks(9);
  for (LargeBlock& block : blocks) {
    block = LargeBlock(1'000'001);
    std::fill(block.data(), block.data() + block.size(), uint8_t{7});
  }
  for (size_t i = 0; i < blocks.size(); i += 2) blocks[i] = LargeBlock();
  for (size_t i = 1; i < blocks.size(); i += 2) EXPECT_TRUE(all(blocks[i], 7)) << i;
  for (int again = 0; again < 200; ++again) {  // more than a region holds
    LargeBlock block(1'000'001);
    ASSERT_TRUE(all(block, 0)) << again;
    std::fill(block.data(), block.data() + block.size(), uint8_t{9});
  }
}

TEST(LargeBlock, OfNothingIsNothing) {
  EXPECT_EQ(LargeBlock(0).data(), nullptr);
  EXPECT_EQ(LargeBlock().size(), 0u);
}

}  // namespace
}  // namespace lacuna
