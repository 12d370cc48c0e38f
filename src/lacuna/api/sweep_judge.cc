#include "lacuna/api/sweep_judge.h"

#include "lacuna/api/predict.h"
#include "lacuna/io/text_source.h"
#include "lacuna/io/tokenizer/tokenizer.h"

namespace lacuna::api {
namespace fs = std::filesystem;

Result<std::vector<int32_t>> SweepJudge::read_text(const SweepJob& job,
                                                   const io::DecoderSpec& spec) {
  if (job.text.empty()) return std::vector<int32_t>();
  LACUNA_TRY(const fs::path text, io::find_dataset(job.text, io::Split::kTest));
  LACUNA_TRY(const auto tokenizer, io::Tokenizer::open(job.model));
  LACUNA_TRY(auto ids, eval::evaluation_ids(text.string(), job.evaluation.protocol, *tokenizer));
  LACUNA_CHECK(eval::check_evaluation(spec, ids, job.evaluation));
  return ids;
}

Result<SweepJudge> SweepJudge::open(const SweepJob& job, std::vector<int32_t> ids,
                                    const JobProgress& progress) {
  SweepJudge judge;
  judge.job_ = &job;
  judge.progress_ = &progress;
  judge.ids_ = std::move(ids);
  LACUNA_TRY(judge.decoder_, load_decoder(job.model, job.choice));
  if (auto table = bench::SpeedTable::here(); table.ok())
    judge.table_ = std::move(table).value();
  else
    judge.no_table_ = table.error().message;
  LACUNA_TRY(const auto checkpoint, io::Checkpoint::open(job.model));
  LACUNA_TRY(judge.dense_,
             judge.measure(*judge.decoder_, nullptr, checkpoint.total_bytes(), "dense"));
  return judge;
}

Result<SweepMeasure> SweepJudge::measure(const fs::path& folder, bool with_kl,
                                         const std::string& what) const {
  LACUNA_TRY(const auto checkpoint, io::Checkpoint::open(folder));
  LACUNA_TRY(const auto decoder, model::Decoder::load(checkpoint, compute()));
  return measure(decoder, with_kl ? &*decoder_ : nullptr, checkpoint.total_bytes(), what);
}

Result<SweepMeasure> SweepJudge::measure(const model::Decoder& decoder,
                                         const model::Decoder* reference, uint64_t bytes,
                                         const std::string& what) const {
  if (progress_->interrupted != nullptr && progress_->interrupted->load())
    return Error{Code::kInterrupted, "interrupted."};
  SweepMeasure measure{.bytes = bytes};
  if (!table_) {
    measure.no_milliseconds = no_table_;
  } else if (const auto time = predicted_milliseconds(decoder, *table_); time.ok()) {
    measure.milliseconds = *time;
  } else {
    measure.no_milliseconds = time.error().message;
  }
  if (ids_.empty()) return measure;
  const auto step = [&](int64_t done, int64_t total, double so_far) {
    if (progress_->step)
      progress_->step(fmt::format("{}: perplexity {:.3f}", what, so_far), done, total);
  };
  LACUNA_TRY(const auto report, eval::perplexity(decoder, ids_, job_->evaluation, reference, step,
                                                 progress_->interrupted));
  measure.perplexity = report.perplexity;
  if (report.kl) measure.kl = report.kl->kl_mean;
  return measure;
}

}  // namespace lacuna::api
