// Where the tokens of a calibration come from, for every job that calibrates.
#pragma once

#include "lacuna/api/jobs.h"

namespace lacuna::api {

struct CalibrationChoice {
  std::filesystem::path model;  ///< its tokenizer, or the model itself, makes the tokens
  std::filesystem::path ids;    ///< a file of token ids; empty: none is given
  std::string text = "self";    ///< else a file, a data set's name, or the model's own samples
  int64_t samples = 128, length = 2048;
  uint64_t seed = 0;
  ComputeChoice compute;  ///< --device and --threads of sampling
};

/// The source; nothing but given ids is made before its make() is called.
/// @param checkpoint  of the model, alive until then
/// @errors kUsage: impossible sizes; kBadInput: of files
Result<prune::CalibrationSource> calibration_of(const CalibrationChoice& choice,
                                                const io::Checkpoint& checkpoint,
                                                const io::DecoderSpec& spec,
                                                const JobProgress& progress);

}  // namespace lacuna::api
