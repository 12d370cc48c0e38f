#include "lacuna/model/decoder.h"

#include <nlohmann/json.hpp>

#include "lacuna/io/file.h"
#include "lacuna/io/json.h"

namespace lacuna::model {

Result<io::DecoderSpec> spec_of(const io::Checkpoint& checkpoint) {
  const auto config_file = checkpoint.folder() / "config.json";
  const auto generation_file = checkpoint.folder() / "generation_config.json";
  nlohmann::json generation;
  // Weights made in memory have no folder.
  const bool has_generation =
      !checkpoint.folder().empty() && std::filesystem::exists(generation_file);
  if (has_generation) {
    LACUNA_TRY(const std::string text, io::read_text(generation_file));
    LACUNA_TRY(generation, io::parse_json_object(text, generation_file.string()));
  }
  return io::decoder_spec(checkpoint.config(), has_generation ? &generation : nullptr,
                          config_file.string());
}

Result<Decoder> Decoder::load(const io::Checkpoint& checkpoint, const Compute& compute) {
  Decoder decoder;
  decoder.compute_ = compute;
  LACUNA_TRY(decoder.spec_, spec_of(checkpoint));
  LACUNA_TRY(decoder.ends_, Ends::load(checkpoint, decoder.spec_, compute));
  for (int64_t layer = 0; layer < decoder.spec_.layers; ++layer) {
    LACUNA_TRY(Block block, Block::load(checkpoint, decoder.spec_, layer, compute));
    decoder.blocks_.push_back(std::move(block));
  }
  if (decoder.spec_.positions == io::Positions::kRotary)
    decoder.rotary_ = Rotary(decoder.spec_, compute);
  return decoder;
}

at::Tensor Decoder::hidden(const at::Tensor& ids, KvCache* cache,
                           std::optional<int64_t> last) const {
  const int64_t first = cache != nullptr ? cache->length() : 0;
  at::Tensor hidden = ends_.embed(ids.to(compute_.device), first);
  for (const Block& block : blocks_)
    hidden = block.forward(hidden, rotary_, cache, &block == &blocks_.back() ? last : std::nullopt);
  if (cache != nullptr) cache->advance(ids.size(1));
  return hidden;
}

at::Tensor Decoder::forward(const at::Tensor& ids, KvCache* cache, bool last_only) const {
  return ends_.logits(hidden(ids, cache, last_only ? std::optional<int64_t>(1) : std::nullopt));
}

std::vector<const Linear*> Decoder::linears() const {
  std::vector<const Linear*> all;
  for (const Block& block : blocks_)
    for (const std::string& name : block.linear_names()) all.push_back(&block.linear(name));
  for (const Linear* linear : ends_.linears()) all.push_back(linear);
  return all;
}

size_t Decoder::weight_bytes() const {
  size_t bytes = ends_.weight_bytes();
  for (const Block& block : blocks_) bytes += block.weight_bytes();
  return bytes;
}

}  // namespace lacuna::model
