#include "lacuna/format/quantization.h"

#include <array>

namespace lacuna::format {
namespace {

struct Name {
  Code code;
  std::string_view text;
  int64_t default_group;
};
constexpr Name kNames[] = {
    {Code::kInt8, "int8", 0}, {Code::kInt4, "int4", 64}, {Code::kFP8, "fp8", 0}};
constexpr std::array<int64_t, 3> kGroups = {32, 64, 128};
constexpr std::string_view kWholeRow = "row";

}  // namespace

Result<Quantization> Quantization::parse(std::string_view text) {
  const auto unknown = [&] {
    return usage_error(
        "quantization: unknown code (got \"{}\"; need none, int8, int4 or fp8, then g32, g64 or "
        "g128 for scales of groups or row for one a row, then z for zero points of int4).",
        text);
  };
  if (text == "none") return Quantization{};
  for (const auto& [code, name, default_group] : kNames) {
    if (!text.starts_with(name)) continue;
    std::string_view rest = text.substr(name.size());
    Quantization quantization{.code = code, .group = default_group};
    quantization.zero_points = rest.ends_with('z');
    if (quantization.zero_points) rest.remove_suffix(1);
    bool known = rest.empty();
    if (rest == kWholeRow) {
      quantization.group = 0;
      known = true;
    }
    for (const int64_t group : kGroups) {
      if (rest != fmt::format("g{}", group)) continue;
      quantization.group = group;
      known = true;
    }
    if (!known) return unknown();
    if (quantization.zero_points && code != Code::kInt4)
      return usage_error("quantization: {} has no zero points (got \"{}\"; need int4 for them).",
                         name, text);
    return quantization;
  }
  return unknown();
}

std::string Quantization::text() const {
  for (const auto& [known, name, default_group] : kNames)
    if (known == code)
      return fmt::format("{}{}{}", name,
                         group != 0           ? fmt::format("g{}", group)
                         : default_group != 0 ? kWholeRow
                                              : "",
                         zero_points ? "z" : "");
  return "none";
}

}  // namespace lacuna::format
