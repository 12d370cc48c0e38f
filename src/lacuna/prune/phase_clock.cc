#include "lacuna/prune/phase_clock.h"

#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <algorithm>

namespace lacuna::prune {

PhaseClock::Mark PhaseClock::mark(const char* phase) const {
  Mark mark{phase, Clock::now(), {}};
  if (!device_.is_cpu()) {
    mark.device.emplace(device_.type(), c10::EventFlag::BACKEND_DEFAULT);
    mark.device->record(c10::impl::getDeviceGuardImpl(device_.type())->getStream(device_));
  }
  return mark;
}

void PhaseClock::enter(const char* phase) {
  constexpr size_t kMostMarks = 4096;
  if (marks_.size() >= kMostMarks) settle();
  marks_.push_back(mark(phase));
}

void PhaseClock::settle() {
  if (marks_.empty()) return;
  marks_.push_back(mark(marks_.back().phase));
  if (!device_.is_cpu()) marks_.back().device->synchronize();
  for (size_t i = 0; i + 1 < marks_.size(); ++i) count(marks_[i], marks_[i + 1]);
  marks_.erase(marks_.begin(), marks_.end() - 1);
}

void PhaseClock::count(const Mark& from, const Mark& to) {
  const double spent = device_.is_cpu() ? std::chrono::duration<double>(to.host - from.host).count()
                                        : from.device->elapsedTime(*to.device) / 1000;
  const auto found = std::find_if(seconds_.begin(), seconds_.end(),
                                  [&](const auto& entry) { return entry.first == from.phase; });
  if (found == seconds_.end())
    seconds_.emplace_back(from.phase, spent);
  else
    found->second += spent;
}

}  // namespace lacuna::prune
