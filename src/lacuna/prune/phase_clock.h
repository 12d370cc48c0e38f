// Where the time of a long run goes.
#pragma once

#include <ATen/core/ATen_fwd.h>
#include <c10/core/Device.h>
#include <c10/core/Event.h>

#include <chrono>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace lacuna::prune {

/// One phase at a time: whatever happens counts as the phase that was entered last, so that the
/// phases' seconds add up to the whole. On a GPU the marks lie on its stream (events): a phase gets
/// what its work takes there, and where the GPU waits for the host the phase that kept it waiting;
/// nothing waits for a mark.
class PhaseClock {
 public:
  /// Counts nothing before the first enter().
  explicit PhaseClock(at::Device device) : device_(device) {}
  /// @param phase  a literal
  void enter(const char* phase);
  /// Counts all up to now; waits for the GPU. The phase goes on.
  void settle();
  /// Seconds of every phase up to the last settle(), in the order in which they were first entered.
  const std::vector<std::pair<std::string, double>>& seconds() const { return seconds_; }

 private:
  using Clock = std::chrono::steady_clock;
  struct Mark {
    const char* phase;
    Clock::time_point host;
    std::optional<c10::Event> device;  // on a GPU
  };
  Mark mark(const char* phase) const;
  void count(const Mark& from, const Mark& to);

  at::Device device_;
  std::vector<Mark> marks_;  // since the last settle()
  std::vector<std::pair<std::string, double>> seconds_;
};

}  // namespace lacuna::prune
