// config.json from anywhere, then byte 0, then generation_config.json: refused with a message, or a
// model whose sizes add up.
#include <cstdint>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <string_view>

#include "lacuna/io/compact_store.h"
#include "lacuna/io/decoder_spec.h"
#include "lacuna/io/json.h"
#include "lacuna/io/legacy_bitmask.h"

namespace {

using nlohmann::json;

void require(bool holds) {
  if (!holds) std::abort();
}

/// As the tool parses it; null where it refuses.
json parsed(std::string_view text) {
  auto value = lacuna::io::parse_json(text, "fuzz");
  return value.ok() ? std::move(*value) : json();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const size_t end = text.find('\0');
  const json config = parsed(text.substr(0, end));
  const json generation = end == text.npos ? json() : parsed(text.substr(end + 1));
  const auto spec = lacuna::io::decoder_spec(config, &generation, "fuzz");
  if (!spec.ok()) require(spec.error().message.starts_with("fuzz: "));
  if (!config.is_object()) return 0;
  if (auto declared = lacuna::io::read_declarations(config, "fuzz"); declared.ok()) {
    json written = config;
    lacuna::io::write_declarations(*declared, written);
    require(lacuna::io::read_declarations(written, "fuzz")->size() == declared->size());
  }
  (void)lacuna::io::check_legacy_config(config, "fuzz").ok();
  if (!spec.ok()) return 0;
  require(spec->heads * spec->head_dim == spec->q.out && spec->heads % spec->kv_heads == 0);
  require(spec->block_linears().size() == (spec->gated ? 7u : 6u));
  // Many layers only repeat themselves.
  if (spec->layers > 100) return 0;
  int64_t parameters = 0;
  for (const auto& [name, shape] : spec->tensors()) {
    const auto count = lacuna::element_count(shape);
    require(!name.empty() && count && *count > 0);
    parameters += *count;
  }
  require(spec->parameters() == parameters);
  return 0;
}
