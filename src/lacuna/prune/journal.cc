#include "lacuna/prune/journal.h"

#include <fmt/ranges.h>

#include <set>

#include "lacuna/io/file.h"

namespace lacuna::prune {
namespace fs = std::filesystem;
namespace {

constexpr const char* kNotes = "notes";  // key of a block's notes in the safetensors metadata

/// "model, pattern": the keys in which two runs differ.
std::string differences(const nlohmann::json& a, const nlohmann::json& b) {
  std::set<std::string> keys;
  for (const auto* run : {&a, &b})
    for (const auto& [key, value] : run->items())
      if (a.value(key, nlohmann::json()) != b.value(key, nlohmann::json())) keys.insert(key);
  return fmt::format("{}", fmt::join(keys, ", "));
}

}  // namespace

Result<Journal> Journal::open(const fs::path& out, const nlohmann::json& run, bool resume) {
  Journal journal;
  journal.folder_ = out;
  journal.folder_ += ".journal";
  const fs::path about = journal.folder_ / "journal.json";
  std::error_code failure;
  if (resume && fs::exists(about, failure)) {
    LACUNA_TRY(const std::string text, io::read_text(about));
    const auto before = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
    if (!before.is_object())
      return bad_input("{}: is not a JSON object (need one). Start without --resume.",
                       about.string());
    if (before != run)
      return bad_input(
          "{}: belongs to another run (different: {}). Start without --resume, or give the options "
          "of that run.",
          about.string(), differences(run, before));
    journal.resumed_ = true;
    while (fs::exists(journal.file_of(journal.finished_), failure)) ++journal.finished_;
    return journal;
  }
  fs::remove_all(journal.folder_, failure);
  if (!failure) fs::create_directories(journal.folder_, failure);
  if (failure)
    return check_failed("{}: can't be written ({}).", journal.folder_.string(), failure.message());
  LACUNA_CHECK(io::write_text(about, run.dump(2) + "\n"));
  return journal;
}

fs::path Journal::file_of(int64_t block) const {
  return folder_ / fmt::format("block-{:03}.safetensors", block);
}

Status Journal::write(int64_t block, const Block& content) {
  LACUNA_CHECK(
      io::write_safetensors(file_of(block), content.tensors, {{kNotes, content.notes.dump()}}));
  finished_ = std::max(finished_, block + 1);
  return {};
}

Result<Journal::Block> Journal::read(int64_t block) const {
  LACUNA_TRY(const auto file, io::SafetensorsFile::open(file_of(block)));
  Block content;
  const auto notes = file.metadata().find(kNotes);
  if (notes != file.metadata().end())
    content.notes = nlohmann::json::parse(notes->second, nullptr, /*allow_exceptions=*/false);
  if (!content.notes.is_object())
    return bad_input("{}: has no readable notes. Start without --resume.", file.path());
  for (const auto& entry : file.entries()) {
    LACUNA_TRY(Tensor tensor, file.tensor(entry.name));
    content.tensors.push_back({entry.name, std::move(tensor)});
  }
  return content;
}

Status Journal::remove() const {
  std::error_code failure;
  fs::remove_all(folder_, failure);
  if (failure)
    return check_failed("{}: can't be removed ({}).", folder_.string(), failure.message());
  return {};
}

}  // namespace lacuna::prune
