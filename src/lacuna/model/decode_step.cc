#include "lacuna/model/decode_step.h"

#include <algorithm>

#include "lacuna/model/decode_device.h"
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
  const DType dtype;
  std::unique_ptr<DecodeDevice> device;
  const decode::Operations& run;
  at::Tensor arena;
  // Of kMaxTokens tokens each; `delta` is what the residual stream gains.
  std::byte *embedded = nullptr, *hidden = nullptr, *normed = nullptr, *q = nullptr, *k = nullptr,
            *v = nullptr, *attended = nullptr, *delta = nullptr, *gate = nullptr, *up = nullptr;
  std::byte* logits = nullptr;            // of one token
  std::byte* attend_workspace = nullptr;  // of attention over kMaxTokens tokens
  at::Tensor wide;                        // float32 [vocab]
  at::Tensor cos, sin;
  // Where the cache lay when the step was recorded, and how long its rows were.
  std::pair<const void*, int64_t> recorded_cache;

  State(const Decoder& of, KvCache& into, const decode::Operations* operations)
      : decoder(of),
        cache(into),
        spec(of.spec()),
        dtype(dtype_of(of.compute().dtype)),
        device(DecodeDevice::open(of.compute().device, kMaxTokens, operations)),
        run(device->operations()) {
    const int64_t q_width = spec.heads * spec.head_dim, kv_width = spec.kv_heads * spec.head_dim;
    const auto width = static_cast<int64_t>(size_bytes(dtype));
    struct Part {
      std::byte** at;
      int64_t bytes;
    };
    const auto rows = [&](int64_t elements) { return kMaxTokens * elements * width; };
    const std::vector<Part> parts = {
        {&embedded, rows(spec.embedding_width)},
        {&hidden, rows(spec.hidden)},
        {&normed, rows(spec.hidden)},
        {&q, rows(q_width)},
        {&k, rows(kv_width)},
        {&v, rows(kv_width)},
        {&attended, rows(q_width)},
        {&delta, rows(spec.hidden)},
        {&gate, rows(spec.intermediate)},
        {&up, rows(spec.intermediate)},
        {&logits, spec.vocab * width},
        {&attend_workspace,
         static_cast<int64_t>(run.attend_workspace_bytes(attend(0, kMaxTokens)))}};
    constexpr int64_t kAlignment = 256;
    const auto padded = [&](int64_t bytes) {
      return (bytes + kAlignment - 1) / kAlignment * kAlignment;
    };
    int64_t total = kAlignment;
    for (const Part& part : parts) total += padded(part.bytes);
    const auto options = at::TensorOptions().device(of.compute().device);
    arena = at::empty({total}, options.dtype(at::kByte));
    auto* next = static_cast<std::byte*>(arena.mutable_data_ptr());
    next += -reinterpret_cast<uintptr_t>(next) & (kAlignment - 1);
    for (const Part& part : parts) {
      *part.at = next;
      next += padded(part.bytes);
    }
    wide = at::empty({spec.vocab}, options.dtype(at::kFloat));
  }

  ~State() { device->finish(); }  // before the arena goes back
  State(const State&) = delete;
  State& operator=(const State&) = delete;

  decode::Attend attend(int64_t layer, int64_t tokens) const {
    return {.dtype = dtype,
            .tokens = tokens,
            .heads = spec.heads,
            .kv_heads = spec.kv_heads,
            .head_dim = spec.head_dim,
            .capacity = cache.reserved(),
            .window = spec.sliding_window.value_or(0),
            .q = q,
            .keys = cache.keys(layer).const_data_ptr(),
            .values = cache.values(layer).const_data_ptr(),
            .position = device->position(),
            .out = attended,
            .workspace = attend_workspace};
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
                  device->queue());
  }

  void apply(const Linear& linear, int64_t tokens, const void* x, void* y) {
    linear.forward_into(x, tokens, y, device->executor());
  }
  void apply(const Block& block, const io::LinearSpec& linear, int64_t tokens, const void* x,
             void* y) {
    apply(block.linear(linear.name), tokens, x, y);
  }

  void embed(const std::vector<int32_t>& ids) {
    const auto tokens = static_cast<int64_t>(ids.size());
    const Linear* project = decoder.ends().project_in();
    std::byte* rows = project != nullptr ? embedded : hidden;
    const Linear& embedding = decoder.ends().embedding();
    if (device->ids() != nullptr) {
      run.gather({.dtype = dtype,
                  .tokens = tokens,
                  .width = spec.embedding_width,
                  .table = embedding.weight().const_data_ptr(),
                  .ids = device->ids(),
                  .out = rows},
                 device->queue());
    } else {
      embedding.rows_into(ids.data(), tokens, rows, device->executor());
    }
    if (project != nullptr) apply(*project, tokens, embedded, hidden);
    const at::Tensor& positions = decoder.ends().position_embedding();
    if (!positions.defined()) return;
    run.gather({.dtype = dtype,
                .tokens = tokens,
                .width = spec.hidden,
                .table = positions.const_data_ptr(),
                .position = device->position(),
                .offset = spec.position_offset,
                .add = true,
                .out = hidden},
               device->queue());
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
                .keys = cache.keys(layer).mutable_data_ptr(),
                .values = cache.values(layer).mutable_data_ptr(),
                .position = device->position()},
               device->queue());
    run.attend(attend(layer, tokens), device->queue());
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
                 device->queue());
    apply(block, spec.down, tokens, up, delta);
  }

  /// The whole sequence, from ids to logits.
  void sequence(const std::vector<int32_t>& ids) {
    const auto tokens = static_cast<int64_t>(ids.size());
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
    finish(tokens, gained);
  }

  /// Logits of the last token alone.
  void finish(int64_t tokens, const void* gained) {
    const auto last = [&](const void* rows) -> const void* {
      if (rows == nullptr) return nullptr;
      return static_cast<const std::byte*>(rows) +
             (tokens - 1) * spec.hidden * static_cast<int64_t>(size_bytes(dtype));
    };
    const void* x = last(hidden);
    if (const Norm* norm = decoder.ends().final_norm()) {
      normalize(*norm, 1, x, last(gained), nullptr, normed);
      x = normed;
    } else if (gained != nullptr) {
      run.normalize({.dtype = dtype,
                     .rows = 1,
                     .width = spec.hidden,
                     .x = x,
                     .delta = last(gained),
                     .sum = normed},
                    device->queue());
      x = normed;
    }
    if (const Linear* project = decoder.ends().project_out()) {
      apply(*project, 1, x, embedded);
      x = embedded;
    }
    apply(decoder.ends().head(), 1, x, logits);
    run.widen({.dtype = dtype,
               .count = spec.vocab,
               .logits = logits,
               .wide = wide.mutable_data_ptr<float>(),
               .best = device->best()},
              device->queue());
  }

  /// Room in the cache, and the angles of every position that it has room for.
  void make_room(int64_t tokens) {
    cache.reserve(tokens);
    if (spec.positions == io::Positions::kRotary &&
        (!cos.defined() || cos.size(0) < cache.reserved()))
      std::tie(cos, sin) = decoder.rotary().at(0, cache.reserved());
    const std::pair place(cache.keys(0).const_data_ptr(), cache.reserved());
    if (place != recorded_cache) device->forget();
    recorded_cache = place;
  }

  int32_t step(const std::vector<int32_t>& ids) {
    const auto tokens = static_cast<int64_t>(ids.size());
    TORCH_CHECK(tokens > 0 && tokens <= kMaxTokens, "DecodeStep: ", tokens, " tokens (need 1..",
                kMaxTokens, ")");
    for (const int32_t id : ids)
      TORCH_CHECK(id >= 0 && id < spec.vocab, "DecodeStep: token ", id, " (need 0..",
                  spec.vocab - 1, ")");
    make_room(cache.length() + tokens);
    const int32_t best = device->run(ids, cache.length(), [&] { sequence(ids); });
    cache.advance(tokens);
    return best;
  }
};

std::optional<std::string> DecodeStep::refusal(const Decoder& decoder) {
  if (decoder.spec().head_dim > decode::kMaxHeadDim)
    return fmt::format("heads of {}", decoder.spec().head_dim);
  return DecodeDevice::refusal(decoder);
}

DecodeStep::DecodeStep(const Decoder& decoder, KvCache& cache,
                       const decode::Operations* operations) {
  const auto why_not = refusal(decoder);
  TORCH_CHECK(!why_not, "DecodeStep: ", *why_not);
  state_ = std::make_unique<State>(decoder, cache, operations);
}

DecodeStep::~DecodeStep() = default;

int32_t DecodeStep::run(const std::vector<int32_t>& ids) { return state_->step(ids); }
const at::Tensor& DecodeStep::logits() const { return state_->wide; }

}  // namespace lacuna::model
