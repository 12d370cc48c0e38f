// What the validators of format/ share: a list of violations, and the checks that more than one
// layout needs.
#pragma once

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "lacuna/core/executor.h"
#include "lacuna/format/compact.h"
#include "lacuna/format/element.h"

namespace lacuna::format {

/// Collects violations up to a limit.
class Faults {
 public:
  explicit Faults(size_t limit) : limit_(limit) {}
  bool full() const { return found_.size() >= limit_; }
  bool none() const { return found_.empty(); }
  void add(int64_t row, int64_t column, std::string what) {
    if (!full()) found_.push_back({row, column, std::move(what)});
  }
  bool size(const char* part, size_t got, int64_t need) {
    if (need >= 0 && got == static_cast<size_t>(need)) return true;
    add(-1, -1, fmt::format("{} holds {} bytes (need {})", part, got, need));
    return false;
  }
  /// Extents and value type that every matrix of ours may have.
  bool header(int64_t rows, int64_t columns, DType values) {
    if (rows < 0 || columns < 0 || rows > kLargestExtent || columns > kLargestExtent)
      add(-1, -1, fmt::format("shape {} (need extents of 0..2^31-1)", shape_text({rows, columns})));
    else if (!storable(values))
      add(-1, -1,
          fmt::format("values of {} (need float32, bfloat16 or float16)", long_name(values)));
    else
      return true;
    return false;
  }
  /// Offsets i64 [ceil(rows/height)+1] of the right size: from 0, never falling, to `count`.
  /// @param name  of one of them
  bool offsets(const char* name, const Bytes& offsets, int64_t rows, int64_t height,
               int64_t count) {
    const int64_t last = ceil_div(rows, height);
    int64_t before = 0;
    for (int64_t i = 0; i <= last; ++i) {
      const auto offset = read_unaligned<int64_t>(offsets.as<int64_t>() + i);
      if (offset < before || offset > count || (i == 0 && offset != 0) ||
          (i == last && offset != count)) {
        add(std::min(i * height, rows), 0,
            fmt::format("{} {} is {} (need {}..{}, ending at {})", name, i, offset, before, count,
                        count));
        return false;
      }
      before = offset;
    }
    return true;
  }
  std::vector<Violation> take() { return std::move(found_); }

  /// Calls check(first, last, faults) for runs of kRowGroup rows, on all threads. What they find
  /// comes in the order of the rows.
  template <class Check>
  void check_rows(int64_t rows, const Executor& executor, const Check& check) {
    if (full()) return;
    std::mutex mutex;
    std::map<int64_t, Faults> found;                        // of the runs that break a rule
    std::atomic<int64_t> runs = ceil_div(rows, kRowGroup);  // up to the first that alone fills all
    executor.parallel_for(runs, [&](int64_t run) {
      if (run >= runs) return;
      Faults faults(limit_);
      check(run * kRowGroup, std::min((run + 1) * kRowGroup, rows), faults);
      if (faults.none()) return;
      const std::lock_guard lock(mutex);
      if (faults.full()) runs = std::min<int64_t>(runs, run + 1);
      found.emplace(run, std::move(faults));
    });
    for (auto& [run, faults] : found)
      for (Violation& fault : faults.found_)
        if (!full()) found_.push_back(std::move(fault));
  }

 private:
  size_t limit_;
  std::vector<Violation> found_;
};

}  // namespace lacuna::format
