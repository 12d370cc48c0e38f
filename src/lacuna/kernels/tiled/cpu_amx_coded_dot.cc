// Codes of a stream times codes of x: a chunk of 64 columns of 16 rows is one tile of bytes, its 16
// blocks are the tile's rows, as AMX wants its second operand (coded_stream.h). tdpbusd takes x
// without a sign, x + 128; what that adds is known from packing. So the integers, the order in
// which groups are added and all that follows are those of linear_coded for few tokens, to the bit.
//
//   W, a chunk   |rows 0..15: block 0|block 1| ... |block 15|rows 16..31: ... |scales of 0..15|...
//   x            |64 columns of token 0|of token 1| ...    a tile of 16 tokens
//   sums         |rows 0..15 of token 0|of token 1| ...
//
// One scale a row: four tdpbusd a step, int32 sums of whole blocks of K. Scales of groups: the
// int32 tile of a group goes to memory, and from there, times its 16 scales, onto 16 registers that
// keep the float32 sums of 16 rows and 16 tokens over a block of K. That asks for 48 loads of 64
// bytes for each tdpbusd, against 32 with bf16 tiles of as many products.
#include "lacuna/kernels/coded_lanes_avx512.h"
#include "lacuna/kernels/quantize_token.h"
#include "lacuna/kernels/tiled/amx_tiles.h"
#include "lacuna/kernels/tiled/coded_layout.h"
#include "lacuna/kernels/tiled/panels_avx512.h"

namespace lacuna::kernels::tiled {
namespace {

using format::Code;
using stream::CodedView;
using stream::kBlockWeights;
using stream::kPairs;
using stream::Masks;

static_assert(kTile == stream::kTileRows && kCodedColumns == stream::kChunk);
static_assert(kTileBytes == stream::kBlocks * kBlockWeights);

// --- x and y -------------------------------------------------------------------------------------

/// To nearest, as scalar code does it: not fused with what follows, denormals kept.
LACUNA_INLINE __m512 times(__m512 a, __m512 b) {
  return _mm512_mul_round_ps(a, b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
LACUNA_INLINE __m256i to_bf16(__m512 values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(
      _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000)), 16));
}

LACUNA_INLINE __m512 load_floats(DType dtype, const void* from, int64_t at, __mmask16 lanes) {
  if (dtype == DType::kF32) return _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(from) + at);
  const __m256i bits = _mm256_maskz_loadu_epi16(lanes, static_cast<const uint16_t*>(from) + at);
  if (dtype == DType::kF16) return _mm512_cvtph_ps(bits);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
LACUNA_INLINE void store_floats(DType dtype, void* to, int64_t at, __mmask16 lanes, __m512 values) {
  if (dtype == DType::kF32) {
    _mm512_mask_storeu_ps(static_cast<float*>(to) + at, lanes, values);
  } else {
    const __m256i bits =
        dtype == DType::kF16
            ? _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
            : to_bf16(values);
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(to) + at, lanes, bits);
  }
}

/// Tokens become codes while they are packed.
class CodedTokens {
 public:
  static constexpr int64_t kChunkColumns = kCodedColumns;
  CodedTokens(const CodedView& weight, const RowProduct& product, std::byte* extra)
      : weight_(weight),
        product_(product),
        x_scales_(reinterpret_cast<float*>(extra)),
        token_(reinterpret_cast<int8_t*>(extra) + scale_bytes(product.tokens)) {}

  template <class ForEachBlock>
  void pack(int64_t first_token, int64_t slot, ForEachBlock&& for_each_block) {
    int8_t* const codes = token_ + slot * token_bytes(weight_.columns());
    const auto width = static_cast<int64_t>(size_bytes(product_.dtype));
    const auto* x = static_cast<const std::byte*>(product_.x);
    for (int64_t t = 0; t < kTile; ++t) {
      const int64_t token = first_token + t;
      // Of tokens past the last, whatever lies there is multiplied and dropped.
      if (token < product_.tokens)
        x_scales_[token] = quantize_token(
            product_.dtype, x + token * product_.x_stride * width, weight_.columns(), codes);
      for_each_block([&](int64_t first, int64_t last, std::byte* out, int64_t stride) {
        for (int64_t column = first; column < last; column += kCodedColumns, out += stride)
          _mm512_store_si512(out + t * 64, _mm512_xor_si512(_mm512_loadu_si512(codes + column),
                                                            _mm512_set1_epi8(-128)));
      });
    }
  }

  /// As linear_coded::run() finishes a sum.
  void write(const float* sums, int64_t row, int64_t first_token) const {
    const int64_t count = std::min(kTile, weight_.rows() - row);
    const int64_t tokens = std::min(kTile, product_.tokens - first_token);
    if (count <= 0) return;
    const auto lanes = avx512::first_lanes16(static_cast<unsigned>(count));
    const int64_t tile = row / kTile;
    const uint8_t* const row_sums = weight_.row_sums(tile);
    const __m512d too_much = _mm512_set1_pd(128);
    const __m512d low_offset = _mm512_mul_pd(too_much, _mm512_loadu_pd(row_sums));
    const __m512d high_offset = _mm512_mul_pd(too_much, _mm512_loadu_pd(row_sums + 64));
    const bool grouped = weight_.scale_sets() > 0;
    const __m512 scales =
        grouped ? _mm512_set1_ps(1) : _mm512_loadu_ps(weight_.row_scales(tile));
    const __m512 bias = product_.bias ? load_floats(product_.dtype, product_.bias, row, lanes)
                                      : _mm512_setzero_ps();
    const __m512d unit = _mm512_set1_pd(weight_.code() == Code::kInt4 ? stream::kUnit<Code::kInt4>
                                                                      : stream::kUnit<Code::kInt8>);
    for (int64_t t = 0; t < tokens; ++t) {
      const __m512i sum = _mm512_load_si512(sums + t * kTile);
      const auto halves = [&](__m256i half, __m512d offset) {
        const __m512d wide = grouped ? _mm512_cvtps_pd(_mm256_castsi256_ps(half))
                                     : _mm512_cvtepi32_pd(half);
        return _mm512_cvtpd_ps(_mm512_sub_pd(_mm512_mul_pd(wide, unit), offset));  // exact product
      };
      const __m512 whole = _mm512_castpd_ps(_mm512_insertf64x4(
          _mm512_castpd256_pd512(
              _mm256_castps_pd(halves(_mm512_castsi512_si256(sum), low_offset))),
          _mm256_castps_pd(halves(_mm512_extracti64x4_epi64(sum, 1), high_offset)), 1));
      __m512 y = times(times(whole, scales), _mm512_set1_ps(x_scales_[first_token + t]));
      if (product_.bias) y = _mm512_add_ps(y, bias);
      store_floats(product_.dtype, product_.y, (first_token + t) * product_.y_stride + row, lanes,
                   y);
    }
  }

 private:
  const CodedView& weight_;
  const RowProduct& product_;
  float* x_scales_;
  int8_t* token_;
};

// --- W -------------------------------------------------------------------------------------------

template <Code kCode, Masks kMasks>
struct CodedSource {
  using Weight = CodedView;
};

/// Expands pairs of blocks into tiles, and turns scales into float32 behind them.
template <Code kCode, Masks kMasks>
class Beside<CodedSource<kCode, kMasks>> : public Fetch {
 public:
  explicit Beside(const CodedView& weight) : weight_(weight) {}
  void open(int64_t first_row, int64_t count) {
    const int64_t first = first_row / kTile;
    tiles_ = ceil_div(count, kTile);
    for (int64_t t = 0; t < tiles_; ++t) chunk_of_[t] = weight_.chunks_of(first + t);
  }
  /// Blocks of K are whole chunks.
  void expand(int64_t first, int64_t last, int64_t first_column, int64_t last_column,
              std::byte* out) {
    tile_ = first / kTile;
    tile_chunks_ = ceil_div(last_column - first_column, kCodedColumns);
    left_ = (ceil_div(last, kTile) - tile_) * tile_chunks_ * kPairs;
    tiles_out_ = out;
    if (left_ > 0) begin_tile();
  }
  void spread(int64_t steps) {
    pairs_a_step_ = ceil_div(left_, std::max<int64_t>(1, steps));
    spread_lines(steps);
  }
  LACUNA_INLINE_MEMBER void step() {
    fetch_lines();
    expand_pairs(pairs_a_step_);
  }
  void finish() { expand_pairs(left_); }

 private:
  void begin_tile() {
    // Along a tile, lines are asked for where its next block of K lies.
    const uint8_t* other = chunk_of_[(tile_ + 1) % tiles_];
    for (int64_t at = 0; at < kBegin; at += 64) _mm_prefetch(other + at, _MM_HINT_T1);
    out_ = tiles_out_ + tile_ % 2 * kTileBytes;
    in_tile_ = tile_chunks_;
    begin_chunk(chunk_of_[tile_]);
  }
  void begin_chunk(const uint8_t* chunk) {
    const int64_t sets = weight_.scale_sets();
    masks_ = chunk;
    const uint8_t* scales = chunk + weight_.mask_bytes();
    auto* floats = reinterpret_cast<float*>(out_ - tile_ % 2 * kTileBytes + 2 * kTileBytes) +
                   tile_ % 2 * sets * kTile;
    for (int64_t set = 0; set < sets; ++set, scales += 2 * kTile)
      _mm512_store_ps(floats + set * kTile, stream::scales_of(scales));
    codes_.low = codes_.high = scales;
    pair_ = 0;
    stream::ask_near(chunk);
    stream::ask_far(chunk);
  }
  LACUNA_INLINE_MEMBER void expand_pairs(int64_t n) {
    while (n > 0 && left_ > 0) {
      const int64_t last = std::min(kPairs, pair_ + n);
      n -= last - pair_;
      left_ -= last - pair_;
      std::byte* out = out_ + pair_ * kBlockWeights;
      stream::Cursor codes = codes_;
      for (int64_t pair = pair_; pair < last; ++pair, out += kBlockWeights) {
        __m512i low, high;
        stream::ask_near(codes.low);
        stream::ask_far(codes.low);
        if constexpr (kMasks == Masks::kNone && kCode == Code::kInt8) {
          stream::ask_near(codes.low + 64);
          stream::ask_far(codes.low + 64);
        }
        stream::take_pair<kCode, kMasks>(masks_, static_cast<int>(pair), codes, low, high);
        _mm512_store_si512(out, low);
        _mm512_store_si512(out + kPairs * kBlockWeights, high);
      }
      codes_ = codes;
      pair_ = last;
      if (pair_ == kPairs) end_chunk();
    }
  }
  void end_chunk() {
    const uint8_t* next = std::max(codes_.low, codes_.high);
    out_ += coded_chunk_bytes(weight_.scale_sets());
    if (--in_tile_ > 0) return begin_chunk(next);
    chunk_of_[tile_] = next;
    ++tile_;
    if (left_ > 0) begin_tile();
  }

  static constexpr int64_t kBegin = 256;  // bytes of the next tile asked for before it begins
  const CodedView& weight_;
  const uint8_t* chunk_of_[kMostRows / kTile];  // where each tile of the panel goes on
  int64_t tiles_ = 0, tile_ = 0, tile_chunks_ = 0, in_tile_ = 0, pair_ = 0;
  int64_t left_ = 0, pairs_a_step_ = 0;
  const uint8_t* masks_ = nullptr;
  stream::Cursor codes_ = {};
  std::byte *tiles_out_ = nullptr, *out_ = nullptr;
};

// --- Products ------------------------------------------------------------------------------------

struct ByteProducts {
  template <int kSum>
  LACUNA_INLINE void add() {
    if constexpr (kSum == 0) _tile_dpbusd(0, 4, 6);
    if constexpr (kSum == 1) _tile_dpbusd(1, 5, 6);
    if constexpr (kSum == 2) _tile_dpbusd(2, 4, 7);
    if constexpr (kSum == 3) _tile_dpbusd(3, 5, 7);
  }
};

/// One scale a row: the sums are int32.
struct AmxRowDot : AmxTokensFirst<ByteProducts> {
  using Order = CodedTokens;
};

/// Tiles of a group: x 4 and 5, w 6 and 7; sums 0 and 1.
template <int kSets>
inline constexpr TileConfig kGroupTiles = [] {
  TileConfig config;
  for (const int x : {4, 5}) config.row_bytes[x] = 64 / kSets;
  for (const int w : {6, 7}) config.rows[w] = 16 / kSets;
  return config;
}();

/// A scale for each 64 columns, or for each 32: the sums are float32, kSets groups a chunk.
template <int kSets>
class AmxGroupDot : public AmxTiles {
 public:
  using Order = CodedTokens;
  static constexpr int64_t kSteps = 2 * kSets;
  AmxGroupDot() : AmxTiles(kGroupTiles<kSets>) {}

  template <int kTokenTiles, class Beside>
  LACUNA_INLINE_MEMBER void multiply(const std::byte* w, const std::byte* x, int64_t chunks,
                                     bool first, float* sums, Beside& beside) {
    memory_barrier();
    for (int64_t r = 0; r < 2; ++r)
      for (int64_t t = 0; t < kTokenTiles; ++t)
        tile<kTokenTiles>(w + r * kTileBytes, w + 2 * kTileBytes + r * kSets * 64,
                          x + t * kTileBytes, chunks, first, sums + (2 * r + t) * kTile * kTile,
                          t == 0, beside);
    memory_barrier();
  }

 private:
  static constexpr int64_t kChunkBytes = coded_chunk_bytes(kSets);

  /// 16 rows, 16 tokens.
  template <int kTokenTiles, class Beside>
  LACUNA_INLINE_MEMBER void tile(const std::byte* w, const std::byte* scales, const std::byte* x,
                                 int64_t chunks, bool first, float* sums, bool expands,
                                 Beside& beside) {
    __m512 whole[kTile];
#pragma GCC unroll 16
    for (int t = 0; t < kTile; ++t)
      whole[t] = first ? _mm512_setzero_ps() : _mm512_load_ps(sums + t * kTile);
    const int64_t groups = chunks * kSets;
    const auto sum_of = [&](int64_t group) {
      return multiply_group(w + group / kSets * kChunkBytes + group % kSets * (kTileBytes / kSets),
                            x + group / kSets * (kTokenTiles * kTileBytes) +
                                group % kSets * (64 / kSets),
                            group % 2);
    };
    if (groups > 0) sum_of(0);
    for (int64_t group = 0; group < groups; ++group) {
      if (group + 1 < groups) sum_of(group + 1);  // its latency passes while this one is added
      const __m512 scale =
          _mm512_load_ps(scales + group / kSets * kChunkBytes + group % kSets * 64);
      const int32_t* const one = group_sums_[group % 2];
#pragma GCC unroll 16
      for (int t = 0; t < kTile; ++t)
        whole[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(one + t * kTile)), scale,
                                   whole[t]);
      if (expands) beside.step();
    }
#pragma GCC unroll 16
    for (int t = 0; t < kTile; ++t) _mm512_store_ps(sums + t * kTile, whole[t]);
  }

  LACUNA_INLINE_MEMBER void multiply_group(const std::byte* w, const std::byte* x, int64_t which) {
    int32_t* const out = group_sums_[which];
    if (which == 0) {
      _tile_zero(0);
      _tile_loadd(4, x, 64);
      _tile_loadd(6, w, 64);
      _tile_dpbusd(0, 4, 6);
      _tile_stored(0, out, 64);
    } else {
      _tile_zero(1);
      _tile_loadd(5, x, 64);
      _tile_loadd(7, w, 64);
      _tile_dpbusd(1, 5, 7);
      _tile_stored(1, out, 64);
    }
  }

  alignas(64) int32_t group_sums_[2][kTile * kTile];
};

}  // namespace

void run_amx_coded_dot(const CodedView& weight, const RowProduct& product, void* workspace,
                       const Executor& executor, const Blocking& blocking) {
  const auto with = [&]<class Micro, Code kCode, Masks kMasks>() {
    run_with<Micro, CodedSource<kCode, kMasks>>(weight, weight.rows(), weight.columns(), product,
                                                workspace, executor, blocking);
  };
  const auto with_micro = [&]<class Micro>() {
    const bool masked = weight.masks() != Masks::kNone;
    if (weight.code() == Code::kInt8)
      return masked ? with.template operator()<Micro, Code::kInt8, Masks::kOwn>()
                    : with.template operator()<Micro, Code::kInt8, Masks::kNone>();
    if (!masked) return with.template operator()<Micro, Code::kInt4, Masks::kNone>();
    return weight.masks() == Masks::kOwn
               ? with.template operator()<Micro, Code::kInt4, Masks::kOwn>()
               : with.template operator()<Micro, Code::kInt4, Masks::kShared>();
  };
  if (weight.scale_sets() == 0) return with_micro.operator()<AmxRowDot>();
  return weight.scale_sets() == 1 ? with_micro.operator()<AmxGroupDot<1>>()
                                  : with_micro.operator()<AmxGroupDot<2>>();
}

}  // namespace lacuna::kernels::tiled
