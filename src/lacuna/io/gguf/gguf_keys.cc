#include "lacuna/io/gguf/gguf_keys.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

#include "lacuna/io/tokenizer/utf8.h"

namespace lacuna::io {
namespace {

constexpr int64_t kLargestSize = (int64_t{1} << 31) - 1;
constexpr size_t kShownBytes = 60;

/// A value as a message shows it.
std::string value_text(const GgufValue& value) {
  struct Show {
    std::string operator()(uint64_t number) const { return fmt::format("{}", number); }
    std::string operator()(int64_t number) const { return fmt::format("{}", number); }
    std::string operator()(double number) const { return fmt::format("{}", number); }
    std::string operator()(bool flag) const { return flag ? "true" : "false"; }
    std::string operator()(const std::string& text) const {
      return fmt::format("\"{}\"", tokenizer::to_valid_utf8(text.substr(0, kShownBytes)));
    }
    std::string operator()(const GgufArray&) const { return "a list"; }
  };
  return std::visit(Show(), value);
}

}  // namespace

const GgufValue* GgufKeys::find(std::string_view key) const {
  const auto found = file_.metadata().find(key);
  return found == file_.metadata().end() ? nullptr : &found->second;
}

bool GgufKeys::has(std::string_view key) const { return find(key) != nullptr; }

void GgufKeys::fail(const std::string& message) {
  if (!error_) error_ = bad_input("{}: {}", path(), message);
}

void GgufKeys::wrong(const std::string& key, std::string_view need) {
  fail(fmt::format("key \"{}\" has a wrong value (got {}; need {}).", key, value_text(*find(key)),
                   need));
}

void GgufKeys::missing(const std::string& key) {
  fail(fmt::format("the key \"{}\" is missing. Get the model from another source.", key));
}

std::optional<int64_t> GgufKeys::integer(const GgufValue& value) {
  if (const auto* number = std::get_if<int64_t>(&value)) return *number;
  if (const auto* number = std::get_if<uint64_t>(&value))
    if (*number <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max()))
      return static_cast<int64_t>(*number);
  return std::nullopt;
}

int64_t GgufKeys::size(const std::string& key) {
  if (!has(key)) return missing(key), 1;
  return size_or(key, 1);
}

int64_t GgufKeys::size_or(const std::string& key, int64_t fallback) {
  const GgufValue* value = find(key);
  if (value == nullptr) return fallback;
  std::optional<int64_t> size = integer(*value);
  if (const auto* array = std::get_if<GgufArray>(value)) {
    const auto& sizes = array->integers;
    if (std::adjacent_find(sizes.begin(), sizes.end(), std::not_equal_to()) != sizes.end())
      return wrong(key, "the same size for every layer"), 1;
    if (!sizes.empty()) size = sizes.front();
  }
  if (!size || *size <= 0 || *size > kLargestSize)
    return wrong(key, "a positive size below 2^31"), 1;
  return *size;
}

double GgufKeys::number(const std::string& key) {
  if (!has(key)) return missing(key), 1;
  return number_or(key, 1);
}

double GgufKeys::number_or(const std::string& key, double fallback) {
  const GgufValue* value = find(key);
  if (value == nullptr) return fallback;
  if (const auto whole = integer(*value)) return static_cast<double>(*whole);
  const auto* number = std::get_if<double>(value);
  if (number == nullptr || !std::isfinite(*number)) return wrong(key, "a number"), fallback;
  return shortest_double(*number);
}

bool GgufKeys::flag_or(const std::string& key, bool fallback) {
  const GgufValue* value = find(key);
  if (value == nullptr) return fallback;
  const auto* flag = std::get_if<bool>(value);
  if (flag == nullptr) return wrong(key, "true or false"), fallback;
  return *flag;
}

std::string GgufKeys::text(const std::string& key) {
  if (!has(key)) return missing(key), "";
  return text_or(key, "");
}

std::string GgufKeys::text_or(const std::string& key, std::string fallback) {
  const GgufValue* value = find(key);
  if (value == nullptr) return fallback;
  const auto* text = std::get_if<std::string>(value);
  if (text == nullptr || !tokenizer::is_valid_utf8(*text))
    return wrong(key, "text in UTF-8"), fallback;
  return *text;
}

std::optional<int64_t> GgufKeys::token_id(const std::string& key) {
  const GgufValue* value = find(key);
  if (value == nullptr) return std::nullopt;
  const auto id = integer(*value);
  if (!id || *id < 0) return wrong(key, "the id of a token"), std::nullopt;
  return id;
}

const GgufArray& GgufKeys::list(const std::string& key) {
  static const GgufArray kEmpty;
  const GgufValue* value = find(key);
  if (value == nullptr) return kEmpty;
  const auto* array = std::get_if<GgufArray>(value);
  if (array == nullptr) return wrong(key, "a list"), kEmpty;
  return *array;
}

const std::vector<std::string>& GgufKeys::texts(const std::string& key) {
  const GgufArray& array = list(key);
  if (!array.integers.empty() || !array.numbers.empty()) wrong(key, "a list of texts");
  return array.strings;
}

const std::vector<int64_t>& GgufKeys::integers(const std::string& key) {
  const GgufArray& array = list(key);
  if (!array.strings.empty() || !array.numbers.empty()) wrong(key, "a list of integers");
  return array.integers;
}

const std::vector<double>& GgufKeys::numbers(const std::string& key) {
  const GgufArray& array = list(key);
  if (!array.strings.empty() || !array.integers.empty()) wrong(key, "a list of numbers");
  return array.numbers;
}

double shortest_double(double value) {
  if (!(std::abs(value) <= std::numeric_limits<float>::max())) return value;
  const auto narrow = static_cast<float>(value);
  if (static_cast<double>(narrow) != value) return value;
  const std::string text = fmt::format("{}", narrow);
  double shortest = value;
  std::from_chars(text.data(), text.data() + text.size(), shortest);
  return shortest;
}

}  // namespace lacuna::io
