#include "lacuna/io/gguf/gguf_model.h"

#include <charconv>
#include <cmath>
#include <map>
#include <numbers>

#include "lacuna/io/decoder_spec.h"
#include "lacuna/io/gguf/gguf_keys.h"

namespace lacuna::io {
namespace {
using nlohmann::json;

constexpr const char* kEmbedding = "token_embd.weight";
constexpr const char* kOutput = "output.weight";
constexpr const char* kRopeFactors = "rope_freqs.weight";
constexpr const char* kQuery = "self_attn.q_proj";
constexpr const char* kKey = "self_attn.k_proj";

/// Hugging Face's module names and GGUF's.
constexpr std::pair<std::string_view, std::string_view> kModelModules[] = {
    {"model.embed_tokens", "token_embd"}, {"model.norm", "output_norm"}, {"lm_head", "output"}};
constexpr std::pair<std::string_view, std::string_view> kBlockModules[] = {
    {"input_layernorm", "attn_norm"},
    {kQuery, "attn_q"},
    {kKey, "attn_k"},
    {"self_attn.v_proj", "attn_v"},
    {"self_attn.o_proj", "attn_output"},
    {"post_attention_layernorm", "ffn_norm"},
    {"mlp.gate_proj", "ffn_gate"},
    {"mlp.up_proj", "ffn_up"},
    {"mlp.down_proj", "ffn_down"}};
constexpr std::string_view kBlocks = "model.layers.";

/// Keys that would change what the model computes, with the value that doesn't.
constexpr std::pair<const char*, double> kNeutral[] = {{"expert_count", 0},
                                                       {"attention.scale", 0},
                                                       {"attention.sliding_window", 0},
                                                       {"attention.clamp_kqv", 0},
                                                       {"attention.max_alibi_bias", 0},
                                                       {"attention.temperature_scale", 0},
                                                       {"attn_logit_softcapping", 0},
                                                       {"final_logit_softcapping", 0},
                                                       {"logit_scale", 1},
                                                       {"residual_scale", 1},
                                                       {"embedding_scale", 1}};

/// A name of the Hugging Face model, taken apart.
struct ModuleName {
  std::string gguf;         ///< "blk.3.attn_q.weight"; empty: GGUF has no such module
  std::string_view module;  ///< "self_attn.q_proj", of a block
};

ModuleName module_name(std::string_view name) {
  const size_t dot = name.rfind('.');
  const std::string_view suffix = name.substr(dot);  // ".weight" or ".bias"
  std::string_view module = name.substr(0, dot);
  if (!module.starts_with(kBlocks)) {
    for (const auto& [ours, theirs] : kModelModules)
      if (ours == module) return {fmt::format("{}{}", theirs, suffix), {}};
    return {};
  }
  module.remove_prefix(kBlocks.size());
  const std::string_view layer = module.substr(0, module.find('.'));
  module.remove_prefix(layer.size() + 1);
  for (const auto& [ours, theirs] : kBlockModules)
    if (ours == module) return {fmt::format("blk.{}.{}{}", layer, theirs, suffix), ours};
  return {};
}

/// The tensors of a file by name; those that find their place are taken out.
class TensorIndex {
 public:
  explicit TensorIndex(const GgufFile& file) : file_(file) {
    for (size_t i = 0; i < file.tensors().size(); ++i) index_[file.tensors()[i].name] = i;
  }
  bool contains(std::string_view name) const { return index_.find(name) != index_.end(); }
  /// The tensor `name`, of this shape; an extent of -1 matches any.
  Result<size_t> find(std::string_view name, const Shape& shape) const {
    const auto found = index_.find(name);
    if (found == index_.end())
      return bad_input("{}: has no tensor \"{}\". Get the model from another source.", file_.path(),
                       name);
    const Shape& got = file_.tensors()[found->second].shape;
    bool fits = got.size() == shape.size();
    for (size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] < 0 || shape[i] == got[i];
    if (!fits)
      return bad_input("{}: tensor \"{}\" has the wrong shape (got {}; need {}).", file_.path(),
                       name, shape_text(got), shape_text(shape));
    return found->second;
  }
  /// The same, taken out.
  Result<size_t> take(std::string_view name, const Shape& shape) {
    auto found = find(name, shape);
    if (found.ok()) index_.erase(index_.find(name));
    return found;
  }
  Status check_empty() const {
    if (index_.empty()) return {};
    return bad_input(
        "{}: tensor \"{}\" has no place in a Hugging Face model of this kind ({} such tensors). "
        "Lacuna doesn't read this model.",
        file_.path(), index_.begin()->first, index_.size());
  }

 private:
  const GgufFile& file_;
  std::map<std::string_view, size_t> index_;
};

/// What Llama-3.1 divides the rotary frequencies by, from the four numbers of its config.json.
std::vector<float> llama3_factors(int64_t head_dim, double theta, const RopeSpec& rope) {
  std::vector<float> factors;
  const auto original = static_cast<double>(rope.original_max_positions);
  for (int64_t i = 0; i < head_dim; i += 2) {
    const double wave = 2 * std::numbers::pi *
                        std::pow(theta, static_cast<double>(i) / static_cast<double>(head_dim));
    double factor = 1;
    if (wave > original / rope.low_freq_factor) {
      factor = rope.factor;
    } else if (wave >= original / rope.high_freq_factor) {
      const double smooth =
          (original / wave - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor);
      factor = 1 / ((1 - smooth) / rope.factor + smooth);
    }
    factors.push_back(static_cast<float>(factor));
  }
  return factors;
}

/// GGUF keeps Llama-3.1's scaled positions as a table of factors; config.json as four numbers. All
/// published models share three of them and differ in the factor, which the table ends with.
Result<json> llama3_scaling(const GgufFile& file, const GgufTensor& tensor, int64_t head_dim,
                            double theta) {
  std::vector<float> table(static_cast<size_t>(tensor.elements()));
  LACUNA_CHECK(dequantize(tensor, table.data(), Executor::serial()));
  RopeSpec rope;
  rope.factor = shortest_double(table.back());
  rope.low_freq_factor = 1;
  rope.high_freq_factor = 4;
  rope.original_max_positions = 8192;
  const std::vector<float> expected = llama3_factors(head_dim, theta, rope);
  bool same = rope.factor >= 1, scaled = false;
  for (size_t i = 0; i < table.size(); ++i) {
    same = same && std::abs(table[i] - expected[i]) <= 1e-4f * expected[i];
    scaled = scaled || table[i] != 1.0f;
  }
  if (!scaled) return json();
  if (!same)
    return bad_input(
        "{}: tensor \"{}\" scales the positions in a way that config.json can't say (need "
        "Llama-3.1's, "
        "with factors 1 and 4 over 8192 positions).",
        file.path(), kRopeFactors);
  return json{{"rope_type", "llama3"},
              {"factor", rope.factor},
              {"low_freq_factor", rope.low_freq_factor},
              {"high_freq_factor", rope.high_freq_factor},
              {"original_max_position_embeddings", rope.original_max_positions}};
}

/// rope.scaling.*, and rope.scale_linear of older files.
json linear_scaling(GgufKeys& keys, const std::string& prefix) {
  const std::string type_key = prefix + "rope.scaling.type";
  const std::string type = keys.text_or(type_key, "linear");
  double factor = keys.number_or(prefix + "rope.scale_linear", 1);
  factor = keys.number_or(prefix + "rope.scaling.factor", factor);
  if (type == "none") return nullptr;
  if (type != "linear")
    keys.fail(
        fmt::format("key \"{}\" is unknown (got \"{}\"; need none or linear).", type_key, type));
  if (factor == 0 || factor == 1) return nullptr;  // both say "unscaled"
  if (!(factor > 0))
    keys.fail(
        fmt::format("key \"{}rope.scaling.factor\" must be positive (got {}).", prefix, factor));
  return {{"rope_type", "linear"}, {"factor", factor}};
}

/// Sizes and numbers of config.json; positions, vocabulary and tokens are for the caller.
json read_sizes(GgufKeys& keys, const std::string& prefix) {
  const int64_t hidden = keys.size(prefix + "embedding_length");
  const int64_t heads = keys.size(prefix + "attention.head_count");
  const std::string key_length = prefix + "attention.key_length";
  if (!keys.has(key_length) && hidden % heads != 0)
    keys.fail(fmt::format(
        "key \"{}embedding_length\" must be a multiple of \"{}attention.head_count\" (got {}, {}).",
        prefix, prefix, hidden, heads));
  const int64_t head_dim = keys.size_or(key_length, std::max<int64_t>(1, hidden / heads));
  for (const char* same : {"attention.value_length", "rope.dimension_count"})
    if (const int64_t got = keys.size_or(prefix + same, head_dim); got != head_dim)
      keys.fail(fmt::format("key \"{}{}\" must be the size of a head (got {}; need {}).", prefix,
                            same, got, head_dim));
  for (const auto& [name, neutral] : kNeutral)
    if (const double got = keys.number_or(prefix + name, neutral); got != neutral)
      keys.fail(fmt::format(
          "key \"{}{}\" asks for what no Hugging Face model of this kind does (got {}; need {}).",
          prefix, name, got, neutral));
  if (!keys.flag_or(prefix + "attention.causal", true))
    keys.fail(fmt::format("key \"{}attention.causal\" must be true (got false).", prefix));
  return {{"hidden_size", hidden},
          {"intermediate_size", keys.size(prefix + "feed_forward_length")},
          {"num_hidden_layers", keys.size(prefix + "block_count")},
          {"num_attention_heads", heads},
          {"num_key_value_heads", keys.size_or(prefix + "attention.head_count_kv", heads)},
          {"head_dim", head_dim},
          {"max_position_embeddings", keys.size(prefix + "context_length")},
          {"rms_norm_eps", keys.number(prefix + "attention.layer_norm_rms_epsilon")},
          {"rope_theta", keys.number_or(prefix + "rope.freq_base", 10000)},
          {"hidden_act", "silu"},
          {"torch_dtype", "bfloat16"},
          {"use_cache", true}};
}

/// The token ids of config.json and generation_config.json.
json token_ids(const GgufTokenizer& tokenizer) {
  json ids = json::object();
  if (tokenizer.bos) ids["bos_token_id"] = *tokenizer.bos;
  if (tokenizer.pad) ids["pad_token_id"] = *tokenizer.pad;
  if (tokenizer.eos.size() == 1) ids["eos_token_id"] = tokenizer.eos[0];
  if (tokenizer.eos.size() > 1) ids["eos_token_id"] = tokenizer.eos;
  return ids;
}

}  // namespace

Result<GgufModel> describe_gguf(const GgufFile& file) {
  GgufKeys keys(file);
  const std::string architecture = keys.text("general.architecture");
  if (keys.error()) return *keys.error();
  const bool llama = architecture == "llama";
  if (!llama && architecture != "qwen2")
    return bad_input(
        "{}: key \"general.architecture\" is unknown (got \"{}\"; need llama or qwen2).",
        file.path(), architecture);
  GgufModel model;
  json& config = model.config;
  config = read_sizes(keys, architecture + ".");
  config["model_type"] = architecture;
  config["architectures"] = {llama ? "LlamaForCausalLM" : "Qwen2ForCausalLM"};
  json scaling = linear_scaling(keys, architecture + ".");
  if (keys.error()) return *keys.error();

  TensorIndex index(file);
  const auto head_dim = config["head_dim"].get<int64_t>();
  if (index.contains(kRopeFactors)) {
    LACUNA_TRY(const size_t at, index.take(kRopeFactors, {head_dim / 2}));
    if (!scaling.is_null() || head_dim < 2)
      return bad_input("{}: tensor \"{}\" scales positions that the keys scale, too.", file.path(),
                       kRopeFactors);
    LACUNA_TRY(scaling, llama3_scaling(file, file.tensors()[at], head_dim,
                                       config["rope_theta"].get<double>()));
  }
  if (!scaling.is_null()) config["rope_scaling"] = scaling;
  config["tie_word_embeddings"] = !index.contains(kOutput);
  if (llama) {
    config["attention_bias"] = index.contains("blk.0.attn_q.bias");
    config["mlp_bias"] = index.contains("blk.0.ffn_gate.bias");
  } else {
    config["use_sliding_window"] = false;
  }
  // The embedding decides how many tokens there are: some files pad it.
  LACUNA_TRY(const size_t embedding,
             index.find(kEmbedding, {-1, config["hidden_size"].get<int64_t>()}));
  config["vocab_size"] = file.tensors()[embedding].shape[0];
  LACUNA_TRY(const DecoderSpec spec, decoder_spec(config, nullptr, file.path()));
  for (const auto& [name, shape] : spec.tensors()) {
    const ModuleName module = module_name(name);
    LACUNA_TRY(const size_t at, index.take(module.gguf, shape));
    // Qwen2's rows lie in Hugging Face's order already.
    const bool reorder = llama && (module.module == kQuery || module.module == kKey);
    model.tensors.push_back({name, at, reorder ? spec.head_dim : 0});
  }
  LACUNA_CHECK(index.check_empty());

  LACUNA_TRY(model.tokenizer, gguf_tokenizer(file));
  if (model.tokenizer.tokens > spec.vocab)
    return bad_input(
        "{}: key \"tokenizer.ggml.tokens\" has more tokens than \"{}\" has rows (got {}; need at "
        "most "
        "{}).",
        file.path(), kEmbedding, model.tokenizer.tokens, spec.vocab);
  model.generation_config = token_ids(model.tokenizer);
  config.update(model.generation_config);
  return model;
}

}  // namespace lacuna::io
