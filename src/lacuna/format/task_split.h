// Runs of rows or tiles that take equally many bytes.
#pragma once

#include <cstdint>

namespace lacuna::format {

/// First of `count` items for a task, when items are cut into `tasks` runs of equal bytes.
/// @param bytes_before  bytes of the items before one, ascending
template <class BytesBefore>
int64_t first_of_task(int64_t count, int64_t task, int64_t tasks, BytesBefore&& bytes_before) {
  if (task == tasks) return count;
  const double share = static_cast<double>(task) / static_cast<double>(tasks);
  const auto wanted = static_cast<int64_t>(share * static_cast<double>(bytes_before(count)));
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (bytes_before(middle) < wanted) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace lacuna::format
