#include "lacuna/cli/progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace lacuna::cli {
namespace {

bool on_terminal() {
  static const bool terminal = isatty(STDERR_FILENO);
  return terminal;
}

/// What stays the same while a phase runs: its first word ("perplexity 21.7" is still
/// "perplexity").
std::string key(const std::string& phase) { return phase.substr(0, phase.find(' ')); }

std::string duration(double seconds) {
  if (seconds < 100) return fmt::format("{:.0f} s", seconds);
  return fmt::format("{:.0f} min {:.0f} s", std::floor(seconds / 60), std::fmod(seconds, 60));
}

}  // namespace

Progress::~Progress() { clear(); }

void Progress::clear() {
  if (bar_) std::fputs("\r\033[K", stderr);
  bar_ = false;
}

void Progress::log(const std::string& line) {
  clear();
  std::fprintf(stderr, "%s\n", line.c_str());
}

void Progress::step(const std::string& phase, int64_t done, int64_t total) {
  const auto now = std::chrono::steady_clock::now();
  if (key(phase) != key(phase_) || done < first_) {
    start_ = now, first_ = done, last_tenth_ = -1, drawn_ = {};
  }
  phase_ = phase;
  if (total <= 0) return;
  const double seconds = std::chrono::duration<double>(now - start_).count();
  const double rate = seconds > 0 ? static_cast<double>(done - first_) / seconds : 0;
  const std::string rest = rate > 0
                               ? fmt::format(", {:.2f}/s, {} left", rate,
                                             duration(static_cast<double>(total - done) / rate))
                               : "";
  if (on_terminal()) {
    if (done < total && now - drawn_ < std::chrono::milliseconds(100)) return;
    drawn_ = now;
    constexpr int64_t kCells = 28;
    const auto filled = static_cast<size_t>(kCells * done / total);
    std::fprintf(stderr, "\r\033[K%s %s%s %ld/%ld%s", phase.c_str(),
                 std::string(filled, '#').c_str(), std::string(kCells - filled, '.').c_str(),
                 static_cast<long>(done), static_cast<long>(total), rest.c_str());
    bar_ = true;
    if (done >= total) std::fputs("\n", stderr), bar_ = false;
    return;
  }
  const int64_t tenth = 10 * done / total;
  if (tenth == last_tenth_ && now - drawn_ < std::chrono::minutes(1)) return;
  last_tenth_ = tenth;
  drawn_ = now;
  std::fprintf(stderr, "%s: %ld/%ld%s\n", phase.c_str(), static_cast<long>(done),
               static_cast<long>(total), rest.c_str());
}

}  // namespace lacuna::cli
