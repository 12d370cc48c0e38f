// Element types as safetensors names them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace lacuna {

enum class DType : uint8_t {
  kF32,
  kF16,
  kBF16,
  kF8E4M3,
  kF8E5M2,
  kI8,
  kU8,
  kI16,
  kI32,
  kU32,
  kI64,
  kF64,
  kBool
};

/// Bytes of one element.
size_t size_bytes(DType dtype);
/// "F32", "BF16", "F8_E4M3", ...: the names of the safetensors header.
std::string_view safetensors_name(DType dtype);
std::optional<DType> dtype_from_safetensors(std::string_view name);
/// "float32", "bfloat16", ...: the names of config.json and of --dtype.
std::string_view long_name(DType dtype);
std::optional<DType> dtype_from_long_name(std::string_view name);
inline bool is_float(DType d) {
  return d == DType::kF32 || d == DType::kF16 || d == DType::kBF16 || d == DType::kF8E4M3 ||
         d == DType::kF8E5M2 || d == DType::kF64;
}

}  // namespace lacuna
