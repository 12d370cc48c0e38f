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
  const int64_t sequences, most_tokens;
  std::unique_ptr<DecodeDevice> device;
  const decode::Operations& run;
  at::Tensor arena;
  // Of most_tokens tokens each; `delta` is what the residual stream gains. q, k and v, as well as
  // gate and up, lie side by side, token by token, where one product makes them, else one after the
  // other.
  std::byte *embedded = nullptr, *hidden = nullptr, *normed = nullptr, *qkv = nullptr,
            *attended = nullptr, *delta = nullptr, *gate_up = nullptr, *active = nullptr;
  std::byte* logits = nullptr;            // of one token of each sequence
  std::byte* attend_workspace = nullptr;  // of attention over most_tokens tokens
  std::byte* widen_workspace = nullptr;
  at::Tensor wide;  // float32 [vocab], or of each sequence
  at::Tensor cos, sin;
  // Where the cache lay when the step was recorded, and how long its rows were.
  std::pair<const void*, int64_t> recorded_cache;
  /// The Linears of a block; `qkv` and `gate_up` where they are one.
  struct Products {
    const Linear *qkv, *q, *k, *v, *o, *gate_up, *gate, *up, *down;
  };
  std::vector<Products> products;

  State(const Decoder& of, KvCache& into, const decode::Operations* operations)
      : decoder(of),
        cache(into),
        spec(of.spec()),
        dtype(dtype_of(of.compute().dtype)),
        sequences(into.batch()),
        most_tokens(sequences > 1 ? sequences : kMaxTokens),
        device(DecodeDevice::open(of.compute().device, most_tokens, sequences, operations)),
        run(device->operations()) {
    const int64_t q_width = spec.heads * spec.head_dim, kv_width = spec.kv_heads * spec.head_dim;
    const auto width = static_cast<int64_t>(size_bytes(dtype));
    struct Part {
      std::byte** at;
      int64_t bytes;
    };
    const auto rows = [&](int64_t elements) { return most_tokens * elements * width; };
    const std::vector<Part> parts = {
        {&embedded, rows(spec.embedding_width)},
        {&hidden, rows(spec.hidden)},
        {&normed, rows(spec.hidden)},
        {&qkv, rows(q_width + 2 * kv_width)},
        {&attended, rows(q_width)},
        {&delta, rows(spec.hidden)},
        {&gate_up, rows((spec.gated ? 2 : 1) * spec.intermediate)},
        {&active, rows(spec.intermediate)},
        {&logits, sequences * spec.vocab * width},
        {&attend_workspace,
         static_cast<int64_t>(run.attend_workspace_bytes(attend(0, most_tokens, 0)))},
        {&widen_workspace, sequences * decode::kWidenWorkspaceBytes}};
    constexpr int64_t kAlignment = 256;
    const auto padded = [&](int64_t bytes) {
      return (bytes + kAlignment - 1) / kAlignment * kAlignment;
    };
    int64_t total = kAlignment;
    for (const Part& part : parts) total += padded(part.bytes);
    const auto options = at::TensorOptions().device(of.compute().device);
    arena = at::zeros({total}, options.dtype(at::kByte));  // the workspaces want it so
    auto* next = static_cast<std::byte*>(arena.mutable_data_ptr());
    next += -reinterpret_cast<uintptr_t>(next) & (kAlignment - 1);
    for (const Part& part : parts) {
      *part.at = next;
      next += padded(part.bytes);
    }
    wide = at::empty({sequences, spec.vocab}, options.dtype(at::kFloat));
    if (sequences == 1) wide = wide.view({spec.vocab});
    for (const Block& block : of.blocks()) {
      const auto linear = [&](const io::LinearSpec& named) { return &block.linear(named.name); };
      Products p = {.q = linear(spec.q),
                    .k = linear(spec.k),
                    .v = linear(spec.v),
                    .o = linear(spec.o),
                    .gate = spec.gated ? linear(spec.gate) : nullptr,
                    .up = linear(spec.up),
                    .down = linear(spec.down)};
      p.qkv = Linear::whole_of({p.q, p.k, p.v});
      p.gate_up = spec.gated ? Linear::whole_of({p.gate, p.up}) : nullptr;
      products.push_back(p);
    }
  }

  ~State() { device->finish(); }  // before the arena goes back
  State(const State&) = delete;
  State& operator=(const State&) = delete;

  /// Elements of a layer's keys that one sequence of several has.
  int64_t sequence_stride() const {
    return sequences > 1 ? spec.kv_heads * cache.reserved() * spec.head_dim : 0;
  }

  /// @param stride  of the rows of q; 0: side by side
  decode::Attend attend(int64_t layer, int64_t tokens, int64_t stride) const {
    return {.dtype = dtype,
            .tokens = tokens,
            .heads = spec.heads,
            .kv_heads = spec.kv_heads,
            .head_dim = spec.head_dim,
            .capacity = cache.reserved(),
            .window = spec.sliding_window.value_or(0),
            .q_stride = stride,
            .sequence_stride = sequence_stride(),
            .q = qkv,
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
  /// So many elements further on.
  std::byte* after(std::byte* from, int64_t elements) const {
    return from + elements * static_cast<int64_t>(size_bytes(dtype));
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
                .own_sequences = sequences > 1,
                .add = true,
                .out = hidden},
               device->queue());
  }

  /// delta = o(attention(x)).
  void attention(const Block& block, int64_t layer, int64_t tokens, const void* x) {
    const Products& p = products[static_cast<size_t>(layer)];
    const int64_t q_width = spec.heads * spec.head_dim, kv_width = spec.kv_heads * spec.head_dim;
    const bool joined = p.qkv != nullptr;
    const int64_t rows = joined ? 1 : tokens, stride = joined ? q_width + 2 * kv_width : 0;
    std::byte* const q = qkv;
    std::byte* const k = after(q, rows * q_width);
    std::byte* const v = after(k, rows * kv_width);
    if (joined) {
      apply(*p.qkv, tokens, x, qkv);
    } else {
      apply(*p.q, tokens, x, q);
      apply(*p.k, tokens, x, k);
      apply(*p.v, tokens, x, v);
    }
    if (spec.qk_norm) {
      const int64_t at_once = joined ? 1 : tokens;  // whose heads lie side by side
      for (int64_t t = 0; t < tokens; t += at_once) {
        const auto heads = [&](const Norm& norm, int64_t count, std::byte* first) {
          void* const from = after(first, t * stride);
          normalize(norm, at_once * count, from, nullptr, nullptr, from);
        };
        heads(block.norm(spec.q_norm), spec.heads, q);
        heads(block.norm(spec.k_norm), spec.kv_heads, k);
      }
    }
    run.rotate_and_attend({.dtype = dtype,
                           .tokens = tokens,
                           .heads = spec.heads,
                           .kv_heads = spec.kv_heads,
                           .head_dim = spec.head_dim,
                           .capacity = cache.reserved(),
                           .stride = stride,
                           .sequence_stride = sequence_stride(),
                           .q = q,
                           .k = k,
                           .v = v,
                           .cos = data(cos),
                           .sin = data(sin),
                           .keys = cache.keys(layer).mutable_data_ptr(),
                           .values = cache.values(layer).mutable_data_ptr(),
                           .position = device->position()},
                          attend(layer, tokens, stride), device->queue());
    apply(*p.o, tokens, attended, delta);
  }

  /// delta = down(act(gate(x)) * up(x)).
  void feed_forward(int64_t layer, int64_t tokens, const void* x) {
    const Products& p = products[static_cast<size_t>(layer)];
    const int64_t width = spec.intermediate;
    const bool joined = p.gate_up != nullptr;
    std::byte* const gate = gate_up;
    std::byte* const up = spec.gated ? after(gate, (joined ? 1 : tokens) * width) : gate_up;
    if (joined) {
      apply(*p.gate_up, tokens, x, gate_up);
    } else {
      if (spec.gated) apply(*p.gate, tokens, x, gate);
      apply(*p.up, tokens, x, up);
    }
    run.activate({.dtype = dtype,
                  .activation = spec.activation,
                  .count = tokens * width,
                  .width = width,
                  .stride = joined ? 2 * width : 0,
                  .gate = spec.gated ? gate : nullptr,
                  .up = up,
                  .out = active},
                 device->queue());
    apply(*p.down, tokens, active, delta);
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
        feed_forward(layer, tokens, normed);
        gained = delta;
      } else {
        attention(block, layer, tokens, hidden);
        normalize(first, tokens, hidden, delta, nullptr, hidden);
        feed_forward(layer, tokens, hidden);
        normalize(second, tokens, hidden, delta, nullptr, hidden);
      }
    }
    finish(tokens, gained);
  }

  /// Logits of the last token of each sequence.
  void finish(int64_t tokens, const void* gained) {
    const auto last = [&](const void* of) -> const void* {
      if (of == nullptr) return nullptr;
      return static_cast<const std::byte*>(of) +
             (tokens - sequences) * spec.hidden * static_cast<int64_t>(size_bytes(dtype));
    };
    const void* x = last(hidden);
    if (const Norm* norm = decoder.ends().final_norm()) {
      normalize(*norm, sequences, x, last(gained), nullptr, normed);
      x = normed;
    } else if (gained != nullptr) {
      run.normalize({.dtype = dtype,
                     .rows = sequences,
                     .width = spec.hidden,
                     .x = x,
                     .delta = last(gained),
                     .sum = normed},
                    device->queue());
      x = normed;
    }
    if (const Linear* project = decoder.ends().project_out()) {
      apply(*project, sequences, x, embedded);
      x = embedded;
    }
    apply(decoder.ends().head(), sequences, x, logits);
    run.widen({.dtype = dtype,
               .count = spec.vocab,
               .rows = sequences,
               .logits = logits,
               .wide = wide.mutable_data_ptr<float>(),
               .best = device->best(),
               .workspace = widen_workspace},
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

  void check(const std::vector<int32_t>& ids) const {
    for (const int32_t id : ids)
      TORCH_CHECK(id >= 0 && id < spec.vocab, "DecodeStep: token ", id, " (need 0..",
                  spec.vocab - 1, ")");
  }

  int32_t step(const std::vector<int32_t>& ids) {
    const auto tokens = static_cast<int64_t>(ids.size());
    TORCH_CHECK(sequences == 1 && tokens > 0 && tokens <= kMaxTokens, "DecodeStep: ", tokens,
                " tokens of one of ", sequences, " sequences (need 1..", kMaxTokens, " of one)");
    check(ids);
    make_room(cache.length() + tokens);
    const auto position = static_cast<int32_t>(cache.length());
    const auto best = device->run(ids, {position}, [&] { sequence(ids); });
    cache.advance(tokens);
    return best.front();
  }

  std::vector<int32_t> step_each(const std::vector<int32_t>& ids, std::vector<int32_t>& lengths) {
    TORCH_CHECK(static_cast<int64_t>(ids.size()) == sequences && lengths.size() == ids.size(),
                "DecodeStep: ", ids.size(), " tokens of ", lengths.size(),
                " lengths (need one for ", "each of ", sequences, " sequences)");
    check(ids);
    const int32_t longest = *std::max_element(lengths.begin(), lengths.end());
    TORCH_CHECK(longest <= cache.length(), "DecodeStep: a sequence of ", longest,
                " tokens in a cache of ", cache.length());
    make_room(longest + 1);
    auto best = device->run(ids, lengths, [&] { sequence(ids); });
    for (int32_t& length : lengths) ++length;
    if (longest == cache.length()) cache.advance(1);
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
std::vector<int32_t> DecodeStep::run_each(const std::vector<int32_t>& ids,
                                          std::vector<int32_t>& lengths) {
  return state_->step_each(ids, lengths);
}
const at::Tensor& DecodeStep::logits() const { return state_->wide; }

}  // namespace lacuna::model
