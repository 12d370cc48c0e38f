// Medians and percentiles of repeated timings.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

namespace lacuna::bench {

/// The middle and the edges of a set of measurements, by nearest rank.
struct Summary {
  double median = 0, p10 = 0, p90 = 0;
};

inline Summary summarize(std::vector<double> samples) {
  if (samples.empty()) return {};
  std::sort(samples.begin(), samples.end());
  const auto at = [&](double share) {
    const double rank = std::ceil(share * static_cast<double>(samples.size()));
    return samples[static_cast<size_t>(std::max(rank, 1.0)) - 1];
  };
  return {at(0.5), at(0.1), at(0.9)};
}

/// a[i] / b[i], for as many as both have: what a drift of the machine hits alike cancels.
inline std::vector<double> paired_ratios(const std::vector<double>& a,
                                         const std::vector<double>& b) {
  std::vector<double> ratios(std::min(a.size(), b.size()));
  for (size_t i = 0; i < ratios.size(); ++i) ratios[i] = a[i] / b[i];
  return ratios;
}

}  // namespace lacuna::bench
