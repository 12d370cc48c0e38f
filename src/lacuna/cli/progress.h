// How far a job is, on stderr.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace lacuna::cli {

/// A bar with rate and time left on a terminal; elsewhere a plain line at every tenth of the way
/// and every minute.
class Progress {
 public:
  ~Progress();
  void step(const std::string& phase, int64_t done, int64_t total);
  void log(const std::string& line);

 private:
  void clear();
  std::string phase_;
  std::chrono::steady_clock::time_point start_{}, drawn_{};
  int64_t first_ = 0, last_tenth_ = -1;
  bool bar_ = false;
};

}  // namespace lacuna::cli
