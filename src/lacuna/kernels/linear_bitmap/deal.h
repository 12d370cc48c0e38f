// Things of unlike sizes, dealt out evenly: rows of a pruned matrix to who multiplies them.
#pragma once

#include <cstdint>
#include <functional>
#include <queue>
#include <utility>
#include <vector>

namespace lacuna::kernels::linear_bitmap {

/// Deals things 0 .. count - 1 in this order (the largest first: so they come out even), each to
/// the bin that has least so far and room for one more.
/// @param room  things that a bin takes: count <= bins room
/// @param size_of  (thing) -> its size, an integer
/// @return the things of each bin, in the order in which they came
template <class SizeOf>
std::vector<std::vector<int>> deal(int count, int bins, int room, const SizeOf& size_of) {
  std::vector<std::vector<int>> dealt(bins);
  using Load = std::pair<std::int64_t, int>;
  std::priority_queue<Load, std::vector<Load>, std::greater<Load>> loads;
  for (int bin = 0; bin < bins; ++bin) loads.push({0, bin});
  for (int thing = 0; thing < count; ++thing) {
    const auto [load, bin] = loads.top();
    loads.pop();
    dealt[bin].push_back(thing);
    if (static_cast<int>(dealt[bin].size()) < room) loads.push({load + size_of(thing), bin});
  }
  return dealt;
}

}  // namespace lacuna::kernels::linear_bitmap
