// Chunks are expanded to float32, dropped weights 0; no intrinsics.
#include "lacuna/format/row_product_portable.h"
#include "lacuna/kernels/linear_stream/cpu.h"

namespace lacuna::kernels::linear_stream {
namespace {

template <DType kType>
void kernel(const format::RowsView& rows, int64_t tile, int64_t, const void* input, int64_t tokens,
            float* out) {
  const auto* x = static_cast<const float*>(input);
  const int64_t stride = x_stride(rows.columns);
  float sums[kMostTokens][2][kTileRows] = {};  // even and odd columns
  ChunkWeights weights;
  const uint8_t* next = rows.stream + rows.stream_offsets[tile];
  for (int64_t left = stream::chunk_count(rows.columns); left > 0; --left, x += kChunk) {
    next += unpack_chunk_portable(next, weights);
    float columns[kChunk][kTileRows];
    for (int64_t r = 0; r < kTileRows; ++r)
      for (int64_t c = 0; c < kChunk; ++c)
        columns[c][r] =
            format::portable::weight<kType>(reinterpret_cast<const std::byte*>(&weights[r][c]));
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t c = 0; c < kChunk; ++c)
        for (int64_t r = 0; r < kTileRows; ++r)
          sums[t][c % 2][r] += columns[c][r] * x[t * stride + c];
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = 0; r < kTileRows; ++r) out[t * kTileRows + r] = sums[t][0][r] + sums[t][1][r];
}

}  // namespace

const TileKernels kPortable = {kernel<DType::kBF16>, kernel<DType::kF16>};

}  // namespace lacuna::kernels::linear_stream
