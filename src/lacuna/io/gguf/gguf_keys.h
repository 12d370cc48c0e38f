// Metadata of a GGUF file read by key and kind.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "lacuna/core/status.h"
#include "lacuna/io/gguf/gguf.h"

namespace lacuna::io {

/// Reads the keys of one file; the first thing wrong is remembered, so that a reader reads like a
/// table. Values stand in where one is missing or wrong: ask error() before using them.
class GgufKeys {
 public:
  explicit GgufKeys(const GgufFile& file) : file_(file) {}

  bool has(std::string_view key) const;
  /// A positive size below 2^31; a list of equal ones (one a layer) counts as that one.
  int64_t size(const std::string& key);
  int64_t size_or(const std::string& key, int64_t fallback);
  double number(const std::string& key);
  double number_or(const std::string& key, double fallback);
  bool flag_or(const std::string& key, bool fallback);
  std::string text(const std::string& key);
  std::string text_or(const std::string& key, std::string fallback);
  /// The id of a token, if the key is there.
  std::optional<int64_t> token_id(const std::string& key);
  /// Lists; empty when the key is missing.
  const std::vector<std::string>& texts(const std::string& key);
  const std::vector<int64_t>& integers(const std::string& key);
  const std::vector<double>& numbers(const std::string& key);

  /// "FILE: MESSAGE"
  void fail(const std::string& message);
  const std::optional<Error>& error() const { return error_; }
  const std::string& path() const { return file_.path(); }

 private:
  const GgufValue* find(std::string_view key) const;
  void wrong(const std::string& key, std::string_view need);
  void missing(const std::string& key);
  const GgufArray& list(const std::string& key);
  static std::optional<int64_t> integer(const GgufValue& value);

  const GgufFile& file_;
  std::optional<Error> error_;
};

/// The shortest decimal number that gives the same float32, for values that were float32 in the
/// file: 1e-05 instead of 9.999999747378752e-06.
double shortest_double(double value);

}  // namespace lacuna::io
