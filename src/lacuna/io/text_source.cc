#include "lacuna/io/text_source.h"

#include <cstdlib>
#include <nlohmann/json.hpp>

#include "lacuna/io/file.h"
#include "lacuna/io/json.h"
#include "lacuna/io/lines.h"

namespace lacuna::io {
namespace fs = std::filesystem;
using nlohmann::json;

namespace {

bool is_blank(std::string_view text) { return text.find_first_not_of(" \t\r\n") == text.npos; }

Result<std::vector<std::string>> read_json_lines(const fs::path& path, std::string_view text) {
  std::vector<std::string> documents;
  LACUNA_CHECK(for_each_line(text, [&](size_t number, std::string_view line) -> Status {
    if (is_blank(line)) return {};
    LACUNA_TRY(const json object,
               parse_json(line, fmt::format("{}: line {}", path.string(), number)));
    if (!object.is_object() || !object.contains("text") || !object["text"].is_string())
      return bad_input(
          "{}: line {} is not a JSON object with a string \"text\". Mend or remove the line.",
          path.string(), number);
    if (auto document = object["text"].get<std::string>(); !is_blank(document))
      documents.push_back(std::move(document));
    return {};
  }));
  return documents;
}

}  // namespace

Result<std::vector<std::string>> read_documents(const fs::path& path) {
  LACUNA_TRY(std::string text, read_text(path));
  std::vector<std::string> documents;
  if (path.extension() == ".jsonl") {
    LACUNA_TRY(documents, read_json_lines(path, text));
  } else if (!is_blank(text)) {
    documents.push_back(std::move(text));
  }
  if (documents.empty())
    return bad_input("{}: holds no text (need at least one word). Give another file.",
                     path.string());
  return documents;
}

Result<fs::path> find_dataset(const std::string& name_or_path, Split split) {
  std::string looked;
  std::error_code ignored;
  const auto is_file = [&](const fs::path& path) {
    looked += (looked.empty() ? "" : ", ") + path.string();
    return fs::is_regular_file(path, ignored);
  };
  if (is_file(name_or_path)) return fs::path(name_or_path);
  const char* root = std::getenv("LACUNA_DATASETS");
  // An absolute path would leave the folder.
  if (root != nullptr && *root != '\0' && !fs::path(name_or_path).is_absolute()) {
    const fs::path base = fs::path(root) / name_or_path;
    const std::string part = split == Split::kTrain ? "train" : "test";
    const std::string wikitext = "/wiki." + part;  // as its archive names them
    for (const std::string& suffix :
         {std::string(), std::string(".txt"), std::string(".jsonl"), "/" + part + ".txt",
          "/" + part + ".jsonl", wikitext + ".raw", wikitext + ".tokens"}) {
      fs::path candidate = base;
      candidate += suffix;
      if (is_file(candidate)) return candidate;
    }
  }
  return bad_input(
      "{}: no such text or data set (looked at {}). Give a file{}.", name_or_path, looked,
      root == nullptr ? ", or set LACUNA_DATASETS to the folder that holds your data sets" : "");
}

}  // namespace lacuna::io
