#include "lacuna/eval/kl.h"

#include <algorithm>
#include <cmath>

namespace lacuna::eval {
namespace {

void append(std::vector<float>& to, const at::Tensor& values) {
  const at::Tensor held = values.to(at::kCPU, at::kFloat).contiguous();
  const float* data = held.const_data_ptr<float>();
  to.insert(to.end(), data, data + held.numel());
}

struct Moments {
  double mean = 0, deviation = 0, rms = 0;
};

Moments moments(const std::vector<float>& values) {
  const auto n = static_cast<double>(values.size());
  double sum = 0, squares = 0, spread = 0;
  for (const double v : values) sum += v, squares += v * v;
  const double mean = sum / n;
  for (const double v : values) spread += (v - mean) * (v - mean);
  return {mean, n > 1 ? std::sqrt(spread / (n - 1)) : 0, std::sqrt(squares / n)};
}

/// @param sorted  ascending
double quantile(const std::vector<float>& sorted, double fraction) {
  const double place = fraction * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<size_t>(place);
  const size_t above = std::min(below + 1, sorted.size() - 1);
  const double weight = place - static_cast<double>(below);
  return (1 - weight) * sorted[below] + weight * sorted[above];
}

}  // namespace

at::Tensor token_nll(const at::Tensor& logits, const at::Tensor& targets) {
  return at::logsumexp(logits, -1) - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1);
}

void KlCollector::add(const at::Tensor& model, const at::Tensor& reference,
                      const at::Tensor& targets) {
  const at::Tensor log_q = at::log_softmax(model, -1), log_p = at::log_softmax(reference, -1);
  append(kl_, (log_p.exp() * (log_p - log_q)).sum(-1));
  const auto true_p = [&](const at::Tensor& log_probabilities) {
    return log_probabilities.gather(-1, targets.unsqueeze(-1)).squeeze(-1).exp();
  };
  append(delta_p_, true_p(log_q) - true_p(log_p));
  same_top_ += model.argmax(-1).eq(reference.argmax(-1)).sum().item<int64_t>();
}

KlStatistics KlCollector::statistics() const {
  KlStatistics result;
  if (kl_.empty()) return result;
  const auto tokens = static_cast<double>(kl_.size());
  const Moments kl = moments(kl_), delta_p = moments(delta_p_);
  std::vector<float> sorted = kl_;
  std::sort(sorted.begin(), sorted.end());
  result.kl_mean = kl.mean;
  result.kl_stderr = kl.deviation / std::sqrt(tokens);
  result.kl_median = quantile(sorted, 0.5);
  result.kl_max = sorted.back();
  result.kl_p99 = quantile(sorted, 0.99);
  result.kl_p90 = quantile(sorted, 0.9);
  result.kl_p10 = quantile(sorted, 0.1);
  result.same_top = static_cast<double>(same_top_) / tokens;
  result.delta_p_mean = delta_p.mean;
  result.delta_p_rms = delta_p.rms;
  return result;
}

}  // namespace lacuna::eval
