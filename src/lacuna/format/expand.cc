#include "lacuna/format/expand.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "lacuna/core/cpu.h"

namespace lacuna::format {
namespace {

/// Zeroes the row, then walks the set bits.
template <size_t kWidth>
int64_t expand_row_portable(const uint8_t* bitmap, int64_t columns, const std::byte* values,
                            const std::byte*, std::byte* out) {
  std::memset(out, 0, static_cast<size_t>(columns) * kWidth);
  const std::byte* next = values;
  for (int64_t byte = 0; byte < (columns + 7) / 8; ++byte)
    for (unsigned bits = bitmap[byte]; bits; bits &= bits - 1, next += kWidth)
      std::memcpy(out + static_cast<size_t>(byte * 8 + std::countr_zero(bits)) * kWidth, next,
                  kWidth);
  return (next - values) / static_cast<int64_t>(kWidth);
}

}  // namespace

std::span<const RowExpander> row_expanders() {
  static const RowExpander all[] = {
#if defined(__x86_64__)
    {"avx512", cpu_features().avx512_vbmi2, expand_row_u16_avx512, expand_row_u32_avx512},
    {"avx2", cpu_features().avx2, expand_row_u16_avx2, expand_row_u32_avx2},
#endif
    {"portable", true, expand_row_portable<2>, expand_row_portable<4>},
  };
  return all;
}

const RowExpander& row_expander() {
  static const RowExpander& first =
      *std::ranges::find_if(row_expanders(), [](const RowExpander& e) { return e.runs_here; });
  return first;
}

}  // namespace lacuna::format
