// Measures the models of a sweep: the dense one once, every other against it.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "lacuna/api/sweep.h"
#include "lacuna/bench/speed_table.h"

namespace lacuna::api {

class SweepJudge {
 public:
  /// The tokens to measure on, none without text. @errors those of reading them; kBadInput: fewer
  /// than one window
  static Result<std::vector<int32_t>> read_text(const SweepJob& job, const io::DecoderSpec& spec);
  /// Loads the dense model and measures it. @param ids  from read_text(). @errors those of the
  /// model
  static Result<SweepJudge> open(const SweepJob& job, std::vector<int32_t> ids,
                                 const JobProgress& progress);
  const SweepMeasure& dense() const { return dense_; }
  const model::Compute& compute() const { return decoder_->compute(); }
  /// @param with_kl  runs the dense model beside it @param what  for the progress
  /// @errors those of loading and of eval::perplexity; kInterrupted
  Result<SweepMeasure> measure(const std::filesystem::path& folder, bool with_kl,
                               const std::string& what) const;

 private:
  Result<SweepMeasure> measure(const model::Decoder& decoder, const model::Decoder* reference,
                               uint64_t bytes, const std::string& what) const;

  const SweepJob* job_ = nullptr;
  const JobProgress* progress_ = nullptr;
  std::optional<model::Decoder> decoder_;
  std::vector<int32_t> ids_;  ///< none: nothing is evaluated
  std::optional<bench::SpeedTable> table_;
  std::string no_table_;  ///< why there is none
  SweepMeasure dense_;
};

}  // namespace lacuna::api
