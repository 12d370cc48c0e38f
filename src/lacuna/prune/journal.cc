#include "lacuna/prune/journal.h"

#include <fmt/ranges.h>

#include <set>

#include "lacuna/io/compact_store.h"
#include "lacuna/io/file.h"
#include "lacuna/io/json.h"
#include "lacuna/io/noted_file.h"

namespace lacuna::prune {
namespace fs = std::filesystem;
namespace {

constexpr const char* kAbout = "journal.json";
constexpr const char* kRun = "run";      // key of what decides the result, in journal.json
constexpr const char* kCoded = "coded";  // key of what declares a block's codes, in its notes
// keys of what lies beside a block's tensors
constexpr const char* kBlock = "block";
constexpr const char* kNotes = "notes";

/// "model, pattern": the keys in which two runs differ.
std::string differences(const nlohmann::json& a, const nlohmann::json& b) {
  std::set<std::string> keys;
  for (const auto* run : {&a, &b})
    for (const auto& [key, value] : run->items())
      if (a.value(key, nlohmann::json()) != b.value(key, nlohmann::json())) keys.insert(key);
  return fmt::format("{}", fmt::join(keys, ", "));
}

/// What a folder is, as far as a journal may be put in its place.
struct Found {
  std::vector<fs::path> files;  ///< ours, all of them
  nlohmann::json run;           ///< null: no run began there
  bool blocks = false;          ///< some are finished
};

bool is_block_file(std::string_view name) {
  return name.starts_with("block-") && name.ends_with(".safetensors");
}

/// Looks at what lies there. @errors kBadInput: anything that is not a journal of ours
Result<Found> look_at(const fs::path& folder) {
  const auto refuse = [&](const std::string& why) {
    return bad_input(
        "{}: {} (need a journal of this tool, or nothing). Move it away, or choose another OUT.",
        folder.string(), why);
  };
  Found found;
  std::error_code failure;
  const auto kind = fs::symlink_status(folder, failure).type();
  if (kind == fs::file_type::not_found) return found;
  if (kind != fs::file_type::directory) return refuse("exists and is not a folder");
  for (fs::directory_iterator entry(folder, failure), end; !failure && entry != end;
       entry.increment(failure)) {
    std::string name = entry->path().filename().string();
    // A kill leaves the beginning of a file under its temporary name.
    if (const std::string partial = ".partial"; name.ends_with(partial))
      name.resize(name.size() - partial.size());
    else
      found.blocks = found.blocks || is_block_file(name);
    if (name != kAbout && !is_block_file(name))
      return refuse(fmt::format("holds {}, which is no part of a journal",
                                entry->path().filename().string()));
    found.files.push_back(entry->path());
  }
  if (failure) return check_failed("{}: can't be read ({}).", folder.string(), failure.message());
  if (!fs::exists(folder / kAbout, failure)) {
    if (found.blocks) return refuse(fmt::format("has no {}", kAbout));
    return found;
  }
  LACUNA_TRY(const std::string text, io::read_text(folder / kAbout));
  const auto about = io::parse_json_object(text, kAbout);
  if (!about.ok() || !about->contains(kRun) || !(*about)[kRun].is_object())
    return refuse(fmt::format("its {} was not written by this tool", kAbout));
  found.run = (*about)[kRun];
  return found;
}

/// Removes a journal file by file: what is not ours stays, and the folder with it.
Status remove_journal(const fs::path& folder) {
  LACUNA_TRY(const Found found, look_at(folder));
  std::error_code failure;
  for (const fs::path& file : found.files)
    if (!failure && file.filename() != kAbout) fs::remove(file, failure);
  // Last, so that a kill on the way leaves what is still a journal.
  if (!failure) fs::remove(folder / kAbout, failure);
  if (!failure) fs::remove(folder, failure);
  if (failure)
    return check_failed("{}: can't be removed ({}).", folder.string(), failure.message());
  return {};
}

fs::path journal_of(fs::path out) {
  out += ".journal";
  return out;
}

}  // namespace

Status Journal::Block::add(const std::string& name, const format::CompactMatrix& coded) {
  nlohmann::json& declared = notes[kCoded];
  io::SparseDeclarations all;
  if (!declared.is_null()) {
    LACUNA_TRY(all, io::read_declarations(declared, kCoded));
  }
  all[name] = io::declaration_of(coded);
  io::write_declarations(all, declared);
  LACUNA_TRY(const auto parts, io::compact_parts(name, coded));
  tensors.insert(tensors.end(), parts.begin(), parts.end());
  return {};
}

Result<std::map<std::string, format::CompactMatrix>> Journal::Block::coded() const {
  std::map<std::string, format::CompactMatrix> matrices;
  if (!notes.contains(kCoded)) return matrices;
  LACUNA_TRY(const auto declarations, io::read_declarations(notes[kCoded], kCoded));
  io::StoredTensors stored;
  for (const auto& [name, tensor] : tensors) stored[name] = {tensor, "the journal"};
  for (const auto& [name, declaration] : declarations) {
    LACUNA_TRY(matrices[name], io::read_compact(name, declaration, stored));
  }
  return matrices;
}

bool Journal::exists(const fs::path& out) {
  std::error_code failure;
  return fs::exists(journal_of(out), failure);
}

Status Journal::check(const fs::path& out, bool resume) {
  const fs::path folder = journal_of(out);
  LACUNA_TRY(const Found found, look_at(folder));
  if (found.blocks && !resume)
    return bad_input(
        "{}: holds finished blocks of an earlier run. Go on with it by --resume, or remove the "
        "folder to start afresh.",
        folder.string());
  return {};
}

Result<Journal> Journal::open(const fs::path& out, const nlohmann::json& run, bool resume) {
  LACUNA_CHECK(check(out, resume));
  Journal journal;
  journal.folder_ = journal_of(out);
  LACUNA_TRY(const Found found, look_at(journal.folder_));
  std::error_code failure;
  if (resume && !found.run.is_null()) {
    if (found.run != run)
      return bad_input(
          "{}: belongs to another run (different: {}). Give the options of that run, or remove the "
          "folder to start afresh.",
          journal.folder_.string(), differences(run, found.run));
    journal.resumed_ = true;
    while (fs::exists(journal.file_of(journal.finished_), failure)) ++journal.finished_;
    return journal;
  }
  LACUNA_CHECK(remove_journal(journal.folder_));
  fs::create_directories(journal.folder_, failure);
  if (failure)
    return check_failed("{}: can't be written ({}).", journal.folder_.string(), failure.message());
  const nlohmann::json about = {{"tool", "lacuna prune"}, {kRun, run}};
  LACUNA_CHECK(io::write_text(journal.folder_ / kAbout, about.dump(2) + "\n"));
  return journal;
}

fs::path Journal::file_of(int64_t block) const {
  return folder_ / fmt::format("block-{:03}.safetensors", block);
}

Status Journal::write(int64_t block, const Block& content) {
  const nlohmann::json notes = {{kBlock, block}, {kNotes, content.notes}};
  LACUNA_CHECK(io::write_noted(file_of(block), content.tensors, notes));
  finished_ = std::max(finished_, block + 1);
  return {};
}

Result<Journal::Block> Journal::read(int64_t block) const {
  const std::string remedy =
      "Remove the file and go on by --resume: this block and those after it are pruned again.";
  LACUNA_TRY(auto file, io::read_noted(file_of(block), remedy));
  if (file.notes.value(kBlock, int64_t{-1}) != block || !file.notes.contains(kNotes))
    return bad_input("{}: belongs to another block. {}", file_of(block).string(), remedy);
  return Block{std::move(file.tensors), std::move(file.notes[kNotes])};
}

Status Journal::remove() const { return remove_journal(folder_); }

}  // namespace lacuna::prune
