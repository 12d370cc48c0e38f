// One row of a bitmap and its values, written out densely: the inner loop of expand_rows().
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace lacuna::format {

/// Writes `columns` elements to `out`: the next of `values` where the bitmap has a 1, +0 elsewhere.
/// Nothing at or past `values_end` is read, nothing needs alignment.
/// @return how many values were used
using ExpandRow = int64_t (*)(const uint8_t* bitmap, int64_t columns, const std::byte* values,
                              const std::byte* values_end, std::byte* out);

/// One implementation for elements of two and of four bytes.
struct RowExpander {
  const char* name;
  bool runs_here;  ///< this CPU has what it needs
  ExpandRow two_bytes, four_bytes;
};

/// All of them, fastest first, the portable one last.
std::span<const RowExpander> row_expanders();
/// The first that runs here.
const RowExpander& row_expander();

// The implementations, one file each.
int64_t expand_row_u16_avx512(const uint8_t*, int64_t, const std::byte*, const std::byte*,
                              std::byte*);
int64_t expand_row_u32_avx512(const uint8_t*, int64_t, const std::byte*, const std::byte*,
                              std::byte*);
int64_t expand_row_u16_avx2(const uint8_t*, int64_t, const std::byte*, const std::byte*,
                            std::byte*);
int64_t expand_row_u32_avx2(const uint8_t*, int64_t, const std::byte*, const std::byte*,
                            std::byte*);

}  // namespace lacuna::format
