#pragma once
namespace lacuna {
inline constexpr const char* kVersion = "0.1.0";
/// Versions of the compact store on disk (docs/formats.md). A model without quantised weights is
/// written as version 1, which the first readers know; they refuse version 2 by its number.
inline constexpr int kFormatVersion = 1;
inline constexpr int kQuantizedFormatVersion = 2;
}  // namespace lacuna
