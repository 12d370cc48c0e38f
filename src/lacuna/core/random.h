// Counter-based random numbers: the value depends on (seed, stream, index) alone, never on who asks
// first.
#pragma once

#include <cmath>
#include <cstdint>

namespace lacuna {

/// SplitMix64's finaliser over a mixed key: a stateless 64-bit hash of three counters.
inline uint64_t random_bits(uint64_t seed, uint64_t stream, uint64_t index) {
  const auto mix = [](uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  };
  return mix(mix(mix(seed + 0x9e3779b97f4a7c15ull) ^ (stream + 0xd1b54a32d192ed03ull)) +
             0x9e3779b97f4a7c15ull * (index + 1));
}

/// Uniform in [0, 1).
inline double random_uniform(uint64_t seed, uint64_t stream, uint64_t index) {
  return static_cast<double>(random_bits(seed, stream, index) >> 11) * 0x1p-53;
}

/// Standard normal (Box-Muller on two counters).
inline double random_normal(uint64_t seed, uint64_t stream, uint64_t index) {
  const double u = 1.0 - random_uniform(seed, stream, 2 * index);
  const double v = random_uniform(seed, stream, 2 * index + 1);
  return std::sqrt(-2.0 * std::log(u)) * std::cos(6.283185307179586 * v);
}

}  // namespace lacuna
