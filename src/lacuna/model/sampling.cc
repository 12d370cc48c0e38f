#include <algorithm>
#include <cmath>
#include <unordered_set>

#include "lacuna/core/random.h"
#include "lacuna/model/generate.h"

namespace lacuna::model {
namespace {

struct Candidate {
  int32_t id;
  float logit;
  double weight = 0;  ///< probability, up to a common factor
};

/// Most likely first; of equals the lower id.
bool likelier(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

/// Weights exp((logit - largest) / temperature); returns their sum.
double weigh(std::vector<Candidate>& candidates, float largest, double temperature) {
  double sum = 0;
  for (Candidate& c : candidates)
    sum += c.weight = std::exp((static_cast<double>(c.logit) - largest) / temperature);
  return sum;
}

/// Keeps the smallest set whose probabilities reach top_p.
void keep_nucleus(std::vector<Candidate>& candidates, double sum, double top_p) {
  // Everything below (1 - top_p) / n together weighs less than 1 - top_p: never in the set, and
  // not worth sorting.
  const double floor = (1 - top_p) * sum / static_cast<double>(candidates.size());
  std::erase_if(candidates, [&](const Candidate& c) { return c.weight < floor; });
  std::sort(candidates.begin(), candidates.end(), likelier);
  double reached = 0;
  size_t kept = 0;
  while (kept < candidates.size() && (kept == 0 || reached < top_p * sum))
    reached += candidates[kept++].weight;
  candidates.resize(kept);
}

}  // namespace

int32_t sample(const at::Tensor& logits, const std::vector<int32_t>& present,
               const GenerateOptions& options, uint64_t position) {
  TORCH_CHECK(logits.dim() == 1 && logits.scalar_type() == at::kFloat && logits.size(0) > 0,
              "sample: logits must be float32 [vocab]");
  const at::Tensor held = logits.contiguous();
  const float* values = held.const_data_ptr<float>();
  std::vector<Candidate> candidates(static_cast<size_t>(held.size(0)));
  for (size_t i = 0; i < candidates.size(); ++i)
    candidates[i] = {static_cast<int32_t>(i), values[i]};
  if (options.repetition_penalty != 1.0) {
    const auto penalty = static_cast<float>(options.repetition_penalty);
    for (const int32_t id : std::unordered_set<int32_t>(present.begin(), present.end())) {
      float& logit = candidates[static_cast<size_t>(id)].logit;
      logit = logit > 0 ? logit / penalty : logit * penalty;
    }
  }
  const Candidate best = *std::min_element(candidates.begin(), candidates.end(), likelier);
  if (options.temperature == 0) return best.id;

  if (options.top_k > 0 && options.top_k < static_cast<int64_t>(candidates.size())) {
    std::nth_element(candidates.begin(), candidates.begin() + options.top_k, candidates.end(),
                     likelier);
    candidates.resize(static_cast<size_t>(options.top_k));
  }
  double sum = weigh(candidates, best.logit, options.temperature);
  if (options.top_p < 1.0) keep_nucleus(candidates, sum, options.top_p);
  // The largest weight is 1.
  std::erase_if(candidates, [&](const Candidate& c) { return c.weight < options.min_p; });
  // One order whatever the filters left behind, so that the draw depends on the set alone.
  std::sort(candidates.begin(), candidates.end(),
            [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
  sum = 0;
  for (const Candidate& c : candidates) sum += c.weight;
  double left = random_uniform(options.seed, /*stream=*/0, position) * sum;
  for (const Candidate& c : candidates)
    if ((left -= c.weight) < 0) return c.id;
  return best.id;  // rounding alone leads here
}

}  // namespace lacuna::model
