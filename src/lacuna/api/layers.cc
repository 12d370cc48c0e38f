#include "lacuna/api/layers.h"

#include "lacuna/format/compact.h"

namespace lacuna::api {

std::set<std::string> block_weights(const io::DecoderSpec& spec) {
  std::set<std::string> names;
  for (int64_t layer = 0; layer < spec.layers; ++layer)
    for (const io::LinearSpec& linear : spec.block_linears())
      names.insert(spec.block_prefix(layer) + linear.name + ".weight");
  return names;
}

SparsityCount count_zeros(const io::Weight& weight) {
  if (const auto* compact = std::get_if<format::CompactMatrix>(&weight))
    return {format::count_zeros(*compact), compact->rows * compact->columns};
  const Tensor& dense = std::get<Tensor>(weight);
  return {format::count_zeros(dense), dense.elements()};
}

format::Pattern pattern_of(const io::WeightInfo& info, const io::Weight& weight) {
  if (info.pattern.kind != format::PatternKind::kDense) return info.pattern;
  const Tensor* dense = std::get_if<Tensor>(&weight);
  return dense ? format::detect_pattern(*dense) : info.pattern;
}

}  // namespace lacuna::api
