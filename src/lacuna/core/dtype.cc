#include "lacuna/core/dtype.h"

namespace lacuna {
namespace {

struct Row {
  DType dtype;
  size_t bytes;
  std::string_view safetensors;
  std::string_view longer;
};

constexpr Row kRows[] = {
    {DType::kF32, 4, "F32", "float32"},
    {DType::kF16, 2, "F16", "float16"},
    {DType::kBF16, 2, "BF16", "bfloat16"},
    {DType::kF8E4M3, 1, "F8_E4M3", "float8_e4m3fn"},
    {DType::kF8E5M2, 1, "F8_E5M2", "float8_e5m2"},
    {DType::kI8, 1, "I8", "int8"},
    {DType::kU8, 1, "U8", "uint8"},
    {DType::kI16, 2, "I16", "int16"},
    {DType::kI32, 4, "I32", "int32"},
    {DType::kU32, 4, "U32", "uint32"},
    {DType::kI64, 8, "I64", "int64"},
    {DType::kF64, 8, "F64", "float64"},
    {DType::kBool, 1, "BOOL", "bool"},
};

const Row& row(DType dtype) { return kRows[static_cast<size_t>(dtype)]; }

}  // namespace

size_t size_bytes(DType dtype) { return row(dtype).bytes; }
std::string_view safetensors_name(DType dtype) { return row(dtype).safetensors; }
std::string_view long_name(DType dtype) { return row(dtype).longer; }

std::optional<DType> dtype_from_safetensors(std::string_view name) {
  for (const Row& r : kRows)
    if (r.safetensors == name) return r.dtype;
  return std::nullopt;
}

std::optional<DType> dtype_from_long_name(std::string_view name) {
  for (const Row& r : kRows)
    if (r.longer == name) return r.dtype;
  return std::nullopt;
}

}  // namespace lacuna
