// Time on a GPU, by its own events.
#pragma once

#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace lacuna::model {

/// Times what is put onto torch's current stream of a GPU between start() and stop_us(), which
/// waits for it.
class GpuClock {
 public:
  explicit GpuClock(at::Device device)
      : guard_(device.type()),
        device_(device),
        begin_(device.type(), c10::EventFlag::BACKEND_DEFAULT),
        end_(device.type(), c10::EventFlag::BACKEND_DEFAULT) {}
  void start() { begin_.record(guard_.getStream(device_)); }
  double stop_us() {
    end_.record(guard_.getStream(device_));
    end_.synchronize();
    return begin_.elapsedTime(end_) * 1e3;
  }

 private:
  c10::impl::VirtualGuardImpl guard_;
  at::Device device_;
  c10::Event begin_, end_;
};

}  // namespace lacuna::model
