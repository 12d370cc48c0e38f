// Decoder-only transformers, built from one description (io::DecoderSpec) and run through torch.
#pragma once

#include <ATen/ATen.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "lacuna/core/status.h"
#include "lacuna/io/checkpoint.h"
#include "lacuna/io/decoder_spec.h"
#include "lacuna/model/linear.h"
#include "lacuna/model/torch.h"

namespace lacuna::model {

/// Keys and values of the tokens so far, one contiguous pair of buffers a layer, growing by
/// doubling up to the model's positions (append() throws past them).
class KvCache {
 public:
  KvCache(const io::DecoderSpec& spec, int64_t batch, const Compute& compute);
  int64_t batch() const { return keys_.empty() ? 1 : keys_.front().size(0); }  ///< sequences
  int64_t length() const { return length_; }  ///< tokens already in the cache
  void advance(int64_t tokens) { length_ += tokens; }
  void clear() { length_ = 0; }
  /// Appends k, v [B, KVH, T, D] of one layer after `length()` and returns all keys and values so
  /// far.
  std::pair<at::Tensor, at::Tensor> append(int64_t layer, const at::Tensor& k, const at::Tensor& v);
  /// Makes room for this many tokens in all, up to the model's positions.
  void reserve(int64_t tokens);
  int64_t reserved() const { return keys_.empty() ? 0 : keys_.front().size(2); }
  /// [B, KVH, reserved(), D] of one layer; good until more room is made.
  const at::Tensor& keys(int64_t layer) const { return keys_[static_cast<size_t>(layer)]; }
  const at::Tensor& values(int64_t layer) const { return values_[static_cast<size_t>(layer)]; }
  size_t bytes() const;

 private:
  int64_t length_ = 0, capacity_ = 0;
  std::vector<at::Tensor> keys_, values_;
};

/// Called with the name of a Linear ("self_attn.q_proj") and its input [B, T, in].
using LinearObserver = std::function<void(std::string_view name, const at::Tensor& input)>;

/// Cosines and sines of the rotary positions, with the scaling of the spec (linear, llama3).
class Rotary {
 public:
  Rotary() = default;
  Rotary(const io::DecoderSpec& spec, const Compute& compute);
  /// cos, sin [T, head_dim] of positions first .. first+tokens-1, in the dtype of the computation
  std::pair<at::Tensor, at::Tensor> at(int64_t first, int64_t tokens) const;

 private:
  struct Memo;                    // the last answer
  at::Tensor inverse_frequency_;  // float32 [head_dim/2]
  Compute compute_;
  std::shared_ptr<Memo> memo_;
};

class Norm;

/// One transformer block.
class Block {
 public:
  /// Reads the block's tensors from the folder. @errors kBadInput: a tensor missing or of the wrong
  /// shape (named)
  static Result<Block> load(const io::Checkpoint& checkpoint, const io::DecoderSpec& spec,
                            int64_t layer, const Compute& compute);
  /// hidden [B, T, hidden] -> the same shape, or [B, last, hidden] of the last tokens only. Causal;
  /// with a cache the T tokens follow those in it (the caller advances the cache once all blocks
  /// have run).
  at::Tensor forward(const at::Tensor& hidden, const Rotary& rotary, KvCache* cache = nullptr,
                     std::optional<int64_t> last = std::nullopt) const;
  /// Shows what each Linear reads, and gives what forward() gives; without `outputs` an undefined
  /// tensor, and the last Linear's product isn't computed.
  at::Tensor observe(const at::Tensor& hidden, const Rotary& rotary, const LinearObserver& observer,
                     bool outputs) const;
  /// The block's Linears by relative name, in the order of the forward pass.
  std::vector<std::string> linear_names() const;
  Linear& linear(std::string_view name);
  const Linear& linear(std::string_view name) const;
  /// A norm by the name that the spec gives it.
  const Norm& norm(std::string_view name) const;
  size_t weight_bytes() const;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

/// What stands before and after the blocks: embedding, learned positions, projections, final norm,
/// output matrix.
class Ends {
 public:
  static Result<Ends> load(const io::Checkpoint& checkpoint, const io::DecoderSpec& spec,
                           const Compute& compute);
  /// ids int64 [B, T] -> hidden [B, T, hidden]; `first` is the position of the first token
  at::Tensor embed(const at::Tensor& ids, int64_t first = 0) const;
  /// hidden [B, T, hidden] -> logits float32 [B, T, vocab]
  at::Tensor logits(const at::Tensor& hidden) const;
  /// The parts, which live as long as this; those that a model may lack are null or undefined.
  const Linear& embedding() const;
  const at::Tensor& position_embedding() const;  ///< [max_positions + position_offset, hidden]
  const Linear* project_in() const;
  const Linear* project_out() const;
  const Norm* final_norm() const;
  const Linear& head() const;
  /// Projections and the output matrix; they live as long as this.
  std::vector<const Linear*> linears() const;
  size_t weight_bytes() const;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

/// A whole model in memory.
class Decoder {
 public:
  static Result<Decoder> load(const io::Checkpoint& checkpoint, const Compute& compute);
  const io::DecoderSpec& spec() const { return spec_; }
  const Compute& compute() const { return compute_; }
  /// ids int64 [B, T] -> final hidden states [B, T, hidden] (before the final norm), or
  /// [B, last, hidden] of the last tokens only. With a cache, advances it.
  at::Tensor hidden(const at::Tensor& ids, KvCache* cache = nullptr,
                    std::optional<int64_t> last = std::nullopt) const;
  /// ids int64 [B, T] -> logits float32 [B, T, vocab]; last_only: [B, 1, vocab]
  at::Tensor forward(const at::Tensor& ids, KvCache* cache = nullptr, bool last_only = false) const;
  const Ends& ends() const { return ends_; }
  const std::vector<Block>& blocks() const { return blocks_; }
  const Rotary& rotary() const { return rotary_; }
  /// Every Linear of the model, blocks first; they live as long as this.
  std::vector<const Linear*> linears() const;
  size_t weight_bytes() const;

 private:
  io::DecoderSpec spec_;
  Compute compute_;
  Rotary rotary_;
  Ends ends_;
  std::vector<Block> blocks_;
};

/// Spec of a model folder: config.json and generation_config.json of a checkpoint.
Result<io::DecoderSpec> spec_of(const io::Checkpoint& checkpoint);

}  // namespace lacuna::model
