// Errors are values: every function that reads something from outside returns Result<T>.
#pragma once

#include <fmt/format.h>

#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>

namespace lacuna {

/// What kind of failure; the value is also the exit code of the command-line tool.
enum class Code : int {
  kCheckFailed = 1,    ///< the run or the check itself failed
  kUsage = 2,          ///< a flag or argument is wrong
  kBadInput = 3,       ///< what was given is wrong: a file, a tensor, a text, a full disk
  kNotPossible = 4,    ///< this machine or build can't do it
  kInterrupted = 130,  ///< stopped by the user
};

/// Message grammar: `<file or op>: <rule broken> (got <value>; need <rule>). <what to do>.`
struct Error {
  Code code = Code::kCheckFailed;
  std::string message;
};

template <class... A>
Error check_failed(fmt::format_string<A...> text, A&&... args) {
  return {Code::kCheckFailed, fmt::format(text, std::forward<A>(args)...)};
}
template <class... A>
Error usage_error(fmt::format_string<A...> text, A&&... args) {
  return {Code::kUsage, fmt::format(text, std::forward<A>(args)...)};
}
template <class... A>
Error bad_input(fmt::format_string<A...> text, A&&... args) {
  return {Code::kBadInput, fmt::format(text, std::forward<A>(args)...)};
}
template <class... A>
Error not_possible(fmt::format_string<A...> text, A&&... args) {
  return {Code::kNotPossible, fmt::format(text, std::forward<A>(args)...)};
}

/// A value or an Error; asking the wrong side is a programming error.
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::in_place_index<0>, std::move(value)) {}  // NOLINT(runtime/explicit)
  Result(Error error)
      : state_(std::in_place_index<1>, std::move(error)) {}  // NOLINT(runtime/explicit)
  /// Lets `return unique_ptr<Derived>` and the like convert on the way.
  template <class U>
  requires(std::is_convertible_v<U&&, T> && !std::is_same_v<std::remove_cvref_t<U>, Result> &&
           !std::is_same_v<std::remove_cvref_t<U>, Error> &&
           !std::is_same_v<std::remove_cvref_t<U>, T>) Result(U&& value)
      : state_(std::in_place_index<0>, std::forward<U>(value)) {}  // NOLINT

  bool ok() const { return state_.index() == 0; }
  explicit operator bool() const { return ok(); }
  T& value() & { return std::get<0>(state_); }
  const T& value() const& { return std::get<0>(state_); }
  T&& value() && { return std::get<0>(std::move(state_)); }
  T& operator*() & { return value(); }
  const T& operator*() const& { return value(); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }
  const Error& error() const& { return std::get<1>(state_); }
  Error&& error() && { return std::get<1>(std::move(state_)); }

 private:
  std::variant<T, Error> state_;
};

template <>
class [[nodiscard]] Result<void> {
 public:
  Result() = default;
  Result(Error error) : error_(std::move(error)) {}  // NOLINT(runtime/explicit)
  bool ok() const { return !error_.has_value(); }
  explicit operator bool() const { return ok(); }
  const Error& error() const& { return *error_; }
  Error&& error() && { return std::move(*error_); }

 private:
  std::optional<Error> error_;
};
using Status = Result<void>;

}  // namespace lacuna

#define LACUNA_CONCAT_(a, b) a##b
#define LACUNA_CONCAT(a, b) LACUNA_CONCAT_(a, b)

/// `LACUNA_TRY(auto file, open(path));` declares `file` or returns the error to the caller.
#define LACUNA_TRY(declaration, ...)                                   \
  auto LACUNA_CONCAT(lacuna_result_, __LINE__) = (__VA_ARGS__);        \
  if (!LACUNA_CONCAT(lacuna_result_, __LINE__).ok())                   \
    return std::move(LACUNA_CONCAT(lacuna_result_, __LINE__)).error(); \
  declaration = std::move(LACUNA_CONCAT(lacuna_result_, __LINE__)).value()

/// Returns the error of a Status (or Result whose value is not needed) to the caller.
#define LACUNA_CHECK(...)                                        \
  do {                                                           \
    if (auto lacuna_status = (__VA_ARGS__); !lacuna_status.ok()) \
      return std::move(lacuna_status).error();                   \
  } while (false)
