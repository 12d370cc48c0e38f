#include "lacuna/kernels/linear_stream/tile_product.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "lacuna/format/element.h"
#include "lacuna/kernels/linear_stream/value_stream.h"

namespace lacuna::kernels::linear_stream {
namespace {

using format::RowProduct;
using format::RowsView;

constexpr int64_t kAlignment = 64;

/// A line more than the columns need, for the reason that row_product.cc gives.
void prepare_floats(const RowProduct& product, int64_t columns, float* out) {
  const int64_t stride = x_stride(columns);
  const auto width = static_cast<int64_t>(size_bytes(product.dtype));
  for (int64_t t = 0; t < product.tokens; ++t, out += stride) {
    const auto* x = static_cast<const std::byte*>(product.x) + t * product.x_stride * width;
    for (int64_t k = 0; k < columns; ++k) out[k] = format::read_float(x, product.dtype, k);
    std::fill(out + columns, out + stride, 0.0f);
  }
}

constexpr int64_t kXColumns = 32;  // of a token, before the next token's

void prepare_bf16(const RowProduct& product, int64_t first_token, int64_t tokens, int64_t columns,
                  std::byte* out) {
  const std::byte* x =
      static_cast<const std::byte*>(product.x) + first_token * product.x_stride * 2;
  const int64_t padded = stream::chunk_count(columns) * kChunk;
  for (int64_t k = 0; k < padded; k += kXColumns)
    for (int64_t t = 0; t < tokens; ++t, out += kXColumns * 2) {
      const int64_t count = std::clamp<int64_t>(columns - k, 0, kXColumns);
      if (count > 0) std::memcpy(out, x + (t * product.x_stride + k) * 2, count * 2);
      std::memset(out + count * 2, 0, (kXColumns - count) * 2);
    }
}

void write(const RowProduct& product, int64_t t, int64_t tile, int64_t rows, float* sums) {
  const int64_t top = tile * kTileRows, count = std::min(kTileRows, rows - top);
  if (product.bias)
    for (int64_t r = 0; r < count; ++r)
      sums[r] += format::read_float(product.bias, product.dtype, top + r);
  format::write_floats(product.y, product.dtype, t * product.y_stride + top, sums, count);
}

}  // namespace

size_t tile_product_workspace_bytes(int64_t tokens, int64_t columns) {
  return static_cast<size_t>(tokens * x_stride(columns)) * sizeof(float) + kAlignment;
}

void run_tile_product(const TileKernels& kernels, const RowsView& rows, const RowProduct& product,
                      void* workspace, const Executor& executor) {
  const auto address = reinterpret_cast<uintptr_t>(workspace);
  auto* x = static_cast<std::byte*>(workspace) + (-address & (kAlignment - 1));
  const int64_t tokens = product.tokens;
  // As few passes over a tile as there can be, with equally many tokens.
  const int64_t at_once = format::ceil_div(tokens, format::ceil_div(tokens, kernels.tokens));
  const int64_t token_bytes = x_stride(rows.columns) * static_cast<int64_t>(sizeof(float));
  if (kernels.x == DType::kF32) {
    prepare_floats(product, rows.columns, reinterpret_cast<float*>(x));
  } else {
    for (int64_t first = 0; first < tokens; first += at_once)
      prepare_bf16(product, first, std::min(at_once, tokens - first), rows.columns,
                   x + first * token_bytes);
  }
  const TileKernel kernel = kernels.for_values(rows.dtype);
  const stream::Tasks tasks(stream::tile_count(rows.rows), executor.threads);
  const auto first_tile = [&](int64_t task) {
    return tasks.first_tile(task, [&](int64_t tile) { return rows.stream_offsets[tile]; });
  };
  executor.parallel_for(tasks.count(), [&](int64_t task) {
    const int64_t end = first_tile(task + 1);
    alignas(64) float sums[kMostTiles * kTileSums];
    for (int64_t tile = first_tile(task); tile < end; tile += kernels.tiles) {
      const int64_t tiles = std::min(kernels.tiles, end - tile);
      for (int64_t first = 0; first < tokens; first += at_once) {
        const int64_t now = std::min(at_once, tokens - first);
        kernel(rows, tile, tiles, x + first * token_bytes, now, sums);
        for (int64_t i = 0; i < tiles; ++i)
          for (int64_t t = 0; t < now; ++t)
            write(product, first + t, tile + i, rows.rows, sums + i * kTileSums + t * kTileRows);
      }
    }
  });
}

void run_reference_tile_product(const RowsView& rows, const RowProduct& product) {
  const auto size = static_cast<size_t>(rows.rows * rows.columns);
  std::vector<float> weights(size);
  for (int64_t tile = 0; tile < stream::tile_count(rows.rows); ++tile)
    expand_tile(rows, tile, DType::kF32, weights.data());
  format::run_reference_row_product(
      format::dense_rows(weights.data(), DType::kF32, rows.rows, rows.columns), product);
}

}  // namespace lacuna::kernels::linear_stream
