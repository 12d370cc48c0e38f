#include "lacuna/api/calibration.h"

#include "lacuna/io/text_source.h"

namespace lacuna::api {
namespace fs = std::filesystem;

Result<prune::CalibrationSource> calibration_of(const CalibrationChoice& choice,
                                                const io::Checkpoint& checkpoint,
                                                const io::DecoderSpec& spec,
                                                const JobProgress& progress) {
  if (!choice.ids.empty()) {
    LACUNA_TRY(auto ids, prune::calibration_from_ids(choice.ids, spec.vocab));
    const int64_t samples = ids.samples(), length = ids.length();
    return prune::CalibrationSource{
        samples, length, std::nullopt,
        [ids = std::move(ids)]() -> Result<prune::Calibration> { return ids; }};
  }
  LACUNA_CHECK(prune::check_sizes(choice.samples, choice.length));
  prune::CalibrationSource source{choice.samples, choice.length, std::nullopt, {}};
  if (choice.text != "self") {
    LACUNA_TRY(const fs::path file, io::find_dataset(choice.text, io::Split::kTrain));
    LACUNA_TRY(const auto tokenizer, io::Tokenizer::open(choice.model));
    source.make = [choice, file, tokenizer] {
      return prune::calibration_from_text(file, *tokenizer, choice.samples, choice.length,
                                          choice.seed);
    };
    return source;
  }
  // In the model's own type where that is fast: what it writes is text, not a measurement.
  LACUNA_TRY(
      source.self,
      resolve({.device = choice.compute.device, .threads = choice.compute.threads}, spec.dtype));
  source.make = [choice, &checkpoint, progress,
                 compute = *source.self]() -> Result<prune::Calibration> {
    if (progress.log)
      progress.log(fmt::format("sampling {} x {} calibration tokens from the model itself",
                               choice.samples, choice.length));
    LACUNA_TRY(const auto decoder, model::Decoder::load(checkpoint, compute));
    return prune::calibration_from_model(
        decoder, choice.samples, choice.length, choice.seed,
        [&](int64_t done, int64_t total) {
          if (progress.step) progress.step("calibration", done, total);
        },
        progress.interrupted);
  };
  return source;
}

}  // namespace lacuna::api
