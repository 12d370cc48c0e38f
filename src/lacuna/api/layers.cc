#include "lacuna/api/layers.h"

#include <fmt/format.h>

#include "lacuna/format/compact.h"
#include "lacuna/io/misfit.h"

namespace lacuna::api {
namespace {

// Trained weights hold some zeros by chance (a 4-bit grid: many). A bf16 bitmap matrix is smaller
// than the dense one from 1/16 zeros on, but below a quarter the gain isn't worth a format.
constexpr double kSparseFrom = 0.25;

/// The place of the first number whose exponent bits are all set.
template <class Bits>
std::optional<int64_t> find_not_finite(const Bytes& bytes, Bits exponent) {
  const auto count = static_cast<int64_t>(bytes.size() / sizeof(Bits));
  for (int64_t i = 0; i < count; ++i)
    if ((read_unaligned<Bits>(bytes.as<Bits>() + i) & exponent) == exponent) return i;
  return std::nullopt;
}

std::optional<int64_t> find_not_finite(const Bytes& bytes, DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return find_not_finite<uint32_t>(bytes, 0x7f800000u);
    case DType::kBF16:
      return find_not_finite<uint16_t>(bytes, 0x7f80u);
    case DType::kF16:
      return find_not_finite<uint16_t>(bytes, 0x7c00u);
    default:
      return std::nullopt;
  }
}

}  // namespace

std::set<std::string> block_weights(const io::DecoderSpec& spec) {
  std::set<std::string> names;
  for (const auto& weight : spec.block_weights()) names.insert(weight.name);
  return names;
}

std::vector<std::string> misfits(const io::Checkpoint& checkpoint, const io::DecoderSpec& spec) {
  std::vector<std::string> lines;
  for (const auto& [name, layer, linear] : spec.block_weights())
    if (auto line = io::misfit(checkpoint, name, {linear.out, linear.in}))
      lines.push_back(*std::move(line));
  return lines;
}

std::optional<std::pair<int64_t, int64_t>> first_not_finite(const io::Weight& weight) {
  const auto* compact = std::get_if<format::CompactMatrix>(&weight);
  // What codes stand for shows when they are expanded.
  if (compact != nullptr && compact->quantization.none() &&
      !find_not_finite(compact->values, compact->values_dtype))
    return std::nullopt;
  const Tensor dense = compact != nullptr ? format::expand(*compact) : std::get<Tensor>(weight);
  const auto place = find_not_finite(dense.bytes, dense.dtype);
  if (!place) return std::nullopt;
  const int64_t columns = dense.shape.empty() ? 1 : dense.shape.back();
  return std::pair{*place / columns, *place % columns};
}

std::string not_finite(const io::Checkpoint& checkpoint) {
  for (const auto& [name, info] : checkpoint.weights()) {
    const auto weight = checkpoint.weight(name);
    if (!weight.ok()) return weight.error().message;
    if (const auto place = first_not_finite(*weight))
      return fmt::format(
          "{}: tensor \"{}\", row {}, column {}: not a finite number. Repair or "
          "download the model again.",
          checkpoint.folder().string(), name, place->first, place->second);
  }
  return "";
}

SparsityCount count_zeros(const io::Weight& weight) {
  if (const auto* compact = std::get_if<format::CompactMatrix>(&weight))
    return {compact->quantization.none()
                ? format::count_zeros(*compact)
                : compact->rows * compact->columns - format::count_kept(*compact),
            compact->rows * compact->columns};
  const Tensor& dense = std::get<Tensor>(weight);
  return {format::count_zeros(dense), dense.elements()};
}

format::Pattern pattern_of(const io::WeightInfo& info, const io::Weight& weight) {
  if (info.pattern.kind != format::PatternKind::kDense) return info.pattern;
  const Tensor* dense = std::get_if<Tensor>(&weight);
  if (dense == nullptr) return info.pattern;
  const format::Pattern found = format::detect_pattern(*dense);
  const bool chance = found.kind == format::PatternKind::kUnstructured &&
                      count_zeros(weight).sparsity() < kSparseFrom;
  return chance ? format::Pattern() : found;
}

}  // namespace lacuna::api
