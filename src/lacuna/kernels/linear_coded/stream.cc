#include "lacuna/kernels/linear_coded/stream.h"

#include <algorithm>
#include <cstring>

#include "lacuna/core/half.h"
#include "lacuna/kernels/linear_coded/stream_codes.h"

namespace lacuna::kernels::linear_coded {
namespace {

using format::Code;

}  // namespace

void Stream::expand_tile(int64_t tile, float* out) const {
  ChunkWalk walk(*this, tile);
  ChunkCodes codes;
  for (int64_t chunk = 0; chunk < chunks(); ++chunk) {
    walk.take(codes);
    const int64_t first = chunk * kChunk, width = std::min(kChunk, columns_ - first);
    for (int64_t r = 0; r < kTileRows; ++r) {
      const float low = scale_sets_ ? walk.scale(r, 0) : row_scale(tile, r);
      const float high = scale_sets_ == 2 ? walk.scale(r, 1) : low;
      for (int64_t c = 0; c < width; ++c)
        out[r * columns_ + first + c] =
            (c < kChunk / 2 ? low : high) *
            static_cast<float>(codes[c / kBlockColumns][kBlockColumns * r + c % kBlockColumns]);
    }
  }
}

void ChunkWalk::take(ChunkCodes& codes) {
  const uint8_t* const masks = next_;
  scales_ = masks + stream_.mask_bytes();
  const uint8_t* low = scales_ + 2 * kTileRows * stream_.scale_sets();
  const uint8_t* high = low;
  std::memset(codes, 0, sizeof(codes));
  const auto mask = [&](int64_t block) {
    if (stream_.masks() == Masks::kNone) return kAllKept;
    return read_unaligned<uint64_t>(
        masks + 8 * (stream_.masks() == Masks::kShared ? block % kPairs : block));
  };
  for (int64_t pair = 0; pair < kPairs; ++pair) {
    const int64_t other = pair + kPairs;
    if (stream_.code() == Code::kInt8) {
      for_each_kept(codes[pair], mask(pair), [&](int8_t& q) { q = static_cast<int8_t>(*low++); });
      for_each_kept(codes[other], mask(other), [&](int8_t& q) { q = static_cast<int8_t>(*low++); });
    } else {
      for_each_kept(codes[pair], mask(pair), [&](int8_t& q) {
        q = static_cast<int8_t>(static_cast<int8_t>(*low++ << 4) >> 4);
      });
      for_each_kept(codes[other], mask(other),
                    [&](int8_t& q) { q = static_cast<int8_t>(static_cast<int8_t>(*high++) >> 4); });
    }
  }
  next_ = std::max(low, high);
}

float ChunkWalk::scale(int64_t row, int64_t set) const {
  return bf16_to_float(read_unaligned<uint16_t>(scales_ + (set * kTileRows + row) * 2));
}

}  // namespace lacuna::kernels::linear_coded
