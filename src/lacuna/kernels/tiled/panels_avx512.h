// A tiled product but for its multiplication (Micro below): x packed, W expanded, sums written out,
// and the order in which that happens.
//
//   packed x   |32 columns of tokens 0..15 |16..31| next 32 columns | ...   then tokens 32..63, ...
//              of a block of tokens and a block of K, then the next block of K
//              a tile is 16 rows of 64 bytes: row p has columns 2p and 2p+1 of every token
//   weights    32 rows of one block of K, as they lie in W, a line more than they need apart: the
//              16 rows of a tile then fall into different sets of a cache, and a row is written
//              from front to back
//   sums       16 rows of 16 tokens, float32
#pragma once

// g++ 12 warns of its own "undefined" operands inside its intrinsics, at whatever line inlines
// them.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include <atomic>
#include <cstring>
#include <utility>

#include "lacuna/format/lanes_avx512.h"
#include "lacuna/format/row_product.h"
#include "lacuna/kernels/tiled/layout.h"
#include "lacuna/kernels/tiled/shared_work.h"

namespace lacuna::kernels::tiled {
namespace {

using format::RowProduct;
using format::RowsView;
namespace avx512 = format::avx512;

// --- x -------------------------------------------------------------------------------------------

/// 16 registers of 16 floats, rows to columns.
LACUNA_INLINE void transpose16(__m512 (&r)[16]) {
  __m512 s[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    s[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    s[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const auto pd = [](__m512 v) { return _mm512_castps_pd(v); };
    r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pd(s[i]), pd(s[i + 2])));
    r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pd(s[i]), pd(s[i + 2])));
    r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pd(s[i + 1]), pd(s[i + 3])));
    r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pd(s[i + 1]), pd(s[i + 3])));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 low = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    const __m512 high = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    const __m512 low2 = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    const __m512 high2 = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    s[i] = _mm512_shuffle_f32x4(low, low2, 0x88);
    s[i + 8] = _mm512_shuffle_f32x4(low, low2, 0xdd);
    s[i + 4] = _mm512_shuffle_f32x4(high, high2, 0x88);
    s[i + 12] = _mm512_shuffle_f32x4(high, high2, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = s[i];
}

/// Packs columns [first, last) of 16 tokens, padded with zeros: a tile each 32, `stride` apart.
void pack_tokens(const RowProduct& product, int64_t first_token, int64_t first, int64_t last,
                 std::byte* out, int64_t stride) {
  const int64_t tokens = std::min(kTile, product.tokens - first_token);
  const std::byte* x =
      static_cast<const std::byte*>(product.x) + first_token * product.x_stride * 2;
  for (int64_t column = first; column < last; column += kColumns, out += stride) {
    const int64_t left = last - column;
    const __mmask32 lanes =
        left >= kColumns ? ~__mmask32{0} : avx512::first_lanes32(static_cast<unsigned>(left));
    __m512 r[16];
#pragma GCC unroll 16
    for (int t = 0; t < 16; ++t)
      r[t] = _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(
          t < tokens ? lanes : 0, x + (t < tokens ? t : 0) * product.x_stride * 2 + column * 2));
    transpose16(r);
#pragma GCC unroll 16
    for (int p = 0; p < 16; ++p) _mm512_store_ps(out + p * 64, r[p]);
  }
}

// --- W -------------------------------------------------------------------------------------------

/// How 32 columns of a row become 64 bytes; `next` moves on to the values behind them.
struct BitmapSource {
  using Weight = RowsView;
  /// The mask goes from memory straight into its register: a tenth faster than over another one.
  LACUNA_INLINE __m512i take(const uint8_t* bits, const std::byte*& next) {
    __mmask32 lanes;
    asm("kmovd %1, %0" : "=k"(lanes) : "m"(*reinterpret_cast<const uint32_t*>(bits)));
    return expand(lanes, avx512::load_mask(bits), next);
  }
  LACUNA_INLINE __m512i take_last(const uint8_t* bits, const std::byte*& next, int64_t columns) {
    const uint32_t mask = avx512::last_mask(bits, columns);
    return expand(mask, mask, next);
  }
  LACUNA_INLINE __m512i expand(__mmask32 lanes, uint32_t mask, const std::byte*& next) {
    const __m512i packed = _mm512_loadu_si512(next);
    next += static_cast<int64_t>(_mm_popcnt_u32(mask)) * 2;
    return avx512::expand_u16(lanes, packed);
  }
};
struct DenseSource {
  using Weight = RowsView;
  LACUNA_INLINE __m512i take(const uint8_t*, const std::byte*& next) {
    const __m512i all = _mm512_loadu_si512(next);
    next += 64;
    return all;
  }
  LACUNA_INLINE __m512i take_last(const uint8_t*, const std::byte*& next, int64_t columns) {
    const auto lanes = avx512::first_lanes32(static_cast<unsigned>(columns));
    return _mm512_maskz_loadu_epi16(lanes, std::exchange(next, next + columns * 2));
  }
};

/// Lines of packed x of the next block, brought into the second-level cache a few a step, and those
/// of y that are written next, a store to which would else wait for each.
class Fetch {
 public:
  void fetch(const std::byte* from, int64_t bytes) {
    fetch_ = from;
    fetch_end_ = from + bytes;
  }
  /// `count` lines, `stride` bytes apart, within `steps` steps.
  void fetch_to_write(const std::byte* first, int64_t stride, int64_t count, int64_t steps) {
    write_ = first;
    write_stride_ = stride;
    writes_ = count;
    writes_a_step_ = ceil_div(count, std::max<int64_t>(1, steps));
  }

 protected:
  void spread_lines(int64_t steps) {
    lines_a_step_ = ceil_div((fetch_end_ - fetch_) / 64, std::max<int64_t>(1, steps));
  }
  LACUNA_INLINE_MEMBER void fetch_lines() {
    for (int64_t i = 0; i < lines_a_step_ && fetch_ < fetch_end_; ++i, fetch_ += 64)
      _mm_prefetch(fetch_, _MM_HINT_T1);
    for (int64_t i = 0; i < writes_a_step_ && writes_ > 0; ++i, --writes_, write_ += write_stride_)
      asm volatile("prefetchw %0" ::"m"(*write_));
  }

 private:
  const std::byte *fetch_ = nullptr, *fetch_end_ = nullptr;
  int64_t lines_a_step_ = 0;
  const std::byte* write_ = nullptr;
  int64_t write_stride_ = 0, writes_ = 0, writes_a_step_ = 0;
};

/// What a thread does between the steps of a product: it expands the next rows a few chunks at a
/// time, and fetches.
template <class Source>
class Beside : public Fetch {
 public:
  explicit Beside(const RowsView& rows) : rows_(rows) {}
  /// The rows of a panel, from their first column.
  void open(int64_t first_row, int64_t count) {
    panel_ = first_row;
    count_ = count;
    for (int64_t r = 0; r < count; ++r) values_[r] = rows_.row(first_row + r);
    const int64_t values = rows_.bitmap
                               ? rows_.value_index(first_row + count) - rows_.value_index(first_row)
                               : count * rows_.columns;
    bytes_a_chunk_ = std::min<int64_t>(
        64, values * 2 / count / std::max<int64_t>(1, rows_.columns / kColumns) + 1);
  }
  /// Rows [first, last) of the panel, columns [first_column, last_column) of each.
  void expand(int64_t first, int64_t last, int64_t first_column, int64_t last_column,
              std::byte* out) {
    first_column_ = first_column;
    whole_ = (last_column - first_column) / kColumns;
    rest_ = (last_column - first_column) % kColumns;
    block_ = out;
    stride_ = weight_stride(last_column - first_column);
    row_ = first;
    left_ = (last - first) * (whole_ + (rest_ != 0));
    if (left_ > 0) begin_row();
  }
  /// Spreads what is to be done over `steps` calls of step().
  void spread(int64_t steps) {
    chunks_a_step_ = ceil_div(left_, std::max<int64_t>(1, steps));
    spread_lines(steps);
  }
  LACUNA_INLINE_MEMBER void step() {
    fetch_lines();
    expand_chunks(chunks_a_step_);
  }
  void finish() { expand_chunks(left_); }

 private:
  void begin_row() {
    const int64_t later = row_ + kAhead < count_ ? row_ + kAhead : (row_ + kAhead) % count_;
    ahead_ = values_[later] + 64;  // the last load of a block reaches a line past its values
    _mm_prefetch(values_[later], _MM_HINT_T1);
    next_ = values_[row_];
    out_ = block_ + row_ % kPair * stride_;
    in_row_ = whole_;
    if (rows_.bitmap == nullptr) return;
    bits_ = rows_.row_bits(panel_ + row_) + first_column_ / 8;
    const auto* ahead = rows_.row_bits(panel_ + later) + first_column_ / 8;
    for (int64_t byte = 0; byte < whole_ * 4; byte += 64) _mm_prefetch(ahead + byte, _MM_HINT_T0);
  }
  LACUNA_INLINE_MEMBER void expand_chunks(int64_t n) {
    while (n > 0 && left_ > 0) {
      const int64_t now = std::min(n, in_row_);
      const uint8_t* bits = bits_;
      const std::byte *next = next_, *ahead = ahead_;
      std::byte* out = out_;
      for (int64_t i = 0; i < now; ++i) {
        _mm_prefetch(ahead, _MM_HINT_T1);
        ahead += bytes_a_chunk_;
        _mm512_store_si512(out, Source::take(bits, next));
        bits += 4;
        out += 64;
      }
      bits_ = bits;
      next_ = next;
      ahead_ = ahead;
      out_ = out;
      in_row_ -= now;
      left_ -= now;
      n -= now;
      if (in_row_ == 0) end_row();
    }
  }
  void end_row() {
    if (rest_ != 0) {
      _mm512_store_si512(out_, Source::take_last(bits_, next_, rest_));
      --left_;
    }
    values_[row_] = next_;
    ++row_;
    if (left_ > 0) begin_row();
  }

  static constexpr int64_t kAhead = 4;  // rows between what is expanded and what is fetched
  const RowsView& rows_;
  const std::byte* values_[kMostRows];  // where each row of the panel goes on
  int64_t panel_ = 0, count_ = 0, bytes_a_chunk_ = 0, stride_ = 0;
  int64_t first_column_ = 0, whole_ = 0, rest_ = 0, row_ = 0, left_ = 0, in_row_ = 0;
  const uint8_t* bits_ = nullptr;
  const std::byte *next_ = nullptr, *ahead_ = nullptr;
  std::byte *block_ = nullptr, *out_ = nullptr;
  int64_t chunks_a_step_ = 0;
};

// --- y -------------------------------------------------------------------------------------------

/// Writes a tile of sums to y, bias added.
void write_tile(const float* sums, const RowProduct& product, int64_t row, int64_t rows,
                int64_t token) {
  const int64_t count = std::min(kTile, rows - row);
  const int64_t tokens = std::min(kTile, product.tokens - token);
  if (count <= 0 || tokens <= 0) return;
  const auto lanes = avx512::first_lanes16(static_cast<unsigned>(count));
  __m512 r[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_load_ps(sums + i * 16);
  transpose16(r);
  if (product.bias) {
    const __m256i bits =
        _mm256_maskz_loadu_epi16(lanes, static_cast<const std::byte*>(product.bias) + row * 2);
    const __m512 bias = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
#pragma GCC unroll 16
    for (int t = 0; t < 16; ++t) r[t] = _mm512_add_ps(r[t], bias);
  }
  std::byte* y = static_cast<std::byte*>(product.y) + (token * product.y_stride + row) * 2;
#pragma GCC unroll 16
  for (int t = 0; t < 16; ++t)
    if (t < tokens)
      _mm256_mask_storeu_epi16(y + t * product.y_stride * 2, lanes,
                               reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(r[t])));
}

/// The four tiles of 32 rows and 32 tokens, f(sums, row, token).
template <class F>
LACUNA_INLINE void for_each_tile(const float* sums, int64_t row, int64_t token, F&& f) {
  for (int64_t tile = 0; tile < 4; ++tile)
    f(sums + tile * kTile * kTile, row + tile / 2 * kTile, token + tile % 2 * kTile);
}

/// Rows of W are the first operand of a tile product: x is transposed, and so are the sums.
class RowsFirst {
 public:
  static constexpr int64_t kChunkColumns = kColumns;
  RowsFirst(const RowsView& rows, const RowProduct& product, std::byte*)
      : rows_(rows), product_(product) {}
  /// 16 tokens, for every block of K.
  template <class ForEachBlock>
  void pack(int64_t first_token, int64_t, ForEachBlock&& for_each_block) {
    for_each_block([&](int64_t first, int64_t last, std::byte* out, int64_t stride) {
      pack_tokens(product_, first_token, first, last, out, stride);
    });
  }
  /// What Micro::multiply left: 32 rows, 32 tokens.
  void write(const float* sums, int64_t row, int64_t token) const {
    for_each_tile(sums, row, token, [&](const float* tile, int64_t first_row, int64_t first_token) {
      write_tile(tile, product_, first_row, rows_.rows, first_token);
    });
  }

 private:
  const RowsView& rows_;
  const RowProduct& product_;
};

// --- The whole -----------------------------------------------------------------------------------

/// Micro multiplies, calling beside.step() Micro::kSteps times a chunk, and says in Micro::Order
/// how many columns a chunk of 64 bytes has, how x is packed and how sums are written. Panels by a
/// shared counter, so that a thread the system holds up doesn't hold up the others.
template <class Micro, class Source>
class Product {
 public:
  using Weight = typename Source::Weight;
  /// @param weight  of `rows` by `columns`
  Product(const Weight& weight, int64_t rows, int64_t columns, const RowProduct& product,
          std::byte* workspace, int slots, const Blocking& blocking)
      : weight_(weight),
        rows_(rows),
        columns_(columns),
        product_(product),
        blocking_(blocking),
        layout_(product.tokens, columns, slots, kChunkColumns),
        packing_(layout_.token_tiles),
        panels_(ceil_div(rows, blocking.rows)),
        x_(workspace),
        order_(weight, product, workspace + layout_.bytes()) {}

  /// What one thread does with its buffers.
  void work(int64_t slot) {
    pack(slot);
    std::byte* weights[2];
    weights[0] = x_ + layout_.x_bytes + slot * layout_.slot_bytes();
    weights[1] = weights[0] + layout_.weight_bytes;
    auto* sums = reinterpret_cast<float*>(weights[1] + layout_.weight_bytes);
    Beside<Source> beside(weight_);
    Block block = next_panel(beside);
    if (!block.valid()) return;
    Micro micro;
    start(beside, block, weights[0]);
    beside.finish();
    for (int which = 0; block.valid(); which ^= 1) {
      const Block next = block_after(block, beside);
      if (next.valid()) start(beside, next, weights[which ^ 1]);
      multiply(micro, block, weights[which], sums, beside);
      beside.finish();
      block = next;
    }
  }

 private:
  /// 32 rows (fewer at the end) x a block of K, times a block of tokens.
  struct Block {
    int64_t panel = -1, pair = 0;         // of rows; of 32 rows in the panel
    int64_t first_chunk = 0, chunks = 0;  // of K
    int64_t first_token_pair = 0;
    bool valid() const { return panel >= 0; }
  };

  static constexpr int64_t kChunkColumns = Micro::Order::kChunkColumns;

  void pack(int64_t slot) {
    packing_.run([&](int64_t tile) {
      order_.pack(tile * kTile, slot, [&](auto&& pack_block) {
        for (int64_t chunk = 0; chunk < layout_.chunks; chunk += chunks_from(chunk))
          pack_block(chunk * kChunkColumns,
                     std::min((chunk + chunks_from(chunk)) * kChunkColumns, columns_),
                     packed(tile / 2, chunk) + tile % 2 * kTileBytes, pair_stride(tile / 2));
      });
    });
  }

  Block next_panel(Beside<Source>& beside) {
    const int64_t panel = next_panel_.fetch_add(1, std::memory_order_relaxed);
    if (panel >= panels_) return {};
    beside.open(panel * blocking_.rows, rows_of(panel));
    return {panel, 0, 0, chunks_from(0), 0};
  }
  /// Rows go round first, then K, then tokens.
  Block block_after(Block block, Beside<Source>& beside) {
    if (++block.pair * kPair < rows_of(block.panel)) return block;
    block.pair = 0;
    block.first_chunk += block.chunks;
    block.chunks = chunks_from(block.first_chunk);
    if (block.first_chunk < layout_.chunks) return block;
    block.first_token_pair += blocking_.tokens / kPair;
    if (block.first_token_pair * kPair >= product_.tokens) return next_panel(beside);
    block.first_chunk = 0;
    block.chunks = chunks_from(0);
    beside.open(block.panel * blocking_.rows, rows_of(block.panel));
    return block;
  }
  int64_t chunks_from(int64_t first) const {
    return std::min(blocking_.columns / kChunkColumns, layout_.chunks - first);
  }
  int64_t rows_of(int64_t panel) const {
    return std::min(blocking_.rows, rows_ - panel * blocking_.rows);
  }
  void start(Beside<Source>& beside, const Block& block, std::byte* out) {
    const int64_t row = block.pair * kPair;
    const int64_t column = block.first_chunk * kChunkColumns;
    beside.expand(row, std::min(row + kPair, rows_of(block.panel)), column,
                  std::min(column + block.chunks * kChunkColumns, columns_), out);
  }
  /// Token tiles of the block that begins at a pair.
  int64_t tiles_from(int64_t first_token_pair) const {
    return std::min(blocking_.tokens / kTile, layout_.token_tiles - first_token_pair * 2);
  }
  /// x of a pair of token tiles, from the first chunk of a block of K.
  std::byte* packed(int64_t token_pair, int64_t first_chunk) const {
    const int64_t pairs = blocking_.tokens / kPair, first = token_pair / pairs * pairs;
    return x_ + (first * 2 * layout_.chunks + first_chunk * tiles_from(first) +
                 (token_pair - first) * 2 * chunks_from(first_chunk)) *
                    kTileBytes;
  }
  /// Has the share of `block` in fetching the x that its panel, or the next one, needs next.
  void fetch(Beside<Source>& beside, const Block& block) {
    int64_t tokens = block.first_token_pair, chunk = block.first_chunk + block.chunks;
    if (chunk == layout_.chunks) {
      chunk = 0;
      tokens += blocking_.tokens / kPair;
      if (tokens * kPair >= product_.tokens) tokens = 0;
    }
    if (tokens == block.first_token_pair && chunk == block.first_chunk)
      return beside.fetch(nullptr, 0);  // all of x is one block
    const int64_t pairs = ceil_div(rows_of(block.panel), kPair);
    const int64_t lines = tiles_from(tokens) * chunks_from(chunk) * (kTileBytes / 64);
    const int64_t from = lines * block.pair / pairs, to = lines * (block.pair + 1) / pairs;
    beside.fetch(packed(tokens, chunk) + from * 64, (to - from) * 64);
  }
  /// The lines that the sums of 32 rows and tokens go to.
  void fetch_y(Beside<Source>& beside, int64_t row, int64_t token, int64_t chunks) {
    const auto width = static_cast<int64_t>(size_bytes(product_.dtype));
    beside.fetch_to_write(
        static_cast<const std::byte*>(product_.y) + (token * product_.y_stride + row) * width,
        product_.y_stride * width, std::min(kPair, product_.tokens - token),
        chunks * Micro::kSteps);
  }
  /// Bytes from a chunk of a pair of token tiles to the next; the last pair may be a single.
  int64_t pair_stride(int64_t pair) const {
    return pair * 2 + 1 < layout_.token_tiles ? 2 * kTileBytes : kTileBytes;
  }

  void multiply(Micro& micro, const Block& block, const std::byte* weights, float* sums,
                Beside<Source>& beside) {
    const int64_t token_pairs = ceil_div(tiles_from(block.first_token_pair), 2);
    const bool first = block.first_chunk == 0;
    const bool last = block.first_chunk + block.chunks == layout_.chunks;
    const bool whole = first && last;  // no sums wait for another block: one place serves all
    const int64_t row = block.panel * blocking_.rows + block.pair * kPair;
    fetch(beside, block);
    beside.spread(token_pairs * block.chunks * Micro::kSteps);
    for (int64_t t = 0; t < token_pairs; ++t) {
      const int64_t token_pair = block.first_token_pair + t, stride = pair_stride(token_pair);
      const std::byte* x = packed(token_pair, block.first_chunk);
      float* to = sums + (whole ? 0 : (block.pair * token_pairs + t) * kPair * kPair);
      if (last) fetch_y(beside, row, token_pair * kPair, block.chunks);
      if (stride == 2 * kTileBytes)
        micro.template multiply<2>(weights, x, block.chunks, first, to, beside);
      else
        micro.template multiply<1>(weights, x, block.chunks, first, to, beside);
      if (!last) continue;
      order_.write(to, row, token_pair * kPair);
    }
  }

  const Weight& weight_;
  const int64_t rows_, columns_;
  const RowProduct& product_;
  const Blocking blocking_;
  const Layout layout_;
  Packing packing_;
  const int64_t panels_;
  std::byte* x_;
  typename Micro::Order order_;
  std::atomic<int64_t> next_panel_{0};
};

template <class Micro, class Source>
void run_with(const typename Source::Weight& weight, int64_t rows, int64_t columns,
              const RowProduct& product, void* workspace, const Executor& executor,
              const Blocking& blocking) {
  run_on_slots(workspace, executor, [&](std::byte* aligned, int slots) {
    Product<Micro, Source> whole(weight, rows, columns, product, aligned, slots, blocking);
    executor.parallel_for(slots, [&](int64_t slot) { whole.work(slot); });
  });
}

/// The product with the rows of W in either layout.
template <class Micro>
void run(const RowsView& rows, const RowProduct& product, void* workspace, const Executor& executor,
         const Blocking& blocking) {
  if (rows.bitmap)
    run_with<Micro, BitmapSource>(rows, rows.rows, rows.columns, product, workspace, executor,
                                  blocking);
  else
    run_with<Micro, DenseSource>(rows, rows.rows, rows.columns, product, workspace, executor,
                                 blocking);
}

}  // namespace
}  // namespace lacuna::kernels::tiled
