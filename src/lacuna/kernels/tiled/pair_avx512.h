// A tiled product of at most 32 tokens: its sums stay in tiles from the first column to the last.
//
//   W      32 rows x 256 columns, expanded   two buffers, both in the first-level cache: one is
//                                            multiplied, the other filled, 4 rows a step
//   x      |32 columns of tokens 0..15 |16..31|next 32 columns| ...
//   sums   4 tiles
//
// With so few tokens memory decides, and expanding: nothing of W is written to the second-level
// cache, and nothing is fetched in software, which there takes the places (line fill buffers) that
// the loads of the expansion wait for. Against whole rows in the second-level cache: 1.1 to 1.2
// times as fast (bench/lab/cpu_tiled).
#pragma once

#include "lacuna/kernels/tiled/panels_avx512.h"

namespace lacuna::kernels::tiled {
namespace {

inline constexpr int64_t kBlockChunks = 8;
inline constexpr int64_t kBlockStride = weight_stride(kBlockChunks * kColumns);
static_assert(kPair * kBlockStride <= kPair * weight_stride(kMostColumns));  // fits Layout's buffer

template <class Micro, class Source>
class PairProduct {
 public:
  PairProduct(const RowsView& rows, const RowProduct& product, std::byte* workspace, int slots)
      : rows_(rows),
        product_(product),
        layout_(product.tokens, rows.columns, slots),
        packing_(layout_.token_tiles),
        panels_(ceil_div(rows.rows, kPair)),
        blocks_(ceil_div(layout_.chunks, kBlockChunks)),
        x_(workspace) {}

  /// What one thread does with its buffers.
  void work(int64_t slot) {
    packing_.run([&](int64_t tile) {
      pack_tokens(product_, tile * kTile, 0, rows_.columns, x_ + tile * kTileBytes,
                  layout_.token_tiles * kTileBytes);
    });
    if (layout_.token_tiles == 2)
      multiply_panels<2>(slot);
    else
      multiply_panels<1>(slot);
  }

 private:
  /// 32 rows (fewer at the end), and how far they are expanded.
  struct Panel {
    int64_t index = -1, rows = 0;
    const std::byte* values[kPair];
    const uint8_t* bits[kPair];
  };

  bool next_panel(Panel& panel) {
    panel.index = next_panel_.fetch_add(1, std::memory_order_relaxed);
    if (panel.index >= panels_) return false;
    panel.rows = std::min(kPair, rows_.rows - panel.index * kPair);
    for (int64_t r = 0; r < panel.rows; ++r) {
      panel.values[r] = rows_.row(panel.index * kPair + r);
      panel.bits[r] = rows_.bitmap ? rows_.row_bits(panel.index * kPair + r) : nullptr;
    }
    return true;
  }
  int64_t chunks_of(int64_t block) const {
    return std::min(kBlockChunks, layout_.chunks - block * kBlockChunks);
  }
  /// Rows [first, last) of a panel, the columns of a block.
  LACUNA_INLINE_MEMBER void expand(Panel& panel, int64_t block, int64_t first, int64_t last,
                                   std::byte* out) {
    const int64_t from = block * kBlockChunks;
    const int64_t whole = std::min(kBlockChunks, rows_.columns / kColumns - from);
    const bool rest = whole < chunks_of(block);
    for (int64_t r = first; r < std::min(last, panel.rows); ++r) {
      const uint8_t* bits = panel.bits[r] + from * 4;
      const std::byte* values = panel.values[r];
      std::byte* to = out + r * kBlockStride;
      for (int64_t i = 0; i < whole; ++i, bits += 4, to += 64)
        _mm512_store_si512(to, Source::take(bits, values));
      if (rest) _mm512_store_si512(to, Source::take_last(bits, values, rows_.columns % kColumns));
      panel.values[r] = values;
    }
  }

  template <int kTokenTiles>
  void multiply_panels(int64_t slot) {
    std::byte* weights[2];
    weights[0] = x_ + layout_.x_bytes + slot * layout_.slot_bytes();
    weights[1] = weights[0] + layout_.weight_bytes;
    auto* sums = reinterpret_cast<float*>(weights[1] + layout_.weight_bytes);
    Panel panel, next;
    if (!next_panel(panel)) return;
    if (blocks_ > 0) expand(panel, 0, 0, kPair, weights[0]);
    Micro micro;
    for (int which = 0; panel.index < panels_; panel = next) {
      micro.clear();
      next = panel;
      for (int64_t block = 0; block < blocks_; ++block, which ^= 1) {
        const bool last = block + 1 == blocks_;
        if (last) next_panel(next);
        Panel& filled = last ? next : panel;
        const bool fill = filled.index < panels_;
        const int64_t chunks = chunks_of(block), rows_a_step = ceil_div(kPair, chunks);
        const std::byte* x = x_ + block * kBlockChunks * kTokenTiles * kTileBytes;
        micro.wait();
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          micro.template step<kTokenTiles>(weights[which] + chunk * 64, kBlockStride,
                                           x + chunk * kTokenTiles * kTileBytes);
          if (fill)
            expand(filled, last ? 0 : block + 1, chunk * rows_a_step, (chunk + 1) * rows_a_step,
                   weights[which ^ 1]);
        }
      }
      if (blocks_ == 0) next_panel(next);
      micro.template store<kTokenTiles>(sums);
      for (int64_t tile = 0; tile < 4; ++tile)
        write_tile(sums + tile * kTile * kTile, product_, panel.index * kPair + tile / 2 * kTile,
                   rows_.rows, tile % 2 * kTile);
    }
  }

  const RowsView& rows_;
  const RowProduct& product_;
  const Layout layout_;
  Packing packing_;
  const int64_t panels_, blocks_;
  std::byte* x_;
  std::atomic<int64_t> next_panel_{0};
};

template <class Micro>
void run_pair(const RowsView& rows, const RowProduct& product, void* workspace,
              const Executor& executor) {
  const auto with = [&]<class Source>() {
    run_on_slots(workspace, executor, [&](std::byte* aligned, int slots) {
      PairProduct<Micro, Source> whole(rows, product, aligned, slots);
      executor.parallel_for(slots, [&](int64_t slot) { whole.work(slot); });
    });
  };
  if (rows.bitmap)
    with.template operator()<BitmapSource>();
  else
    with.template operator()<DenseSource>();
}

}  // namespace
}  // namespace lacuna::kernels::tiled
