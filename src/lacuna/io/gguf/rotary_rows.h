// Two orders of the rows of q and k.
#pragma once

#include <cstdint>

namespace lacuna::io {

/// Rotary positions turn pairs of rows of a head. Meta's files, llama2.c and GGUF's llama kind keep
/// the pairs as neighbours (2i, 2i+1), Hugging Face as halves (i, i + head/2). Gives the row of the
/// former that becomes `row` of the latter.
inline int64_t neighbour_row(int64_t row, int64_t head_rows) {
  const int64_t half = head_rows / 2;
  const int64_t within = row % head_rows;
  return row - within + within % half * 2 + within / half;
}

}  // namespace lacuna::io
