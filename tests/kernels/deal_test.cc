#include "lacuna/kernels/linear_bitmap/deal.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>

namespace lacuna::kernels::linear_bitmap {
namespace {

TEST(Deal, gives_each_to_the_bin_that_has_least) {
  const std::vector<int> sizes = {9, 7, 5, 4, 3, 1};
  const auto dealt = deal(6, 2, 6, [&](int i) { return sizes[i]; });
  EXPECT_EQ(dealt, (std::vector<std::vector<int>>{{0, 3, 5}, {1, 2, 4}}));
}

TEST(Deal, fills_no_bin_beyond_its_room) {
  const auto dealt = deal(7, 4, 2, [](int i) { return i == 0 ? 100 : 1; });
  std::vector<int> all;
  for (const auto& bin : dealt) {
    EXPECT_LE(bin.size(), 2u);
    all.insert(all.end(), bin.begin(), bin.end());
  }
  std::sort(all.begin(), all.end());
  std::vector<int> each(7);
  std::iota(each.begin(), each.end(), 0);
  EXPECT_EQ(all, each);
}

TEST(Deal, makes_unlike_sizes_even) {
  std::mt19937 random(1);
  std::vector<int> sizes(1024);
  for (int& size : sizes) size = static_cast<int>(random() % 100 < 10 ? random() % 900 : 100);
  std::sort(sizes.rbegin(), sizes.rend());
  std::vector<std::int64_t> loads;
  for (const auto& bin : deal(1024, 256, 4, [&](int i) { return sizes[i]; })) {
    loads.push_back(0);
    for (const int i : bin) loads.back() += sizes[i];
  }
  const double mean = std::accumulate(sizes.begin(), sizes.end(), 0.0) / 256;
  EXPECT_LE(static_cast<double>(*std::max_element(loads.begin(), loads.end())), 2.2 * mean);
  // As they lie, the four largest are side by side.
  EXPECT_GT(sizes[0] + sizes[1] + sizes[2] + sizes[3], 5 * mean);
}

}  // namespace
}  // namespace lacuna::kernels::linear_bitmap
