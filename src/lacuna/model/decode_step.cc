#include "lacuna/model/decode_step.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "lacuna/model/parts.h"

namespace lacuna::model {

namespace decode = kernels::decode;

namespace {

const void* data(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

}  // namespace

struct DecodeStep::State {
  const Decoder& decoder;
  KvCache& cache;
  const io::DecoderSpec& spec;
  const decode::Operations& run;
  const DType dtype;
  ThreadPool pool;
  Executor executor;
  at::Tensor arena;
  // Of kMaxTokens tokens each; `delta` is what the residual stream gains.
  std::byte *embedded, *hidden, *normed, *q, *k, *v, *attended, *delta, *gate, *up;
  std::byte* logits;  // of one token
  at::Tensor wide;    // float32 [vocab]
  at::Tensor cos, sin;
  int32_t position = 0, best = 0;

  State(const Decoder& of, KvCache& into, const decode::Operations& operations)
      : decoder(of),
        cache(into),
        spec(of.spec()),
        run(operations),
        dtype(dtype_of(of.compute().dtype)),
        pool(at::get_num_threads()),
        executor(pool.executor()) {
    const int64_t q_width = spec.heads * spec.head_dim, kv_width = spec.kv_heads * spec.head_dim;
    struct Part {
      std::byte** at;
      int64_t elements;
    };
    const std::vector<Part> parts = {{&embedded, kMaxTokens * spec.embedding_width},
                                     {&hidden, kMaxTokens * spec.hidden},
                                     {&normed, kMaxTokens * std::max(spec.hidden, q_width)},
                                     {&q, kMaxTokens * q_width},
                                     {&k, kMaxTokens * kv_width},
                                     {&v, kMaxTokens * kv_width},
                                     {&attended, kMaxTokens * q_width},
                                     {&delta, kMaxTokens * spec.hidden},
                                     {&gate, kMaxTokens * spec.intermediate},
                                     {&up, kMaxTokens * spec.intermediate},
                                     {&logits, spec.vocab}};
    constexpr int64_t kLine = 64;
    const auto padded = [&](const Part& part) {
      const int64_t bytes = part.elements * static_cast<int64_t>(size_bytes(dtype));
      return (bytes + kLine - 1) / kLine * kLine;
    };
    int64_t total = 0;
    for (const Part& part : parts) total += padded(part);
    arena = at::empty({total}, at::kByte);
    auto* next = static_cast<std::byte*>(arena.mutable_data_ptr());
    for (const Part& part : parts) {
      *part.at = next;
      next += padded(part);
    }
    wide = at::empty({spec.vocab}, at::kFloat);
  }

  /// sum = x + delta, out = norm(sum); see decode::Normalize.
  void normalize(const Norm& norm, int64_t rows, const void* x, const void* add, void* sum,
                 void* out) {
    run.normalize({.dtype = dtype,
                   .rows = rows,
                   .width = norm.weight().numel(),
                   .x = x,
                   .delta = add,
                   .sum = sum,
                   .weight = norm.weight().const_data_ptr(),
                   .bias = norm.bias() ? norm.bias()->const_data_ptr() : nullptr,
                   .epsilon = static_cast<float>(norm.epsilon()),
                   .out = out},
                  &executor);
  }

  void apply(const Block& block, const io::LinearSpec& linear, int64_t tokens, const void* x,
             void* y) {
    block.linear(linear.name).forward_into(x, tokens, y, executor);
  }

  void embed(const std::vector<int32_t>& ids) {
    const auto tokens = static_cast<int64_t>(ids.size());
    const Linear* project = decoder.ends().project_in();
    std::byte* rows = project != nullptr ? embedded : hidden;
    decoder.ends().embedding().rows_into(ids.data(), tokens, rows, executor);
    if (project != nullptr) project->forward_into(embedded, tokens, hidden, executor);
    const at::Tensor& positions = decoder.ends().position_embedding();
    if (!positions.defined()) return;
    run.gather({.dtype = dtype,
                .tokens = tokens,
                .width = spec.hidden,
                .table = positions.const_data_ptr(),
                .position = &position,
                .offset = spec.position_offset,
                .add = true,
                .out = hidden},
               &executor);
  }

  /// delta = o(attention(x)).
  void attention(const Block& block, int64_t layer, int64_t tokens, const void* x) {
    apply(block, spec.q, tokens, x, q);
    apply(block, spec.k, tokens, x, k);
    apply(block, spec.v, tokens, x, v);
    if (spec.qk_norm) {
      normalize(block.norm(spec.q_norm), tokens * spec.heads, q, nullptr, nullptr, q);
      normalize(block.norm(spec.k_norm), tokens * spec.kv_heads, k, nullptr, nullptr, k);
    }
    void* keys = cache.keys(layer).mutable_data_ptr();
    void* values = cache.values(layer).mutable_data_ptr();
    run.rotate({.dtype = dtype,
                .tokens = tokens,
                .heads = spec.heads,
                .kv_heads = spec.kv_heads,
                .head_dim = spec.head_dim,
                .capacity = cache.reserved(),
                .q = q,
                .k = k,
                .v = v,
                .cos = data(cos),
                .sin = data(sin),
                .keys = keys,
                .values = values,
                .position = &position},
               &executor);
    run.attend({.dtype = dtype,
                .tokens = tokens,
                .heads = spec.heads,
                .kv_heads = spec.kv_heads,
                .head_dim = spec.head_dim,
                .capacity = cache.reserved(),
                .window = spec.sliding_window.value_or(0),
                .q = q,
                .keys = keys,
                .values = values,
                .position = &position,
                .out = attended},
               &executor);
    apply(block, spec.o, tokens, attended, delta);
  }

  /// delta = down(act(gate(x)) * up(x)).
  void feed_forward(const Block& block, int64_t tokens, const void* x) {
    if (spec.gated) apply(block, spec.gate, tokens, x, gate);
    apply(block, spec.up, tokens, x, up);
    run.activate({.dtype = dtype,
                  .activation = spec.activation,
                  .count = tokens * spec.intermediate,
                  .gate = spec.gated ? gate : nullptr,
                  .up = up,
                  .out = up},
                 &executor);
    apply(block, spec.down, tokens, up, delta);
  }

  StepResult step(const std::vector<int32_t>& ids) {
    const auto tokens = static_cast<int64_t>(ids.size());
    TORCH_CHECK(tokens > 0 && tokens <= kMaxTokens, "DecodeStep: ", tokens, " tokens");
    make_room(cache.length() + tokens);
    position = static_cast<int32_t>(cache.length());
    embed(ids);
    const void* gained = nullptr;  // what the block before has left in `delta`
    for (int64_t layer = 0; layer < spec.layers; ++layer) {
      const Block& block = decoder.blocks()[static_cast<size_t>(layer)];
      const Norm& first = block.norm(spec.attention_norm);
      const Norm& second = block.norm(spec.mlp_norm);
      if (spec.pre_norm) {
        normalize(first, tokens, hidden, gained, hidden, normed);
        attention(block, layer, tokens, normed);
        normalize(second, tokens, hidden, delta, hidden, normed);
        feed_forward(block, tokens, normed);
        gained = delta;
      } else {
        attention(block, layer, tokens, hidden);
        normalize(first, tokens, hidden, delta, nullptr, hidden);
        feed_forward(block, tokens, hidden);
        normalize(second, tokens, hidden, delta, nullptr, hidden);
      }
    }
    cache.advance(tokens);
    return finish(tokens, gained);
  }

  /// Logits of the last token alone.
  StepResult finish(int64_t tokens, const void* gained) {
    const auto last = [&](const void* rows) {
      return static_cast<const std::byte*>(rows) +
             (tokens - 1) * spec.hidden * static_cast<int64_t>(size_bytes(dtype));
    };
    const void* x = last(hidden);
    const Norm* norm = decoder.ends().final_norm();
    if (norm != nullptr || gained != nullptr) {
      decode::Normalize n{.dtype = dtype,
                          .rows = 1,
                          .width = spec.hidden,
                          .x = x,
                          .delta = gained != nullptr ? last(gained) : nullptr};
      if (norm == nullptr) {
        n.sum = normed;
        run.normalize(n, &executor);
      } else {
        normalize(*norm, 1, x, n.delta, nullptr, normed);
      }
      x = normed;
    }
    if (const Linear* project = decoder.ends().project_out()) {
      project->forward_into(x, 1, embedded, executor);
      x = embedded;
    }
    decoder.ends().head().forward_into(x, 1, logits, executor);
    auto* floats = wide.mutable_data_ptr<float>();
    run.widen(
        {.dtype = dtype, .count = spec.vocab, .logits = logits, .wide = floats, .best = &best},
        &executor);
    return {floats, best};
  }

  /// Room in the cache, and the angles of every position that it has room for.
  void make_room(int64_t tokens) {
    cache.reserve(tokens);
    if (spec.positions != io::Positions::kRotary) return;
    if (!cos.defined() || cos.size(0) < cache.reserved())
      std::tie(cos, sin) = decoder.rotary().at(0, cache.reserved());
  }
};

std::optional<std::string> DecodeStep::refusal(const Decoder& decoder) {
  if (!decoder.compute().device.is_cpu()) return "a GPU";
  if (decoder.spec().head_dim > decode::kMaxHeadDim)
    return fmt::format("heads of {}", decoder.spec().head_dim);
  return std::nullopt;
}

DecodeStep::DecodeStep(const Decoder& decoder, KvCache& cache, const decode::Operations* operations)
    : state_(std::make_unique<State>(
          decoder, cache,
          operations != nullptr ? *operations : *decode::cpu_operations().front())) {
  TORCH_CHECK(!refusal(decoder), "DecodeStep: ", *refusal(decoder));
}

DecodeStep::~DecodeStep() = default;

StepResult DecodeStep::run(const std::vector<int32_t>& ids) { return state_->step(ids); }

}  // namespace lacuna::model
