// What a run tells while it goes on, and how it is stopped.
#pragma once

#include "lacuna/prune/pipeline.h"

namespace lacuna::prune {

/// Counts one pass after the other and stops the run when the user asks for it.
class Progress {
 public:
  /// @param told  outlives this
  Progress(const PruneProgress& told, std::filesystem::path out)
      : told_(told), out_(std::move(out)) {}

  bool statistics_kept = false;  ///< on disk, whatever becomes of the run
  bool blocks_kept = false;      ///< there is a journal

  void log(const std::string& line) const {
    if (told_.log) told_.log(line);
  }
  /// A pass of so many steps (passes.h) begins.
  void begin(int64_t total) { done_ = 0, total_ = total; }
  /// @errors kInterrupted
  Status step(int64_t count, const std::string& what) {
    done_ += count;
    if (told_.step) told_.step(done_, total_, what);
    if (told_.interrupted == nullptr || !told_.interrupted->load()) return {};
    return interrupted(blocks_kept);
  }
  /// step() as whoever counts samples calls it.
  std::function<Status(int64_t samples)> counter(const std::string& what) {
    return [this, what](int64_t samples) { return step(samples, what); };
  }
  /// What an interrupt leaves. @param blocks  some may be finished
  Error interrupted(bool blocks) const {
    const char* kept =
        blocks ? "interrupted; finished blocks are kept. Go on with the same command and --resume."
        : statistics_kept
            ? "interrupted before a block was finished; the statistics are kept. Go on with the "
              "same command and --resume."
            : "interrupted before a block was finished; nothing is kept.";
    return {Code::kInterrupted, fmt::format("{}: {}", out_.string(), kept)};
  }

 private:
  const PruneProgress& told_;
  const std::filesystem::path out_;
  int64_t done_ = 0, total_ = 0;
};

}  // namespace lacuna::prune
