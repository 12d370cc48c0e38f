#pragma once
namespace lacuna {
inline constexpr const char* kVersion = "0.1.0";
/// Versions of what config.json declares (docs/formats.md). A model is written as the first that
/// has all it needs, so that early readers know it; they refuse later ones by their number. Version
/// 2 brought quantised weights, version 3 the exchange formats.
inline constexpr int kFormatVersion = 1;
inline constexpr int kQuantizedFormatVersion = 2;
inline constexpr int kExchangeFormatVersion = 3;
}  // namespace lacuna
