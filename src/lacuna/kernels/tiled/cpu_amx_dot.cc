// A step is four tdpbf16ps: two tiles of rows by two tiles of tokens, so each tile that is loaded
// serves twice. The multiplication runs in a unit of its own for 64 cycles a step, and the
// expansion of the next panel fills the ports beside it.
#include "lacuna/kernels/amx_tiles.h"
#include "lacuna/kernels/tiled/pair_avx512.h"
#include "lacuna/kernels/tiled/panels_avx512.h"

namespace lacuna::kernels::tiled {
namespace {

class AmxDot : public AmxTiles {
 public:
  using Order = RowsFirst;
  static constexpr int64_t kSteps = 1;

  /// sums (4 tiles: rows 0..15 of tokens 0..15, of tokens 16..31, rows 16..31 ...) += w · x.
  template <int kTokenTiles, class Beside>
  LACUNA_INLINE_MEMBER void multiply(const std::byte* w, const std::byte* x, int64_t chunks,
                                     bool first, float* sums, Beside& beside) {
    begin<kTokenTiles == 2>(first, sums);
    const int64_t stride = weight_stride(chunks * kColumns);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      step<kTokenTiles>(w + chunk * 64, stride, x + chunk * kTokenTiles * kTileBytes);
      beside.step();
    }
    end<kTokenTiles == 2>(sums);
  }

  void clear() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  /// What was written before is there for the steps that follow.
  LACUNA_INLINE_MEMBER void wait() { memory_barrier(); }
  template <int kTokenTiles>
  LACUNA_INLINE_MEMBER void store(float* sums) {
    end<kTokenTiles == 2>(sums);
  }
  /// One chunk: 32 rows, `stride` bytes apart, times one or two tiles of tokens.
  template <int kTokenTiles>
  LACUNA_INLINE_MEMBER void step(const std::byte* w, int64_t stride, const std::byte* x) {
    _tile_loadd(4, w, stride);
    _tile_loadd(6, x, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTokenTiles == 2) {
      _tile_loadd(7, x + kTileBytes, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    _tile_loadd(5, w + kTile * stride, stride);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (kTokenTiles == 2) _tile_dpbf16ps(3, 5, 7);
  }
};

}  // namespace

void run_amx_dot(const RowsView& rows, const RowProduct& product, void* workspace,
                 const Executor& executor, const Blocking& blocking) {
  if (blocking.tokens == kPair && product.tokens <= kPair)
    run_pair<AmxDot>(rows, product, workspace, executor);
  else
    run<AmxDot>(rows, product, workspace, executor, blocking);
}

}  // namespace lacuna::kernels::tiled
