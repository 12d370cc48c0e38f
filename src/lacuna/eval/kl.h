// How far one model's predictions lie from another's, token by token.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "lacuna/eval/perplexity.h"

namespace lacuna::eval {

/// -log softmax(logits)[target] in nats: logits float32 [N, vocab], targets int64 [N] -> [N]
at::Tensor token_nll(const at::Tensor& logits, const at::Tensor& targets);

/// Collects KL(reference || model) = sum_v p_v (log p_v - log q_v) over tokens, and what goes with
/// it. Means in float64.
class KlCollector {
 public:
  /// @param model, reference  float32 [N, vocab] on one device
  /// @param targets  int64 [N]: the tokens that really follow
  void add(const at::Tensor& model, const at::Tensor& reference, const at::Tensor& targets);
  /// All of KlStatistics but the perplexities. Percentiles interpolate linearly.
  KlStatistics statistics() const;

 private:
  std::vector<float> kl_, delta_p_;
  int64_t same_top_ = 0;
};

}  // namespace lacuna::eval
