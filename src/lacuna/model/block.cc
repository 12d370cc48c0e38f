#include <algorithm>
#include <cmath>

#include "lacuna/model/decoder.h"
#include "lacuna/model/parts.h"

namespace lacuna::model {
namespace {

at::Tensor rotate(const at::Tensor& x, const std::pair<at::Tensor, at::Tensor>& angles) {
  const auto& [cos, sin] = angles;
  const int64_t half = x.size(-1) / 2;
  const at::Tensor turned = at::cat({x.narrow(-1, half, half).neg(), x.narrow(-1, 0, half)}, -1);
  return x * cos + turned * sin;
}

/// [B, T, ...] -> [B, count, ...]
at::Tensor last_tokens(const at::Tensor& x, int64_t count) {
  return x.narrow(1, x.size(1) - count, count);
}

/// [B, KVH, S, D] -> [B, H, S, D]: each key head serves H / KVH query heads in a row.
at::Tensor for_every_head(const at::Tensor& x, int64_t heads) {
  return heads == x.size(1) ? x : x.repeat_interleave(heads / x.size(1), 1);
}

/// Causal attention of the last T of S positions: q [B, H, T, D], k, v [B, KVH, S, D] ->
/// [B, T, H*D].
at::Tensor attend(const at::Tensor& q, at::Tensor k, at::Tensor v, std::optional<int64_t> window) {
  const int64_t batch = q.size(0), heads = q.size(1), tokens = q.size(2), width = q.size(3);
  if (window && k.size(2) > *window + tokens - 1) {  // keys that not even the first token sees
    const int64_t seen = *window + tokens - 1;
    k = k.narrow(2, k.size(2) - seen, seen);
    v = v.narrow(2, v.size(2) - seen, seen);
  }
  const int64_t positions = k.size(2), past = positions - tokens;
  at::Tensor out;
  if (tokens == 1) {
    // The query heads that share a key head stand in for tokens: no key is copied.
    out = at::scaled_dot_product_attention(q.reshape({batch, k.size(1), -1, width}), k, v);
    return out.reshape({batch, 1, heads * width});
  }
  k = for_every_head(k, heads);
  v = for_every_head(v, heads);
  if (past == 0 && (!window || positions <= *window)) {
    out = at::scaled_dot_product_attention(q, k, v, {}, 0.0, /*is_causal=*/true);
  } else {
    at::Tensor mask = at::ones({tokens, positions}, q.options().dtype(at::kBool)).tril_(past);
    if (window) mask.triu_(past - *window + 1);
    out = at::scaled_dot_product_attention(q, k, v, mask);
  }
  return out.transpose(1, 2).reshape({batch, tokens, heads * width});
}

template <class Part>
const Part& named(const std::vector<std::pair<std::string, Part>>& parts, std::string_view name) {
  const auto found = std::find_if(parts.begin(), parts.end(),
                                  [&](const auto& entry) { return entry.first == name; });
  TORCH_CHECK(found != parts.end(), "Block: no part is called ", std::string(name));
  return found->second;
}

}  // namespace

struct Block::State {
  int64_t layer = 0, heads = 0, kv_heads = 0, head_dim = 0;
  bool pre_norm = true, rotary = true;
  io::Activation activation = io::Activation::kSilu;
  std::optional<int64_t> window;
  std::vector<std::pair<std::string, Norm>> norms;      // attention, mlp [q k]
  std::vector<std::pair<std::string, Linear>> linears;  // q k v o [gate] up down

  enum Place { kQ, kK, kV, kO };
  enum NormPlace { kAttention, kMlp, kQNorm, kKNorm };
  bool qk_norm() const { return norms.size() == 4; }
  bool gated() const { return linears.size() == 7; }

  at::Tensor apply(size_t place, const at::Tensor& x, const LinearObserver* observer) const {
    const auto& [name, linear] = linears[place];
    if (observer != nullptr) (*observer)(name, x);
    return linear.forward(x);
  }

  /// `count` Linears from `place` on, which all read x: one product where they are slices of one.
  std::vector<at::Tensor> apply_all(size_t place, size_t count, const at::Tensor& x,
                                    const LinearObserver* observer) const {
    std::vector<const Linear*> parts;
    std::vector<int64_t> widths;
    for (size_t i = place; i < place + count; ++i) {
      parts.push_back(&linears[i].second);
      widths.push_back(parts.back()->out_features());
    }
    const Linear* whole = Linear::whole_of(parts);
    std::vector<at::Tensor> each;
    for (size_t i = place; i < place + count; ++i) {
      if (whole == nullptr)
        each.push_back(apply(i, x, observer));
      else if (observer != nullptr)
        (*observer)(linears[i].first, x);
    }
    return whole == nullptr ? each : whole->forward(x).split_with_sizes(widths, -1);
  }

  at::Tensor normalize(NormPlace place, const at::Tensor& x) const {
    return norms[place].second.forward(x);
  }

  /// [B, T, heads*D] -> [B, heads, T, D]
  at::Tensor split(const at::Tensor& x, int64_t count) const {
    return x.view({x.size(0), x.size(1), count, head_dim}).transpose(1, 2);
  }

  /// x [B, T, hidden] -> [B, count, hidden], of the last `count` tokens.
  at::Tensor attention(const at::Tensor& x, int64_t count, const Rotary& positions, KvCache* cache,
                       const LinearObserver* observer) const {
    const std::vector<at::Tensor> qkv = apply_all(kQ, 3, x, observer);
    at::Tensor q = split(last_tokens(qkv[kQ], count), heads);
    at::Tensor k = split(qkv[kK], kv_heads);
    at::Tensor v = split(qkv[kV], kv_heads);
    if (qk_norm()) {
      q = normalize(kQNorm, q);
      k = normalize(kKNorm, k);
    }
    if (rotary) {
      const int64_t start = cache != nullptr ? cache->length() : 0, tokens = x.size(1);
      q = rotate(q, positions.at(start + tokens - count, count));
      k = rotate(k, positions.at(start, tokens));
    }
    if (cache != nullptr) std::tie(k, v) = cache->append(layer, k, v);
    return apply(kO, attend(q, k, v, window), observer);
  }

  /// What down reads.
  at::Tensor widened(const at::Tensor& x, const LinearObserver* observer) const {
    const size_t up = linears.size() - 2, gate = up - 1;
    if (!gated()) return activate(activation, apply(up, x, observer));
    const std::vector<at::Tensor> both = apply_all(gate, 2, x, observer);
    return activate(activation, both[0]) * both[1];
  }

  /// hidden [B, T, hidden] -> [B, count, hidden] of the last `count` tokens; nothing, and what lies
  /// behind the last observed input left out, unless `outputs` are wanted.
  at::Tensor run(const at::Tensor& hidden, int64_t count, const Rotary& positions, KvCache* cache,
                 const LinearObserver* observer, bool outputs) const {
    at::Tensor middle =
        last_tokens(hidden, count) + attention(pre_norm ? normalize(kAttention, hidden) : hidden,
                                               count, positions, cache, observer);
    if (!pre_norm) middle = normalize(kAttention, middle);
    const at::Tensor wide = widened(pre_norm ? normalize(kMlp, middle) : middle, observer);
    const auto& [name, down] = linears.back();
    if (observer != nullptr) (*observer)(name, wide);
    if (!outputs) return {};
    const at::Tensor out = middle + down.forward(wide);
    return pre_norm ? out : normalize(kMlp, out);
  }
};

Result<Block> Block::load(const io::Checkpoint& checkpoint, const io::DecoderSpec& spec,
                          int64_t layer, const Compute& compute) {
  auto state = std::make_shared<State>();
  state->layer = layer;
  state->heads = spec.heads;
  state->kv_heads = spec.kv_heads;
  state->head_dim = spec.head_dim;
  state->pre_norm = spec.pre_norm;
  state->rotary = spec.positions == io::Positions::kRotary;
  state->activation = spec.activation;
  state->window = spec.sliding_window;
  const std::string prefix = spec.block_prefix(layer);
  const auto add_norm = [&](const std::string& name, io::NormKind kind, int64_t width) -> Status {
    LACUNA_TRY(Norm norm,
               Norm::read(checkpoint, prefix + name, kind, spec.norm_epsilon, width, compute));
    state->norms.emplace_back(name, std::move(norm));
    return {};
  };
  LACUNA_CHECK(add_norm(spec.attention_norm, spec.norm, spec.hidden));
  LACUNA_CHECK(add_norm(spec.mlp_norm, spec.norm, spec.hidden));
  if (spec.qk_norm) {
    LACUNA_CHECK(add_norm(spec.q_norm, io::NormKind::kRms, spec.head_dim));
    LACUNA_CHECK(add_norm(spec.k_norm, io::NormKind::kRms, spec.head_dim));
  }
  // In the order of the forward pass, those that read the same x together.
  std::vector<std::vector<io::LinearSpec>> groups = {{spec.q, spec.k, spec.v}, {spec.o}};
  groups.push_back(spec.gated ? std::vector{spec.gate, spec.up} : std::vector{spec.up});
  groups.push_back({spec.down});
  for (const std::vector<io::LinearSpec>& group : groups) {
    LACUNA_TRY(std::vector<Linear> read, read_linears(checkpoint, prefix, group, compute));
    for (size_t i = 0; i < group.size(); ++i)
      state->linears.emplace_back(group[i].name, std::move(read[i]));
  }
  Block block;
  block.state_ = std::move(state);
  return block;
}

at::Tensor Block::forward(const at::Tensor& hidden, const Rotary& rotary, KvCache* cache,
                          std::optional<int64_t> last) const {
  return state_->run(hidden, last.value_or(hidden.size(1)), rotary, cache, nullptr, true);
}

at::Tensor Block::observe(const at::Tensor& hidden, const Rotary& rotary,
                          const LinearObserver& observer, bool outputs) const {
  return state_->run(hidden, hidden.size(1), rotary, nullptr, &observer, outputs);
}

std::vector<std::string> Block::linear_names() const {
  std::vector<std::string> names;
  for (const auto& [name, linear] : state_->linears) names.push_back(name);
  return names;
}

const Linear& Block::linear(std::string_view name) const { return named(state_->linears, name); }

const Norm& Block::norm(std::string_view name) const { return named(state_->norms, name); }

Linear& Block::linear(std::string_view name) {
  return const_cast<Linear&>(std::as_const(*this).linear(name));
}

size_t Block::weight_bytes() const {
  const State& s = *state_;
  size_t bytes = 0;
  for (const auto& [name, norm] : s.norms) bytes += norm.bytes();
  for (const auto& [name, linear] : s.linears) bytes += linear.weight_bytes();
  return bytes;
}

}  // namespace lacuna::model
