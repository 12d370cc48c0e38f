#include "lacuna/kernels/linear_stream/value_chunk.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "lacuna/core/bytes.h"
#include "lacuna/core/cpu.h"

namespace lacuna::kernels::linear_stream {
namespace {

using stream::kValueBlockColumns;
using stream::kValueBlocks;
using stream::kValueMaskBytes;

int64_t pack_chunk_portable(ChunkRows& rows, uint8_t* chunk) {
  uint8_t* next = chunk + kValueMaskBytes;
  for (int64_t b = 0; b < kValueBlocks; ++b) {
    uint32_t mask = 0;
    for (int64_t r = 0; r < kTileRows; ++r) {
      const auto pair = static_cast<uint32_t>(rows.masks[r] >> (kValueBlockColumns * b) & 3);
      mask |= pair << (kValueBlockColumns * r);
      const int64_t bytes = 2 * std::popcount(pair);
      std::memcpy(next, rows.values[r], static_cast<size_t>(bytes));
      rows.values[r] += bytes;
      next += bytes;
    }
    std::memcpy(chunk + 4 * b, &mask, 4);
  }
  return next - chunk;
}

}  // namespace

int64_t unpack_chunk_portable(const uint8_t* chunk, ChunkWeights& out) {
  std::memset(out, 0, sizeof(out));
  const uint8_t* next = chunk + kValueMaskBytes;
  for (int64_t b = 0; b < kValueBlocks; ++b)
    for (auto left = read_unaligned<uint32_t>(chunk + 4 * b); left != 0; left &= left - 1) {
      const int bit = std::countr_zero(left);
      out[bit / kValueBlockColumns][kValueBlockColumns * b + bit % kValueBlockColumns] =
          read_unaligned<uint16_t>(next);
      next += 2;
    }
  return next - chunk;
}

std::span<const ChunkTool> chunk_tools() {
  static const ChunkTool all[] = {
#if defined(__x86_64__)
    {"avx512", cpu_features().avx512_vbmi2, pack_chunk_avx512, unpack_chunk_avx512},
#endif
    {"portable", true, pack_chunk_portable, unpack_chunk_portable},
  };
  return all;
}

const ChunkTool& chunk_tool() {
  static const ChunkTool& first =
      *std::ranges::find_if(chunk_tools(), [](const ChunkTool& tool) { return tool.runs_here; });
  return first;
}

}  // namespace lacuna::kernels::linear_stream
