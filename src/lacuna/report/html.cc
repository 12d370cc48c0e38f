#include "lacuna/report/html.h"

#include <algorithm>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "lacuna/core/memory.h"
#include "lacuna/core/version.h"
#include "lacuna/io/file.h"
#include "lacuna/io/json.h"
#include "lacuna/io/out_folder.h"
#include "lacuna/report/svg.h"
#include "lacuna/report/table.h"

namespace lacuna::report {

namespace {
using nlohmann::json;

/// The JSON of a verb and the model it is about.
struct Run {
  std::string folder;  ///< as the run named it; two models may share its last part
  std::string name;    ///< for the reader
  nlohmann::json json;
};

constexpr const char* kHead = R"(<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Lacuna report</title><style>
:root{color-scheme:light dark;--line:#8884}
body{font:15px/1.5 system-ui,sans-serif;max-width:820px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .6rem;text-align:right;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left}
svg{width:100%;height:auto;margin:.5rem 0}svg text{font:12px system-ui,sans-serif;fill:currentColor}
svg .title{font-weight:600}svg .grid{stroke:var(--line)}
pre{white-space:pre-wrap;border-left:3px solid var(--line);padding-left:.8rem;font:inherit}
footer{margin-top:3rem;opacity:.7;font-size:.85rem}
</style></head><body>
)";

/// The folder of the model that a run is about.
std::filesystem::path model_folder(const json& run) {
  for (const char* key : {"model", "out"})
    if (auto it = run.find(key); it != run.end() && it->is_string())
      return io::folder_path(it->get<std::string>());
  return {};
}

using Runs = std::vector<Run>;

Runs of_verb(const Runs& runs, std::string_view verb) {
  Runs found;
  for (const Run& run : runs)
    if (run.json.value("verb", "") == verb) found.push_back(run);
  return found;
}

std::string html_table(const std::vector<std::string>& header,
                       const std::vector<std::vector<std::string>>& rows) {
  if (rows.empty()) return "";
  const auto line = [](const std::vector<std::string>& cells, const char* tag) {
    std::string out = "<tr>";
    for (const std::string& cell : cells) out += fmt::format("<{0}>{1}</{0}>", tag, escape(cell));
    return out + "</tr>\n";
  };
  std::string out = "<table>" + line(header, "th");
  for (const auto& row : rows) out += line(row, "td");
  return out + "</table>\n";
}

std::string number(const json& run, const char* key, const char* format) {
  const auto it = run.find(key);
  if (it == run.end() || !it->is_number()) return "–";
  return fmt::format(fmt::runtime(format), it->get<double>());
}

/// Names of models that others have too become whole paths.
void tell_apart(std::vector<Run>& runs) {
  std::map<std::string, std::set<std::string>> folders;  // by name
  for (const Run& run : runs) folders[run.name].insert(run.folder);
  for (Run& run : runs)
    if (folders[run.name].size() > 1) run.name = run.folder;
}

/// Bytes of a model by folder: what inspect and prune counted.
std::map<std::string, double> model_bytes(const Runs& runs) {
  std::map<std::string, double> bytes;
  for (const Run& run : runs) {
    if (run.json.contains("bytes")) bytes[run.folder] = run.json["bytes"];
    if (run.json.contains("bytes_out")) bytes[run.folder] = run.json["bytes_out"];
  }
  return bytes;
}

/// A size in a record, which anybody may have written.
std::string size_in(const json& record, const char* key) {
  return bytes_text(static_cast<uint64_t>(std::clamp(record.value(key, 0.0), 0.0, 1e18)));
}

std::string sizes(const Runs& runs) {
  std::vector<std::vector<std::string>> rows;
  for (const Run& run : of_verb(runs, "inspect"))
    rows.push_back({run.name, number(run.json, "parameters", "{:.0f}"), size_in(run.json, "bytes"),
                    number(run.json, "sparsity", "{:.4f}")});
  const std::string table = html_table({"model", "parameters", "bytes", "sparsity"}, rows);
  return table.empty() ? "" : "<h2>Size</h2>" + table;
}

std::string proofs(const Runs& runs) {
  std::vector<std::vector<std::string>> rows;
  for (const Run& run : of_verb(runs, "verify")) {
    const auto& violations = run.json.at("violations");
    rows.push_back({run.name, run.json.value("ok", false) ? "ok" : "NOT OK",
                    number(run.json, "tensors", "{:.0f}"), number(run.json, "sparsity", "{:.4f}"),
                    violations.empty() ? "none" : violations[0].get<std::string>()});
  }
  const std::string table =
      html_table({"model", "verified", "tensors read", "sparsity", "violations"}, rows);
  return table.empty() ? "" : "<h2>Proof</h2>" + table;
}

std::string quality(const Runs& runs) {
  std::vector<std::vector<std::string>> rows;
  const auto bytes = model_bytes(runs);
  Series points{"models", {}};
  for (const Run& run : of_verb(runs, "eval")) {
    const json& j = run.json;
    rows.push_back({run.name, number(j, "perplexity", "{:.3f}"), number(j, "stderr", "{:.3f}"),
                    number(j, "kl_mean", "{:.4f}"), number(j, "same_top", "{:.3f}"),
                    fmt::format("{} × {}, {}", j.value("windows", 0), j.value("length", 0),
                                j.value("protocol", ""))});
    if (const auto it = bytes.find(run.folder); it != bytes.end())
      points.points.push_back({it->second / 1e6, j.value("perplexity", 0.0), run.name});
  }
  const std::string table = html_table(
      {"model", "perplexity", "± s.e.", "KL to dense", "same top token", "windows"}, rows);
  if (table.empty()) return "";
  return "<h2>Quality</h2>" + table +
         xy_chart({"Perplexity against size (lower left is better)", "file size, MB", "perplexity"},
                  {points});
}

/// "model.layers.12.mlp.up_proj.weight" -> 12; -1 when no part is a number.
int block_of(const std::string& name) {
  size_t begin = 0;
  while (begin < name.size()) {
    const size_t end = std::min(name.find('.', begin), name.size());
    const std::string part = name.substr(begin, end - begin);
    if (!part.empty() && part.find_first_not_of("0123456789") == std::string::npos &&
        part.size() < 7)
      return std::stoi(part);
    begin = end + 1;
  }
  return -1;
}

std::string layers(const Runs& runs) {
  std::string out;
  for (const Run& run : of_verb(runs, "prune")) {
    std::map<std::string, Series> errors, sparsities;  // by the Linear's own name
    for (const json& layer : run.json.at("layers")) {
      std::string name = layer.value("name", "");
      const int block = block_of(name);
      if (name.ends_with(".weight")) name.resize(name.size() - 7);
      const std::string kind = name.substr(name.rfind('.') + 1);
      const auto add = [&](std::map<std::string, Series>& to, const char* key) {
        if (!layer.contains(key) || !layer[key].is_number()) return;
        to[kind].name = kind;
        to[kind].points.push_back(
            {static_cast<double>(block), layer[key], layer.value("name", "")});
      };
      add(errors, "error"), add(sparsities, "sparsity");
    }
    const auto list = [](const std::map<std::string, Series>& map) {
      std::vector<Series> series;
      for (const auto& [kind, s] : map) series.push_back(s);
      return series;
    };
    out += fmt::format("<h2>Layers of {}</h2><p>pruned in {} s to sparsity {}; {} of {} dense</p>",
                       escape(run.name), number(run.json, "seconds", "{:.1f}"),
                       number(run.json, "sparsity", "{:.4f}"), size_in(run.json, "bytes_out"),
                       size_in(run.json, "bytes_dense"));
    out += xy_chart({"Relative output error by block", "block", "|X(W−W')| / |XW|", true},
                    list(errors));
    out += xy_chart({"Sparsity by block", "block", "share of zeros", true}, list(sparsities));
  }
  return out;
}

std::string answers(const Runs& runs) {
  std::string out;
  for (const Run& run : of_verb(runs, "generate"))
    out += fmt::format("<h3>{}</h3><p>{} tokens/s, first token after {} ms</p><pre>{}</pre>\n",
                       escape(run.name), number(run.json, "tokens_per_second", "{:.1f}"),
                       number(run.json, "ttft_ms", "{:.0f}"), escape(run.json.value("text", "")));
  return out.empty() ? "" : "<h2>Answers</h2>" + out;
}

std::string sections(const Runs& runs) {
  std::string html;
  for (const auto& section : {sizes, quality, proofs, layers, answers}) html += section(runs);
  return html;
}

}  // namespace

Status write_html(const std::vector<std::filesystem::path>& paths,
                  const std::filesystem::path& out) {
  Runs runs;
  for (const auto& path : paths) {
    LACUNA_TRY(const std::string text, io::read_text(path));
    LACUNA_TRY(json run, io::parse_json(text, path.string()));
    if (!run.is_object() || !run.contains("verb"))
      return bad_input(
          "{}: not the JSON output of a verb (no key \"verb\"). Save what `lacuna VERB --json` "
          "prints.",
          path.string());
    const std::filesystem::path folder = model_folder(run);
    runs.push_back({folder.empty() ? path.string() : folder.string(),
                    folder.empty() ? path.stem().string() : folder.filename().string(),
                    std::move(run)});
    try {
      (void)sections({runs.back()});  // a file with other keys than a verb's is told by its name
    } catch (const json::exception& error) {
      return bad_input(
          "{}: not the JSON output of a verb ({}). Save what `lacuna VERB --json` prints.",
          path.string(), error.what());
    }
  }
  tell_apart(runs);
  std::string page = kHead;
  page += "<h1>Lacuna report</h1>\n";
  page += sections(runs);
  page += fmt::format("<footer>Lacuna {}. Made from {} run(s).</footer></body></html>\n", kVersion,
                      runs.size());
  return io::write_text(out, page);
}

}  // namespace lacuna::report
