// One description of a decoder-only transformer. Architectures fill it in from config.json;
// everything that runs, prunes or sizes a model reads it and never asks for an architecture's name.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "lacuna/core/activation.h"
#include "lacuna/core/bytes.h"
#include "lacuna/core/status.h"

namespace lacuna::io {

enum class NormKind : uint8_t { kRms, kLayer };
using lacuna::Activation;
enum class Positions : uint8_t { kRotary, kLearned };

/// A Linear of a block, named relative to the block: y = x W^T + b, W [out, in].
struct LinearSpec {
  std::string name;  ///< "self_attn.q_proj"; its tensors are PREFIX + name + ".weight" / ".bias"
  int64_t out = 0, in = 0;
  bool bias = false;
};

struct RopeSpec {
  double theta = 10000.0;
  /// "default", "linear" or "llama3"; others are refused by name
  std::string type = "default";
  double factor = 1.0, low_freq_factor = 1.0, high_freq_factor = 4.0;
  int64_t original_max_positions = 8192;
};

struct DecoderSpec {
  std::string architecture;  ///< "LlamaForCausalLM"
  std::string model_type;    ///< "llama"
  int64_t layers = 0, hidden = 0, intermediate = 0, heads = 0, kv_heads = 0, head_dim = 0;
  int64_t vocab = 0, max_positions = 0;
  int64_t embedding_width =
      0;  ///< differs from hidden where project_in/project_out exist (OPT-350M)
  NormKind norm = NormKind::kRms;
  double norm_epsilon = 1e-5;
  bool pre_norm = true;  ///< false: norm after each residual addition (OPT-350M)
  bool final_norm = true;
  bool qk_norm = false;  ///< RMSNorm over head_dim of q and k before rotary (Qwen3)
  Activation activation = Activation::kSilu;
  bool gated = true;  ///< down(act(gate x) * up x); otherwise down(act(up x))
  bool qkv_bias = false, o_bias = false, mlp_bias = false;
  Positions positions = Positions::kRotary;
  int64_t position_offset = 0;  ///< added to learned positions (OPT: 2)
  RopeSpec rope;
  std::optional<int64_t>
      sliding_window;  ///< attention sees the last N positions only (Mistral 7B v0.1)
  bool tied_embedding = false;
  DType dtype = DType::kBF16;  ///< as config.json declares
  std::optional<int64_t> bos_token;
  std::vector<int64_t> eos_tokens;  ///< generation_config.json over config.json

  // Module names, without ".weight". Empty = the model has none (lm_head: the embedding is tied).
  std::string embedding, position_embedding, final_norm_name, lm_head, project_in, project_out;
  std::string block_prefix_pattern;                      ///< "model.layers.{}."
  std::string attention_norm, mlp_norm, q_norm, k_norm;  ///< relative to the block
  LinearSpec q, k, v, o, gate, up, down;                 ///< gate.name is empty when not gated

  std::string block_prefix(int64_t layer) const;  ///< "model.layers.3."
  /// "model.layers.3.self_attn.q_proj.weight" of "self_attn.q_proj".
  std::string weight_name(int64_t layer, std::string_view linear) const;
  /// The weights of embedding and output matrix, which codes beside them make int8.
  std::set<std::string> end_weights() const;
  /// The block's Linears in the order of the forward pass: q k v o [gate] up down.
  std::vector<LinearSpec> block_linears() const;
  /// A weight of a block's Linear: what pruning aims at.
  struct BlockWeight {
    std::string name;  ///< "model.layers.3.self_attn.q_proj.weight"
    int64_t layer = 0;
    LinearSpec linear;
  };
  /// All of them, block by block.
  std::vector<BlockWeight> block_weights() const;
  /// Parameters of the whole model (tied embedding counted once).
  int64_t parameters() const;
  /// Names and shapes of every tensor that a checkpoint of this model holds.
  struct TensorSpec {
    std::string name;
    Shape shape;
  };
  std::vector<TensorSpec> tensors() const;
};

/// Reads config.json (Transformers 4 and 5 forms: rope_theta / rope_scaling or rope_parameters;
/// torch_dtype or dtype) and, when given, generation_config.json. Architectures: LlamaForCausalLM,
/// MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, ArceeForCausalLM, OPTForCausalLM.
/// @errors kBadInput: unknown architecture, activation or rope type (named, with the list of known
/// ones); missing or
///         contradictory sizes (key named)
Result<DecoderSpec> decoder_spec(const nlohmann::json& config,
                                 const nlohmann::json* generation_config, const std::string& file);

}  // namespace lacuna::io
