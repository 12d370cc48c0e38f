// Tables for a terminal, for Markdown and for other programs.
#pragma once

#include <string>
#include <vector>

namespace lacuna::report {

/// Columns padded to their widest cell; the first is left-aligned, the others right-aligned. Rows
/// may be short.
class Table {
 public:
  explicit Table(std::vector<std::string> header) : rows_{std::move(header)} {}
  void add(std::vector<std::string> row) { rows_.push_back(std::move(row)); }
  std::string text() const;
  /// The same with bars, for a page.
  std::string markdown() const;
  /// RFC 4180: cells with a comma, a quote or a line end are quoted.
  std::string csv() const;

 private:
  std::vector<std::vector<std::string>> rows_;
};

}  // namespace lacuna::report
