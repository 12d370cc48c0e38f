#include "lacuna/report/table.h"

#include <fmt/format.h>

#include <algorithm>

namespace lacuna::report {
namespace {

/// Characters, not bytes: continuation bytes of UTF-8 take no column.
size_t width(const std::string& text) {
  return static_cast<size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xc0) != 0x80; }));
}

}  // namespace

std::string Table::text() const {
  std::vector<size_t> widths;
  for (const auto& row : rows_) {
    widths.resize(std::max(widths.size(), row.size()));
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], width(row[i]));
  }
  std::string out;
  for (size_t r = 0; r < rows_.size(); ++r) {
    std::string line;
    for (size_t i = 0; i < rows_[r].size(); ++i) {
      const std::string pad(widths[i] - width(rows_[r][i]), ' ');
      line += (i ? "  " : "") + (i ? pad + rows_[r][i] : rows_[r][i] + pad);
    }
    line.erase(line.find_last_not_of(' ') + 1);
    out += line + "\n";
    if (r == 0) {
      size_t total = 0;
      for (size_t w : widths) total += w + 2;
      out += std::string(total - 2, '-') + "\n";
    }
  }
  return out;
}

std::string Table::markdown() const {
  std::string out;
  for (size_t r = 0; r < rows_.size(); ++r) {
    out += "|";
    for (size_t i = 0; i < rows_[0].size(); ++i) {
      out += ' ';
      for (const char c : i < rows_[r].size() ? rows_[r][i] : std::string())
        out += c == '|' ? std::string("\\|") : std::string(1, c);
      out += " |";
    }
    out += '\n';
    if (r > 0) continue;
    for (size_t i = 0; i < rows_[0].size(); ++i) out += i == 0 ? "|---|" : "---:|";
    out += '\n';
  }
  return out;
}

std::string Table::csv() const {
  std::string out;
  for (const auto& row : rows_) {
    for (size_t i = 0; i < row.size(); ++i) {
      if (i > 0) out += ',';
      const bool quoted = row[i].find_first_of(",\"\r\n") != std::string::npos;
      if (!quoted) {
        out += row[i];
        continue;
      }
      out += '"';
      for (const char c : row[i]) out += c == '"' ? std::string("\"\"") : std::string(1, c);
      out += '"';
    }
    out += "\r\n";
  }
  return out;
}

}  // namespace lacuna::report
