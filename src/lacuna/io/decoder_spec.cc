#include "lacuna/io/decoder_spec.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

namespace lacuna::io {
namespace {
using nlohmann::json;

// No model comes near these; below them no product of sizes overflows.
constexpr int64_t kLargestSize = (int64_t{1} << 31) - 1;
constexpr int64_t kLargestWidth = int64_t{1} << 22;
constexpr int64_t kMostLayers = 10'000;

/// Reads the keys of one config.json; the first thing wrong is remembered, so an architecture reads
/// like a table.
class Keys {
 public:
  Keys(const json& config, std::string file) : config_(config), file_(std::move(file)) {}

  bool has(const char* key) const {
    const auto it = config_.find(key);
    return it != config_.end() && !it->is_null();
  }
  int64_t size(const char* key) { return size(key, std::nullopt); }
  int64_t size_or(const char* key, int64_t fallback) { return size(key, fallback); }
  double number_or(const char* key, double fallback) {
    if (!has(key)) return fallback;
    if (!config_[key].is_number()) return wrong(key, "a number"), fallback;
    return config_[key].get<double>();
  }
  bool flag_or(const char* key, bool fallback) {
    if (!has(key)) return fallback;
    if (!config_[key].is_boolean()) return wrong(key, "true or false"), fallback;
    return config_[key].get<bool>();
  }
  std::string text_or(const char* key, std::string fallback) {
    if (!has(key)) return fallback;
    if (!config_[key].is_string()) return wrong(key, "a string"), fallback;
    return config_[key].get<std::string>();
  }
  /// A key whose value no model of this architecture can have.
  void wrong(const char* key, std::string_view need) {
    // Replaces what isn't UTF-8: a message must not throw.
    const std::string got = config_[key].dump(-1, ' ', false, json::error_handler_t::replace);
    fail(fmt::format(
        "\"{}\" has a wrong value (got {}; need {}). Is it the file that came with the weights?",
        key, got.substr(0, 60), need));
  }
  void fail(const std::string& message) {
    if (!error_) error_ = bad_input("{}: {}", file_, message);
  }
  const std::optional<Error>& error() const { return error_; }
  void take_error(const Keys& inner) {
    if (!error_) error_ = inner.error_;
  }
  const json& config() const { return config_; }
  const std::string& file() const { return file_; }

 private:
  int64_t size(const char* key, std::optional<int64_t> fallback) {
    if (!has(key)) {
      if (!fallback)
        fail(fmt::format("the key \"{}\" is missing (need a positive size). Download it again.",
                         key));
      return fallback.value_or(1);
    }
    const json& value = config_[key];
    if (!value.is_number_integer() || value.get<int64_t>() <= 0 ||
        value.get<int64_t>() > kLargestSize)
      return wrong(key, "a positive size below 2^31"), 1;
    return value.get<int64_t>();
  }

  const json& config_;
  std::string file_;
  std::optional<Error> error_;
};

void read_activation(Keys& keys, const char* key, const char* fallback, DecoderSpec& spec) {
  static constexpr std::pair<std::string_view, Activation> kKnown[] = {
      {"silu", Activation::kSilu},
      {"swish", Activation::kSilu},
      {"gelu", Activation::kGelu},
      {"gelu_new", Activation::kGeluTanh},
      {"gelu_pytorch_tanh", Activation::kGeluTanh},
      {"relu", Activation::kRelu},
      {"relu2", Activation::kRelu2}};
  const std::string name = keys.text_or(key, fallback);
  for (const auto& [known, activation] : kKnown) {
    if (name != known) continue;
    spec.activation = activation;
    return;
  }
  keys.wrong(key, "silu, gelu, gelu_new, relu or relu2");
}

/// Transformers 5 writes rope_parameters; earlier ones rope_theta and rope_scaling.
void read_rope(Keys& keys, DecoderSpec& spec) {
  RopeSpec& rope = spec.rope;
  rope.theta = keys.number_or("rope_theta", rope.theta);
  double rotated_share = keys.number_or("partial_rotary_factor", 1.0);
  for (const char* key : {"rope_parameters", "rope_scaling"}) {
    if (!keys.has(key)) continue;
    if (!keys.config()[key].is_object()) return keys.wrong(key, "an object");
    Keys inner(keys.config()[key], fmt::format("{}: \"{}\"", keys.file(), key));
    rope.theta = inner.number_or("rope_theta", rope.theta);
    rotated_share = inner.number_or("partial_rotary_factor", rotated_share);
    const char* type_key = inner.has("rope_type") ? "rope_type" : "type";
    rope.type = inner.text_or(type_key, rope.type);
    if (rope.type != "default" && rope.type != "linear" && rope.type != "llama3")
      inner.wrong(type_key, "default, linear or llama3");
    if (rope.type != "default" && !inner.has("factor"))
      inner.fail(fmt::format("the key \"factor\" is missing (need it for {}).", rope.type));
    rope.factor = inner.number_or("factor", rope.factor);
    rope.low_freq_factor = inner.number_or("low_freq_factor", rope.low_freq_factor);
    rope.high_freq_factor = inner.number_or("high_freq_factor", rope.high_freq_factor);
    rope.original_max_positions =
        inner.size_or("original_max_position_embeddings", rope.original_max_positions);
    if (inner.error()) return keys.take_error(inner);
  }
  if (rotated_share != 1.0)
    keys.fail(fmt::format(
        "rotates a part of each head only (got partial_rotary_factor {}; need 1).", rotated_share));
  if (!(rope.theta > 0) || !(rope.factor > 0) || !(rope.high_freq_factor > rope.low_freq_factor))
    keys.fail(fmt::format(
        "impossible rotary positions (got theta {}, factor {}, frequency factors {} and {}; need "
        "theta and factor above 0, the high factor above the low one).",
        rope.theta, rope.factor, rope.low_freq_factor, rope.high_freq_factor));
}

/// hidden / heads, which config.json leaves out when it comes out even.
int64_t default_head_dim(Keys& keys, const DecoderSpec& spec) {
  if (spec.hidden % spec.heads != 0)
    keys.fail(fmt::format(
        "\"hidden_size\" {} is not a multiple of \"num_attention_heads\" {} (need \"head_dim\").",
        spec.hidden, spec.heads));
  return std::max<int64_t>(1, spec.hidden / spec.heads);
}

/// What an architecture assumes where config.json is silent.
struct Defaults {
  std::optional<int64_t> kv_heads;  ///< none: as many as heads
  std::optional<int64_t> head_dim;  ///< none: hidden / heads
  int64_t max_positions = 2048;
  double norm_epsilon = 1e-6;
  const char* activation = "silu";
};

/// What Llama and all its relatives share.
void read_llama_like(Keys& keys, DecoderSpec& spec, const Defaults& defaults) {
  spec.hidden = keys.size("hidden_size");
  spec.intermediate = keys.size("intermediate_size");
  spec.layers = keys.size("num_hidden_layers");
  spec.heads = keys.size("num_attention_heads");
  spec.kv_heads = keys.size_or("num_key_value_heads", defaults.kv_heads.value_or(spec.heads));
  spec.head_dim = keys.has("head_dim") ? keys.size("head_dim")
                  : defaults.head_dim  ? *defaults.head_dim
                                       : default_head_dim(keys, spec);
  spec.vocab = keys.size("vocab_size");
  spec.max_positions = keys.size_or("max_position_embeddings", defaults.max_positions);
  spec.embedding_width = spec.hidden;
  spec.norm = NormKind::kRms;
  spec.norm_epsilon = keys.number_or("rms_norm_eps", defaults.norm_epsilon);
  spec.tied_embedding = keys.flag_or("tie_word_embeddings", false);
  read_activation(keys, "hidden_act", defaults.activation, spec);
  read_rope(keys, spec);
  spec.embedding = "model.embed_tokens";
  spec.final_norm_name = "model.norm";
  spec.lm_head = spec.tied_embedding ? "" : "lm_head";
  spec.block_prefix_pattern = "model.layers.{}.";
  spec.attention_norm = "input_layernorm";
  spec.mlp_norm = "post_attention_layernorm";
  spec.q.name = "self_attn.q_proj";
  spec.k.name = "self_attn.k_proj";
  spec.v.name = "self_attn.v_proj";
  spec.o.name = "self_attn.o_proj";
  spec.gate.name = "mlp.gate_proj";
  spec.up.name = "mlp.up_proj";
  spec.down.name = "mlp.down_proj";
}

void read_llama(Keys& keys, DecoderSpec& spec) {
  read_llama_like(keys, spec, {});
  spec.qkv_bias = spec.o_bias = keys.flag_or("attention_bias", false);
  spec.mlp_bias = keys.flag_or("mlp_bias", false);
}

void read_mistral(Keys& keys, DecoderSpec& spec) {
  read_llama_like(keys, spec, {.kv_heads = 8, .max_positions = 4096 * 32});
  // null says "no window"; only an absent key means the default.
  if (!keys.config().contains("sliding_window"))
    spec.sliding_window = 4096;
  else if (keys.has("sliding_window"))
    spec.sliding_window = keys.size("sliding_window");
}

/// Qwen slides the layers from max_window_layers on, or those that layer_types names; we run a
/// model whose layers are all of one kind.
void read_qwen_window(Keys& keys, DecoderSpec& spec) {
  int64_t sliding = 0;
  const int64_t window = keys.size_or("sliding_window", 4096);
  if (!keys.flag_or("use_sliding_window", false)) return;
  if (keys.has("layer_types")) {
    const json& types = keys.config()["layer_types"];
    if (!types.is_array() || types.size() != static_cast<size_t>(spec.layers))
      return keys.wrong("layer_types", "one kind a layer");
    for (const json& type : types) {
      if (type != "full_attention" && type != "sliding_attention")
        return keys.wrong("layer_types", "full_attention or sliding_attention");
      sliding += type == "sliding_attention";
    }
  } else if (keys.config().contains("sliding_window") && !keys.has("sliding_window")) {
    return;  // null: no window
  } else {
    const json& first = keys.config().value("max_window_layers", json(28));
    if (!first.is_number_integer()) return keys.wrong("max_window_layers", "a number of layers");
    sliding = spec.layers - std::clamp<int64_t>(first.get<int64_t>(), 0, spec.layers);
  }
  if (sliding == spec.layers)
    spec.sliding_window = window;
  else if (sliding != 0)
    keys.fail(fmt::format(
        "mixes layers with and without a sliding window (got {} of {}; need all or none). Set "
        "\"use_sliding_window\" to false for prompts within the window.",
        sliding, spec.layers));
}

void read_qwen2(Keys& keys, DecoderSpec& spec) {
  read_llama_like(keys, spec, {.kv_heads = 32, .max_positions = 32768});
  spec.qkv_bias = true;
  read_qwen_window(keys, spec);
}

void read_qwen3(Keys& keys, DecoderSpec& spec) {
  read_llama_like(keys, spec, {.kv_heads = 32, .head_dim = 128, .max_positions = 32768});
  spec.qkv_bias = spec.o_bias = keys.flag_or("attention_bias", false);
  spec.qk_norm = true;
  spec.q_norm = "self_attn.q_norm";
  spec.k_norm = "self_attn.k_norm";
  read_qwen_window(keys, spec);
}

void read_arcee(Keys& keys, DecoderSpec& spec) {
  read_llama_like(keys, spec, {.max_positions = 4096, .norm_epsilon = 1e-5, .activation = "relu2"});
  spec.qkv_bias = spec.o_bias = keys.flag_or("attention_bias", false);
  spec.mlp_bias = keys.flag_or("mlp_bias", false);
  spec.gated = false;
  spec.gate.name.clear();
}

void read_opt(Keys& keys, DecoderSpec& spec) {
  spec.hidden = keys.size("hidden_size");
  spec.intermediate = keys.size("ffn_dim");
  spec.layers = keys.size("num_hidden_layers");
  spec.heads = spec.kv_heads = keys.size("num_attention_heads");
  spec.head_dim = default_head_dim(keys, spec);
  spec.vocab = keys.size("vocab_size");
  spec.max_positions = keys.size_or("max_position_embeddings", 2048);
  spec.embedding_width = keys.size_or("word_embed_proj_dim", spec.hidden);
  spec.norm = NormKind::kLayer;
  spec.norm_epsilon = 1e-5;  // torch's default; OPT has no key for it
  spec.pre_norm = keys.flag_or("do_layer_norm_before", true);
  spec.final_norm = spec.pre_norm && !keys.flag_or("_remove_final_layer_norm", false);
  spec.tied_embedding = keys.flag_or("tie_word_embeddings", true);
  read_activation(keys, "activation_function", "relu", spec);
  spec.gated = false;
  spec.qkv_bias = spec.o_bias = spec.mlp_bias = keys.flag_or("enable_bias", true);
  if (!keys.flag_or("layer_norm_elementwise_affine", true))
    keys.wrong("layer_norm_elementwise_affine", "true: norms without weights are not supported");
  spec.positions = Positions::kLearned;
  spec.position_offset = 2;
  spec.embedding = "model.decoder.embed_tokens";
  spec.position_embedding = "model.decoder.embed_positions";
  if (spec.embedding_width != spec.hidden) {
    spec.project_in = "model.decoder.project_in";
    spec.project_out = "model.decoder.project_out";
  }
  spec.final_norm_name = spec.final_norm ? "model.decoder.final_layer_norm" : "";
  spec.lm_head = spec.tied_embedding ? "" : "lm_head";
  spec.block_prefix_pattern = "model.decoder.layers.{}.";
  spec.attention_norm = "self_attn_layer_norm";
  spec.mlp_norm = "final_layer_norm";
  spec.q.name = "self_attn.q_proj";
  spec.k.name = "self_attn.k_proj";
  spec.v.name = "self_attn.v_proj";
  spec.o.name = "self_attn.out_proj";
  spec.up.name = "fc1";
  spec.down.name = "fc2";
}

struct Architecture {
  std::string_view name, model_type;
  void (*read)(Keys&, DecoderSpec&);
};

constexpr Architecture kArchitectures[] = {
    {"LlamaForCausalLM", "llama", read_llama}, {"MistralForCausalLM", "mistral", read_mistral},
    {"Qwen2ForCausalLM", "qwen2", read_qwen2}, {"Qwen3ForCausalLM", "qwen3", read_qwen3},
    {"ArceeForCausalLM", "arcee", read_arcee}, {"OPTForCausalLM", "opt", read_opt},
};

std::string known_architectures() {
  std::string names;
  for (const auto& a : kArchitectures)
    names += fmt::format("{}{}", names.empty() ? "" : ", ", a.name);
  return names;
}

void fill_linears(DecoderSpec& spec) {
  const int64_t q = spec.heads * spec.head_dim, kv = spec.kv_heads * spec.head_dim;
  const auto fill = [](LinearSpec& linear, int64_t out, int64_t in, bool bias) {
    linear.out = out, linear.in = in, linear.bias = bias;
  };
  fill(spec.q, q, spec.hidden, spec.qkv_bias);
  fill(spec.k, kv, spec.hidden, spec.qkv_bias);
  fill(spec.v, kv, spec.hidden, spec.qkv_bias);
  fill(spec.o, spec.hidden, q, spec.o_bias);
  if (spec.gated) fill(spec.gate, spec.intermediate, spec.hidden, spec.mlp_bias);
  fill(spec.up, spec.intermediate, spec.hidden, spec.mlp_bias);
  fill(spec.down, spec.hidden, spec.intermediate, spec.mlp_bias);
}

/// A token id or a list of them; null and absent give none.
std::vector<int64_t> token_list(const json& config, const char* key) {
  std::vector<int64_t> ids;
  const auto it = config.find(key);
  if (it == config.end()) return ids;
  if (it->is_number_integer()) ids.push_back(it->get<int64_t>());
  if (it->is_array())
    for (const json& id : *it)
      if (id.is_number_integer()) ids.push_back(id.get<int64_t>());
  return ids;
}

/// Ids must name tokens: they are fed to the model. No id is often written as -1.
Result<std::vector<int64_t>> within_vocabulary(std::vector<int64_t> ids, const char* key,
                                               const DecoderSpec& spec, const std::string& file) {
  std::erase(ids, -1);
  for (const int64_t id : ids)
    if (id < 0 || id >= spec.vocab)
      return bad_input(
          "{}: \"{}\" is outside the vocabulary (got {}; need 0 to {}). Is it the file that came "
          "with the weights?",
          file, key, id, spec.vocab - 1);
  return ids;
}

Status read_tokens(const json& config, const json* generation, const std::string& file,
                   DecoderSpec& spec) {
  const auto pick = [&](const char* key) {
    if (generation != nullptr && generation->is_object())
      if (auto ids = token_list(*generation, key); !ids.empty()) return ids;
    return token_list(config, key);
  };
  LACUNA_TRY(const auto bos, within_vocabulary(pick("bos_token_id"), "bos_token_id", spec, file));
  if (!bos.empty()) spec.bos_token = bos[0];
  LACUNA_TRY(spec.eos_tokens, within_vocabulary(pick("eos_token_id"), "eos_token_id", spec, file));
  return {};
}

void check_sizes(Keys& keys, const DecoderSpec& spec) {
  if (spec.heads % spec.kv_heads != 0)
    keys.fail(
        fmt::format("\"num_attention_heads\" {} is not a multiple of \"num_key_value_heads\" {}.",
                    spec.heads, spec.kv_heads));
  if (spec.positions == Positions::kRotary && spec.head_dim % 2 != 0)
    keys.fail(fmt::format("\"head_dim\" is odd (got {}; need an even one for rotary positions).",
                          spec.head_dim));
  if (!(spec.norm_epsilon >= 0))
    keys.fail("the epsilon of the norms is negative (need 0 or more).");
  const int64_t widest =
      std::max({spec.hidden, spec.intermediate, spec.embedding_width, spec.heads * spec.head_dim});
  if (widest > kLargestWidth || spec.layers > kMostLayers)
    keys.fail(fmt::format("sizes that no model has (got {} layers, width {}; need at most {}, {}).",
                          spec.layers, widest, kMostLayers, kLargestWidth));
}

}  // namespace

Result<DecoderSpec> decoder_spec(const json& config, const json* generation_config,
                                 const std::string& file) {
  if (!config.is_object()) return bad_input("{}: not a JSON object. Download it again.", file);
  Keys keys(config, file);
  DecoderSpec spec;
  if (const auto it = config.find("architectures");
      it != config.end() && it->is_array() && !it->empty() && it->front().is_string())
    spec.architecture = it->front().get<std::string>();
  spec.model_type = keys.text_or("model_type", "");
  const Architecture* found = nullptr;
  for (const Architecture& architecture : kArchitectures)
    if (spec.architecture.empty() ? architecture.model_type == spec.model_type
                                  : architecture.name == spec.architecture)
      found = &architecture;
  if (found == nullptr)
    return bad_input("{}: unknown architecture (got \"{}\"; need one of {}).", file,
                     spec.architecture.empty() ? spec.model_type : spec.architecture,
                     known_architectures());
  spec.architecture = found->name;
  spec.model_type = found->model_type;
  found->read(keys, spec);
  const char* dtype_key = keys.has("dtype") ? "dtype" : "torch_dtype";
  const auto dtype = dtype_from_long_name(keys.text_or(dtype_key, "float32"));
  if (dtype && is_float(*dtype))
    spec.dtype = *dtype;
  else
    keys.wrong(dtype_key, "float32, bfloat16 or float16");
  check_sizes(keys, spec);
  if (keys.error()) return *keys.error();
  fill_linears(spec);
  LACUNA_CHECK(read_tokens(config, generation_config, file, spec));
  return spec;
}

std::string DecoderSpec::block_prefix(int64_t layer) const {
  return fmt::format(fmt::runtime(block_prefix_pattern), layer);
}

std::string DecoderSpec::weight_name(int64_t layer, std::string_view linear) const {
  return fmt::format("{}{}.weight", block_prefix(layer), linear);
}

std::set<std::string> DecoderSpec::end_weights() const {
  std::set<std::string> names;
  for (const std::string* module : {&embedding, &lm_head})
    if (!module->empty()) names.insert(*module + ".weight");
  return names;
}

std::vector<LinearSpec> DecoderSpec::block_linears() const {
  std::vector<LinearSpec> linears = {q, k, v, o};
  if (gated) linears.push_back(gate);
  linears.push_back(up);
  linears.push_back(down);
  return linears;
}

std::vector<DecoderSpec::TensorSpec> DecoderSpec::tensors() const {
  std::vector<TensorSpec> all;
  const auto add = [&](const std::string& module, Shape shape) {
    if (!module.empty()) all.push_back({module + ".weight", std::move(shape)});
  };
  const auto add_norm = [&](const std::string& module, NormKind kind, int64_t width) {
    add(module, {width});
    if (kind == NormKind::kLayer && !module.empty()) all.push_back({module + ".bias", {width}});
  };
  add(embedding, {vocab, embedding_width});
  add(position_embedding, {max_positions + position_offset, hidden});
  add(project_in, {hidden, embedding_width});
  for (int64_t layer = 0; layer < layers; ++layer) {
    const std::string prefix = block_prefix(layer);
    add_norm(prefix + attention_norm, norm, hidden);
    for (const LinearSpec& linear : block_linears()) {
      add(prefix + linear.name, {linear.out, linear.in});
      if (linear.bias) all.push_back({prefix + linear.name + ".bias", {linear.out}});
    }
    if (qk_norm) {
      add_norm(prefix + q_norm, NormKind::kRms, head_dim);
      add_norm(prefix + k_norm, NormKind::kRms, head_dim);
    }
    add_norm(prefix + mlp_norm, norm, hidden);
  }
  add_norm(final_norm_name, norm, hidden);
  add(project_out, {embedding_width, hidden});
  add(lm_head, {vocab, embedding_width});
  return all;
}

std::vector<DecoderSpec::BlockWeight> DecoderSpec::block_weights() const {
  std::vector<BlockWeight> weights;
  const auto linears = block_linears();
  for (int64_t layer = 0; layer < layers; ++layer)
    for (const LinearSpec& linear : linears)
      weights.push_back({weight_name(layer, linear.name), layer, linear});
  return weights;
}

int64_t DecoderSpec::parameters() const {
  int64_t total = 0;
  for (const TensorSpec& tensor : tensors()) total += element_count(tensor.shape).value_or(0);
  return total;
}

}  // namespace lacuna::io
