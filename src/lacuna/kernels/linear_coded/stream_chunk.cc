#include "lacuna/kernels/linear_coded/stream_chunk.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "lacuna/core/cpu.h"
#include "lacuna/format/codes.h"
#include "lacuna/kernels/linear_coded/stream_codes.h"

namespace lacuna::kernels::linear_coded {
namespace {

using format::Code;

/// What the blocks of a chunk keep, and all codes in their places.
struct Blocks {
  uint64_t masks[kBlocks] = {};
  ChunkCodes codes = {};
};

int8_t code_at(Code code, const uint8_t* codes, int64_t index) {
  if (code == Code::kInt8) return static_cast<int8_t>(codes[index]);
  return static_cast<int8_t>((codes[index / 2] >> (index % 2 * 4) & 15) - format::kInt4Zero);
}

void gather(Code code, ChunkRows& rows, Blocks& blocks, ChunkSums& sums) {
  std::memset(sums, 0, sizeof(sums));
  for (int64_t r = 0; r < kTileRows; ++r) {
    const uint64_t mask = rows.masks[r];
    for (int64_t b = 0; b < kBlocks; ++b)
      blocks.masks[b] |= (mask >> (kBlockColumns * b) & 15) << (kBlockColumns * r);
    int64_t index = 0;
    for (uint64_t left = mask; left != 0; left &= left - 1) {
      const int64_t column = std::countr_zero(left);
      const int8_t q = code_at(code, rows.codes[r], index++);
      blocks.codes[column / kBlockColumns][kBlockColumns * r + column % kBlockColumns] = q;
      sums[column / (kChunk / 2)][r] += q;
    }
    rows.codes[r] += format::code_bytes(code, index);
  }
}

/// @return bytes written
int64_t write_codes(Code code, Masks kind, const Blocks& blocks, uint8_t* const out) {
  const auto mask = [&](int64_t block) {
    return kind == Masks::kNone ? kAllKept : blocks.masks[block];
  };
  if (code == Code::kInt8) {
    uint8_t* next = out;
    for (int64_t pair = 0; pair < kPairs; ++pair)
      for (const int64_t block : {pair, pair + kPairs})
        for_each_kept(blocks.codes[block], mask(block),
                      [&](int8_t q) { *next++ = static_cast<uint8_t>(q); });
    return next - out;
  }
  std::memset(out, 0, static_cast<size_t>(kBlocks * kBlockWeights / 2));
  uint8_t *low = out, *high = out;
  for (int64_t pair = 0; pair < kPairs; ++pair) {
    const int64_t other = pair + kPairs;
    const bool shared = kind == Masks::kShared;
    const uint64_t both = mask(pair) | mask(other);
    for_each_kept(blocks.codes[pair], shared ? both : mask(pair), [&](int8_t q) {
      *low = static_cast<uint8_t>((*low & 0xf0) | (q & 15));
      ++low;
    });
    for_each_kept(blocks.codes[other], shared ? both : mask(other), [&](int8_t q) {
      *high = static_cast<uint8_t>((*high & 15) | (q << 4));
      ++high;
    });
  }
  return std::max(low, high) - out;
}

int64_t pack_chunk_portable(Code code, Masks kind, ChunkRows& rows, uint8_t* masks, uint8_t* codes,
                            ChunkSums& sums) {
  Blocks blocks;
  gather(code, rows, blocks, sums);
  for (int64_t i = 0; i < mask_count(kind); ++i) {
    const uint64_t other = kind == Masks::kShared ? blocks.masks[i + kPairs] : 0;
    const uint64_t mask = blocks.masks[i] | other;
    std::memcpy(masks + 8 * i, &mask, 8);
  }
  return write_codes(code, kind, blocks, codes);
}

}  // namespace

std::span<const ChunkPacker> chunk_packers() {
  static const ChunkPacker all[] = {
#if defined(__x86_64__)
    {"avx512", cpu_features().avx512_vbmi2 && cpu_features().avx512_vnni, pack_chunk_avx512},
    {"avx2", cpu_features().avx2, pack_chunk_avx2},
#endif
    {"portable", true, pack_chunk_portable},
  };
  return all;
}

const ChunkPacker& chunk_packer() {
  static const ChunkPacker& first =
      *std::ranges::find_if(chunk_packers(), [](const ChunkPacker& p) { return p.runs_here; });
  return first;
}

}  // namespace lacuna::kernels::linear_coded
