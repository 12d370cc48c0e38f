#pragma once
namespace lacuna {
inline constexpr const char* kVersion = "0.1.0";
/// Version of the compact store on disk (docs/formats.md).
inline constexpr int kFormatVersion = 1;
}  // namespace lacuna
