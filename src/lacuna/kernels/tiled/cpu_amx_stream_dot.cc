// The same from a stream: 16 of its blocks are a tile as AMX wants its second operand, so that
// tokens are the first, x is packed as it lies, and sums come out token by token.
//
//   block   |r0: c0 c1|r1: c0 c1| ... |r15: c0 c1|    64 bytes, a row of the tile
//   x       |32 columns of token 0|of token 1| ...    a tile of 16 tokens
//   sums    |rows 0..15 of token 0|of token 1| ...
#include "lacuna/kernels/stream.h"
#include "lacuna/kernels/stream_lanes_avx512.h"
#include "lacuna/kernels/tiled/amx_tokens_first.h"
#include "lacuna/kernels/tiled/panels_avx512.h"

namespace lacuna::kernels::tiled {
namespace {

static_assert(kTile == stream::kTileRows && 2 * kColumns == stream::kChunk);
constexpr int64_t kTileBlocks = kTileBytes / stream::kValueBlockBytes;

class TokensFirst {
 public:
  static constexpr int64_t kChunkColumns = kColumns;
  TokensFirst(const RowsView& rows, const RowProduct& product, std::byte*)
      : rows_(rows), product_(product) {}
  template <class ForEachBlock>
  void pack(int64_t first_token, int64_t, ForEachBlock&& for_each_block) {
    for_each_block([&](int64_t first, int64_t last, std::byte* out, int64_t stride) {
      pack_columns(first_token, first, last, out, stride);
    });
  }
  void write(const float* sums, int64_t row, int64_t token) const {
    for_each_tile(sums, row, token, [&](const float* tile, int64_t first_row, int64_t first_token) {
      write_tile_of(tile, first_row, first_token);
    });
  }

 private:
  void write_tile_of(const float* sums, int64_t row, int64_t token) const {
    const RowProduct& product = product_;
    const int64_t count = std::min(kTile, rows_.rows - row);
    const int64_t tokens = std::min(kTile, product.tokens - token);
    if (count <= 0) return;
    const auto lanes = avx512::first_lanes16(static_cast<unsigned>(count));
    __m512 bias = _mm512_setzero_ps();
    if (product.bias)
      bias = _mm512_castsi512_ps(
          _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(
                                lanes, static_cast<const std::byte*>(product.bias) + row * 2)),
                            16));
    std::byte* y = static_cast<std::byte*>(product.y) + (token * product.y_stride + row) * 2;
    for (int64_t t = 0; t < tokens; ++t, y += product.y_stride * 2)
      _mm256_mask_storeu_epi16(y, lanes,
                               reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(
                                   _mm512_add_ps(_mm512_load_ps(sums + t * kTile), bias))));
  }
  /// Columns [first, last) of 16 tokens, padded with zeros: a tile each 32, `stride` apart.
  void pack_columns(int64_t first_token, int64_t first, int64_t last, std::byte* out,
                    int64_t stride) const {
    const RowProduct& product = product_;
    const int64_t tokens = std::min(kTile, product.tokens - first_token);
    const std::byte* x =
        static_cast<const std::byte*>(product.x) + first_token * product.x_stride * 2;
    for (int64_t column = first; column < last; column += kColumns, out += stride) {
      const auto lanes =
          avx512::first_lanes32(static_cast<unsigned>(std::min(kColumns, last - column)));
      for (int64_t t = 0; t < kTile; ++t)
        _mm512_store_si512(
            out + t * 64,
            _mm512_maskz_loadu_epi16(t < tokens ? lanes : 0,
                                     x + (t < tokens ? t : 0) * product.x_stride * 2 + column * 2));
    }
  }

  const RowsView& rows_;
  const RowProduct& product_;
};

struct StreamSource {
  using Weight = RowsView;
};

/// Expands blocks into tiles: two tiles of rows for each 32 columns.
template <>
class Beside<StreamSource> : public Fetch {
 public:
  explicit Beside(const RowsView& rows) : rows_(rows) {}
  void open(int64_t first_row, int64_t count) {
    const int64_t first = first_row / kTile;
    tiles_ = ceil_div(count, kTile);
    const int64_t* offsets = rows_.stream_offsets + first;
    for (int64_t t = 0; t < tiles_; ++t) chunk_of_[t] = rows_.stream + offsets[t];
  }
  /// Blocks of K are whole chunks but for the last.
  void expand(int64_t first, int64_t last, int64_t first_column, int64_t last_column,
              std::byte* out) {
    tile_ = first / kTile;
    tile_blocks_ = ceil_div(last_column - first_column, kColumns) * kTileBlocks;
    left_ = (ceil_div(last, kTile) - tile_) * tile_blocks_;
    tiles_out_ = out;
    if (left_ > 0) begin_tile();
  }
  void spread(int64_t steps) {
    blocks_a_step_ = ceil_div(left_, std::max<int64_t>(1, steps));
    spread_lines(steps);
  }
  LACUNA_INLINE_MEMBER void step() {
    fetch_lines();
    expand_blocks(blocks_a_step_);
  }
  void finish() { expand_blocks(left_); }

 private:
  void begin_tile() {
    // Along a tile, lines are asked for where its next block of K lies.
    const uint8_t* other = chunk_of_[(tile_ + 1) % tiles_];
    for (int64_t at = 0; at < kBegin; at += 64) _mm_prefetch(other + at, _MM_HINT_T1);
    masks_ = chunk_of_[tile_];
    values_ = masks_ + stream::kValueMaskBytes;
    out_ = tiles_out_ + tile_ % 2 * kTileBytes;
    in_tile_ = tile_blocks_;
    in_half_ = kTileBlocks;
    upper_ = false;
  }
  LACUNA_INLINE_MEMBER void expand_blocks(int64_t n) {
    while (n > 0 && left_ > 0) {
      const int64_t now = std::min(n, in_half_);
      const uint8_t *mask = masks_, *values = values_;
      std::byte* out = out_;
      for (int64_t i = 0; i < now; ++i) {
        stream::ask_near(values);
        stream::ask_far(values);
        _mm512_store_si512(out, stream::take_values(mask, values));
        mask += 4;
        out += stream::kValueBlockBytes;
      }
      masks_ = mask;
      values_ = values;
      out_ = out;
      n -= now;
      left_ -= now;
      in_tile_ -= now;
      in_half_ -= now;
      if (in_half_ == 0) end_half();
    }
  }
  /// 32 columns are done; those of the other tile lie between them and the next.
  void end_half() {
    out_ += kTileBytes;
    in_half_ = kTileBlocks;
    if (upper_) {
      masks_ = values_;
      values_ += stream::kValueMaskBytes;
    }
    upper_ = !upper_;
    if (in_tile_ > 0) return;
    chunk_of_[tile_] = masks_;
    ++tile_;
    if (left_ > 0) begin_tile();
  }

  static constexpr int64_t kBegin = 256;  // bytes of the next tile asked for before it begins
  const RowsView& rows_;
  const uint8_t* chunk_of_[kMostRows / kTile];  // where each tile of the panel goes on
  int64_t tiles_ = 0, tile_ = 0;
  int64_t left_ = 0, tile_blocks_ = 0, in_tile_ = 0, in_half_ = 0, blocks_a_step_ = 0;
  bool upper_ = false;  // in the second half of a chunk
  const uint8_t *masks_ = nullptr, *values_ = nullptr;
  std::byte *tiles_out_ = nullptr, *out_ = nullptr;
};

struct AmxStreamDot : AmxTokensFirst<BF16Product> {
  using Order = TokensFirst;
};

}  // namespace

void run_amx_stream_dot(const RowsView& rows, const RowProduct& product, void* workspace,
                        const Executor& executor, const Blocking& blocking) {
  run_with<AmxStreamDot, StreamSource>(rows, rows.rows, rows.columns, product, workspace, executor,
                                       blocking);
}

}  // namespace lacuna::kernels::tiled
