#include <fmt/ranges.h>

#include <nlohmann/json.hpp>

#include "lacuna/model/synth.h"

namespace lacuna::model {
namespace {

using nlohmann::json;

/// Llama and its relatives: RMSNorm, rotary positions, gated SiLU.
struct LlamaShape {
  const char* name;
  const char* type;  ///< model_type
  int64_t hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, max_positions;
  double theta, epsilon;
  bool tied;
  double llama3_factor = 0;    ///< rope scaling of Llama 3.1 and 3.2; 0 = none
  int64_t sliding_window = 0;  ///< 0 = none
};

constexpr LlamaShape kLlamas[] = {
    {"smollm2-135m", "llama", 576, 1536, 30, 9, 3, 64, 49152, 8192, 1e5, 1e-5, true},
    {"smollm2-360m", "llama", 960, 2560, 32, 15, 5, 64, 49152, 8192, 1e5, 1e-5, true},
    {"smollm2-1.7b", "llama", 2048, 8192, 24, 32, 32, 64, 49152, 8192, 1.3e5, 1e-5, true},
    {"tinyllama-1.1b", "llama", 2048, 5632, 22, 32, 4, 64, 32000, 2048, 1e4, 1e-5, false},
    {"llama-2-7b", "llama", 4096, 11008, 32, 32, 32, 128, 32000, 4096, 1e4, 1e-5, false},
    {"llama-3-8b", "llama", 4096, 14336, 32, 32, 8, 128, 128256, 8192, 5e5, 1e-5, false},
    {"llama-3.1-8b", "llama", 4096, 14336, 32, 32, 8, 128, 128256, 131072, 5e5, 1e-5, false, 8},
    {"llama-3.2-1b", "llama", 2048, 8192, 16, 32, 8, 64, 128256, 131072, 5e5, 1e-5, true, 32},
    {"llama-3.2-3b", "llama", 3072, 8192, 28, 24, 8, 128, 128256, 131072, 5e5, 1e-5, true, 32},
    {"mistral-7b", "mistral", 4096, 14336, 32, 32, 8, 128, 32000, 32768, 1e4, 1e-5, false, 0, 4096},
    {"qwen2.5-0.5b", "qwen2", 896, 4864, 24, 14, 2, 64, 151936, 32768, 1e6, 1e-6, true},
    {"qwen2.5-1.5b", "qwen2", 1536, 8960, 28, 12, 2, 128, 151936, 131072, 1e6, 1e-6, true},
    {"qwen2.5-7b", "qwen2", 3584, 18944, 28, 28, 4, 128, 152064, 131072, 1e6, 1e-6, false},
    {"qwen3-0.6b", "qwen3", 1024, 3072, 28, 16, 8, 128, 151936, 40960, 1e6, 1e-6, true},
};

/// OPT: LayerNorm, learned positions, ReLU, biases everywhere.
struct OptShape {
  const char* name;
  int64_t hidden, intermediate, layers, heads, embedding_width;
  bool pre_norm;
};

constexpr OptShape kOpts[] = {
    {"opt-125m", 768, 3072, 12, 12, 768, true},    {"opt-350m", 1024, 4096, 24, 16, 512, false},
    {"opt-1.3b", 2048, 8192, 24, 32, 2048, true},  {"opt-2.7b", 2560, 10240, 32, 32, 2560, true},
    {"opt-6.7b", 4096, 16384, 32, 32, 4096, true},
};

json config_of(const LlamaShape& shape) {
  const std::string type = shape.type;
  const std::string architecture = type == "llama"     ? "LlamaForCausalLM"
                                   : type == "mistral" ? "MistralForCausalLM"
                                   : type == "qwen2"   ? "Qwen2ForCausalLM"
                                                       : "Qwen3ForCausalLM";
  json rope = {{"rope_type", "default"}, {"rope_theta", shape.theta}};
  if (shape.llama3_factor > 0)
    rope.update({{"rope_type", "llama3"},
                 {"factor", shape.llama3_factor},
                 {"low_freq_factor", 1.0},
                 {"high_freq_factor", 4.0},
                 {"original_max_position_embeddings", 8192}});
  json config = {{"architectures", {architecture}},
                 {"model_type", type},
                 {"hidden_act", "silu"},
                 {"hidden_size", shape.hidden},
                 {"intermediate_size", shape.intermediate},
                 {"num_hidden_layers", shape.layers},
                 {"num_attention_heads", shape.heads},
                 {"num_key_value_heads", shape.kv_heads},
                 {"head_dim", shape.head_dim},
                 {"vocab_size", shape.vocab},
                 {"max_position_embeddings", shape.max_positions},
                 {"rms_norm_eps", shape.epsilon},
                 {"rope_parameters", rope},
                 {"tie_word_embeddings", shape.tied}};
  if (shape.sliding_window > 0) config["sliding_window"] = shape.sliding_window;
  return config;
}

json config_of(const OptShape& shape) {
  return {{"architectures", {"OPTForCausalLM"}},
          {"model_type", "opt"},
          {"activation_function", "relu"},
          {"hidden_size", shape.hidden},
          {"ffn_dim", shape.intermediate},
          {"num_hidden_layers", shape.layers},
          {"num_attention_heads", shape.heads},
          {"word_embed_proj_dim", shape.embedding_width},
          {"do_layer_norm_before", shape.pre_norm},
          {"vocab_size", 50272},
          {"max_position_embeddings", 2048},
          {"bos_token_id", 2},
          {"eos_token_id", 2},
          {"pad_token_id", 1}};
}

}  // namespace

std::vector<std::string> synth_names() {
  std::vector<std::string> names;
  for (const auto& shape : kLlamas) names.emplace_back(shape.name);
  for (const auto& shape : kOpts) names.emplace_back(shape.name);
  return names;
}

Result<std::string> synth_config(const std::string& like) {
  for (const auto& shape : kLlamas)
    if (like == shape.name) return config_of(shape).dump(2);
  for (const auto& shape : kOpts)
    if (like == shape.name) return config_of(shape).dump(2);
  return usage_error("--like: unknown shape (got {}; need one of {}).", like,
                     fmt::join(synth_names(), ", "));
}

}  // namespace lacuna::model
