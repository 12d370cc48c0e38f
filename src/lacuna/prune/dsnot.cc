#include <algorithm>
#include <cmath>
#include <vector>

#include "lacuna/prune/builtin.h"
#include "lacuna/prune/chunks.h"

namespace lacuna::prune {
namespace {

constexpr int kMostCycles = 50;
constexpr float kGoodEnough = 0.1f;  // of a row's summed error a sequence

/// One row of a mask: weights whose mean outputs cancel the row's mean error are let in again, and
/// those that cost least by Wanda's score go for them.
class Row {
 public:
  /// @param mean_part   w_j * mean sum of x_j over a sequence: what w_j adds to the row's output
  /// @param by_variance mean_part / var(x_j)
  /// @param wanda       |w_j| |x_j|
  Row(const float* mean_part, const float* by_variance, const float* wanda, bool* kept, int64_t n)
      : mean_part_(mean_part), by_variance_(by_variance), wanda_(wanda), kept_(kept), n_(n) {
    for (int64_t j = 0; j < n; ++j)
      if (!kept[j]) error_ += mean_part[j], dropped_.push_back(j);
    sort_by(dropped_, by_variance_);
  }

  /// Pairs anywhere in the row: what leaves has the sign that helps.
  void swap_anywhere() {
    std::vector<int64_t> positive, negative;
    for (int64_t j = 0; j < n_; ++j)
      if (kept_[j] && mean_part_[j] != 0) (mean_part_[j] > 0 ? positive : negative).push_back(j);
    sort_by(positive, wanda_);
    sort_by(negative, wanda_);
    size_t next_positive = 0, next_negative = 0;
    for (int cycle = 0; cycle < kMostCycles && wanted(); ++cycle) {
      const auto& leaving = error_ < 0 ? positive : negative;
      size_t& next = error_ < 0 ? next_positive : next_negative;
      if (next == leaving.size() || !swap(take_dropped(), leaving[next++])) return;
    }
  }

  /// Pairs within the group of what is let in.
  void swap_in_groups(int64_t of) {
    std::vector<bool> spent(static_cast<size_t>(n_));
    for (int cycle = 0; cycle < kMostCycles && wanted(); ++cycle) {
      const int64_t in = take_dropped(), first = in - in % of;
      int64_t out = -1;
      for (int64_t j = first; j < std::min(n_, first + of); ++j)
        if (kept_[j] && !spent[static_cast<size_t>(j)] && (out < 0 || wanda_[j] < wanda_[out]))
          out = j;
      if (out < 0 || !swap(in, out)) return;
      spent[static_cast<size_t>(in)] = true;  // what came in stays
    }
  }

 private:
  static void sort_by(std::vector<int64_t>& places, const float* key) {
    std::stable_sort(places.begin(), places.end(),
                     [key](int64_t a, int64_t b) { return key[a] < key[b]; });
  }
  bool wanted() const { return std::abs(error_) > kGoodEnough && low_ + high_ < dropped_.size(); }
  /// The dropped weight that takes most off the error for its input's variance.
  int64_t take_dropped() {
    return error_ > 0 ? dropped_[dropped_.size() - ++high_] : dropped_[low_++];
  }
  bool swap(int64_t in, int64_t out) {
    const float after = error_ + mean_part_[out] - mean_part_[in];
    if (!(after * error_ > 0)) return false;  // it would overshoot
    kept_[in] = true;
    kept_[out] = false;
    error_ = after;
    return true;
  }

  const float *mean_part_, *by_variance_, *wanda_;
  bool* kept_;
  int64_t n_;
  std::vector<int64_t> dropped_;
  size_t low_ = 0, high_ = 0;  // how many were taken from either end
  float error_ = 0;
};

/// Exchanges dropped and kept weights of a row until the mean error of its output is small; weights
/// keep their values. Looks at means and variances of the inputs only, so the error of the outputs
/// may well grow.
/// @paper Zhang et al., Dynamic Sparse No Training, https://arxiv.org/abs/2310.08915
class Dsnot final : public Refinement {
 public:
  std::string_view name() const override { return "dsnot"; }
  Needs needs() const override { return Needs::kNorms; }
  bool never_raises_the_damped_error() const override { return false; }
  bool takes_changed_weights() const override { return false; }

  Status refine(const Problem& problem, bool, Pruned& pruned) const override {
    const format::Pattern& pattern = problem.request.pattern;
    if (pattern.kind == format::PatternKind::kBlock)
      return usage_error("--refine dsnot: can't do {} (need unstructured or KEEP:OF).",
                         pattern.text());
    const InputStatistics& statistics = problem.statistics;
    if (!statistics.sums.defined())
      return usage_error("dsnot: needs the means of the inputs (got none).");
    const auto sequences = static_cast<double>(std::max<int64_t>(1, statistics.sequences));
    const auto tokens = static_cast<double>(std::max<int64_t>(1, statistics.tokens));
    const at::Tensor means = statistics.sums / tokens;
    const at::Tensor variance = (statistics.square_sums / tokens - means.square()).clamp_min(1e-20);
    // Short loops over single rows: on the CPU, wherever the weights are.
    const auto here = [](const at::Tensor& tensor) { return tensor.cpu().contiguous(); };
    const at::Tensor part = here(problem.weight * (statistics.sums / sequences));
    const at::Tensor by_variance = here(part / variance.to(part.device()));
    const at::Tensor wanda =
        here(problem.weight.abs() * (statistics.square_sums / sequences).sqrt());
    const at::Tensor mask = here(pruned.mask).clone();
    const int64_t n = mask.size(1);
    row_strips(mask, problem.request.executor, [&](int64_t first, int64_t count) {
      for (int64_t r = first; r < first + count; ++r) {
        Row row(part.const_data_ptr<float>() + r * n, by_variance.const_data_ptr<float>() + r * n,
                wanda.const_data_ptr<float>() + r * n, mask.mutable_data_ptr<bool>() + r * n, n);
        if (pattern.kind == format::PatternKind::kKeepOf)
          row.swap_in_groups(pattern.of);
        else
          row.swap_anywhere();
      }
    });
    pruned.mask = mask.to(problem.weight.device());
    pruned.weight = problem.weight.masked_fill(pruned.mask.logical_not(), 0);
    return {};
  }
};

}  // namespace

const Refinement& dsnot_refinement() {
  static const Dsnot refinement;
  return refinement;
}

}  // namespace lacuna::prune
