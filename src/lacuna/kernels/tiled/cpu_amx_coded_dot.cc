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
#include "lacuna/kernels/tiled/amx_tokens_first.h"
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
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_srli_epi32(_mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000)), 16));
}

LACUNA_INLINE __m512 load_floats(DType dtype, const void* from, int64_t at, __mmask16 lanes) {
  if (dtype == DType::kF32)
    return _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(from) + at);
  const __m256i bits = _mm256_maskz_loadu_epi16(lanes, static_cast<const uint16_t*>(from) + at);
  if (dtype == DType::kF16) return _mm512_cvtph_ps(bits);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
/// 32 values. Of 16 bits they are put together first: narrowing into memory under a mask is
/// microcoded.
LACUNA_INLINE void store_floats(DType dtype, void* to, int64_t at, __mmask32 lanes, __m512 low,
                                __m512 high) {
  if (dtype == DType::kF32) {
    auto* const out = static_cast<float*>(to) + at;
    _mm512_mask_storeu_ps(out, static_cast<__mmask16>(lanes), low);
    _mm512_mask_storeu_ps(out + 16, static_cast<__mmask16>(lanes >> 16), high);
    return;
  }
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const auto narrow = [&](__m512 values) {
    return dtype == DType::kF16 ? _mm512_cvtps_ph(values, kNearest) : to_bf16(values);
  };
  const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(narrow(low)), narrow(high), 1);
  _mm512_mask_storeu_epi16(static_cast<uint16_t*>(to) + at, lanes, both);
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
        x_scales_[token] = quantize_token(product_.dtype, x + token * product_.x_stride * width,
                                          weight_.columns(), codes);
      for_each_block([&](int64_t first, int64_t last, std::byte* out, int64_t stride) {
        for (int64_t column = first; column < last; column += kCodedColumns, out += stride)
          _mm512_store_si512(out + t * 64, _mm512_xor_si512(_mm512_loadu_si512(codes + column),
                                                            _mm512_set1_epi8(-128)));
      });
    }
  }

  /// As linear_coded::run() finishes its sums.
  void write(const float* sums, int64_t row, int64_t token) const {
    if (weight_.scale_sets() > 0) return write_all<GroupedEnd>(sums, row, token);
    write_all<RowEnd>(sums, row, token);
  }

 private:
  /// What 16 rows make of their sums, without the scale of x: 128 times the sum of codes goes off.
  struct RowEnd {
    __m512i offset;
    __m512 scales;
    RowEnd(const CodedView& weight, int64_t tile)
        : offset(_mm512_slli_epi32(integers(weight.row_sums(tile)), 7)),
          scales(_mm512_loadu_ps(weight.row_scales(tile))) {}
    __m512 operator()(const float* sums) const {
      return times(_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_load_si512(sums), offset)), scales);
    }
    static __m512i integers(const uint8_t* doubles) {
      return _mm512_inserti64x4(
          _mm512_castsi256_si512(_mm512_cvtpd_epi32(_mm512_loadu_pd(doubles))),
          _mm512_cvtpd_epi32(_mm512_loadu_pd(doubles + 64)), 1);
    }
  };
  struct GroupedEnd {
    __m512d low, high, unit;
    GroupedEnd(const CodedView& weight, int64_t tile)
        : low(offset(weight.row_sums(tile))),
          high(offset(weight.row_sums(tile) + 64)),
          unit(_mm512_set1_pd(weight.code() == Code::kInt4 ? stream::kUnit<Code::kInt4>
                                                           : stream::kUnit<Code::kInt8>)) {}
    __m512 operator()(const float* sums) const {
      return _mm512_castpd_ps(
          _mm512_insertf64x4(_mm512_castpd256_pd512(_mm256_castps_pd(half(sums, low))),
                             _mm256_castps_pd(half(sums + 8, high)), 1));
    }
    __m256 half(const float* sums, __m512d off) const {
      const __m512d wide = _mm512_cvtps_pd(_mm256_load_ps(sums));
      return _mm512_cvtpd_ps(_mm512_sub_pd(_mm512_mul_pd(wide, unit), off));  // an exact product
    }
    static __m512d offset(const uint8_t* sums) {
      return _mm512_mul_pd(_mm512_set1_pd(128), _mm512_loadu_pd(sums));
    }
  };

  template <class End>
  void write_all(const float* sums, int64_t row, int64_t token) const {
    const int64_t rows = std::min(kPair, weight_.rows() - row), tile = row / kTile;
    const int64_t tokens = std::min(kPair, product_.tokens - token);
    const DType dtype = product_.dtype;
    const auto lanes = avx512::first_lanes32(static_cast<unsigned>(rows));
    const End low(weight_, tile), high(weight_, rows > kTile ? tile + 1 : tile);
    __m512 low_bias = _mm512_setzero_ps(), high_bias = low_bias;
    if (product_.bias) {
      low_bias = load_floats(dtype, product_.bias, row, static_cast<__mmask16>(lanes));
      if (rows > kTile)
        high_bias =
            load_floats(dtype, product_.bias, row + kTile, static_cast<__mmask16>(lanes >> 16));
    }
    for (int64_t t = 0; t < tokens; ++t, sums += kTile) {
      const __m512 x_scale = _mm512_set1_ps(x_scales_[token + t]);
      // Behind the tile of tokens 0..15 lies that of 16..31, then those of the other rows.
      __m512 a = times(low(sums), x_scale), b = times(high(sums + 2 * kTile * kTile), x_scale);
      if (product_.bias) {
        a = _mm512_add_ps(a, low_bias);
        b = _mm512_add_ps(b, high_bias);
      }
      store_floats(dtype, product_.y, (token + t) * product_.y_stride + row, lanes, a, b);
    }
  }

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

/// Of x without a sign and w with one.
struct ByteProduct {
  template <int kSums, int kFirst, int kSecond>
  static LACUNA_INLINE_MEMBER void add() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kFirst), "i"(kSecond));
  }
};

/// One scale a row: the sums are int32.
struct AmxRowDot : AmxTokensFirst<ByteProduct> {
  using Order = CodedTokens;
};

/// Tiles of a group: x 4 and 5, w 6 and 7; sums 0 to 3.
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
  static constexpr int64_t kSteps = kSets;
  AmxGroupDot() : AmxTiles(kGroupTiles<kSets>) {}

  template <int kTokenTiles, class Beside>
  LACUNA_INLINE_MEMBER void multiply(const std::byte* w, const std::byte* x, int64_t chunks,
                                     bool first, float* sums, Beside& beside) {
    memory_barrier();
    for (int64_t r = 0; r < 2; ++r)
      for (int64_t t = 0; t < kTokenTiles; ++t)
        multiply_tiles<kTokenTiles>(
            {w + r * kTileBytes, w + 2 * kTileBytes + r * kSets * 64, x + t * kTileBytes}, chunks,
            first, sums + (2 * r + t) * kTile * kTile, beside);
    memory_barrier();
  }

 private:
  static constexpr int64_t kChunkBytes = coded_chunk_bytes(kSets);

  /// 16 rows with their scales, 16 tokens.
  struct Operands {
    const std::byte *w, *scales, *x;
  };

  template <int kTokenTiles, class Beside>
  LACUNA_INLINE_MEMBER void multiply_tiles(const Operands& of, int64_t chunks, bool first,
                                           float* sums, Beside& beside) {
    __m512 whole[kTile];
#pragma GCC unroll 16
    for (int t = 0; t < kTile; ++t)
      whole[t] = first ? _mm512_setzero_ps() : _mm512_load_ps(sums + t * kTile);
    const int64_t groups = chunks * kSets;
    // Sums of three groups are on their way while one is added: a product takes 52 cycles.
    begin_group<kTokenTiles, 0>(of, 0, groups);
    begin_group<kTokenTiles, 1>(of, 1, groups);
    begin_group<kTokenTiles, 2>(of, 2, groups);
    for (int64_t group = 0; group < groups; group += 4) {
      begin_group<kTokenTiles, 3>(of, group + 3, groups);
      end_group<0>(of, group, groups, whole);
      begin_group<kTokenTiles, 0>(of, group + 4, groups);
      end_group<1>(of, group + 1, groups, whole);
      begin_group<kTokenTiles, 1>(of, group + 5, groups);
      end_group<2>(of, group + 2, groups, whole);
      begin_group<kTokenTiles, 2>(of, group + 6, groups);
      end_group<3>(of, group + 3, groups, whole);
      beside.step();
    }
#pragma GCC unroll 16
    for (int t = 0; t < kTile; ++t) _mm512_store_ps(sums + t * kTile, whole[t]);
  }

  /// The int32 sums of a group are on their way to memory.
  template <int kTokenTiles, int kSum>
  LACUNA_INLINE_MEMBER void begin_group(const Operands& of, int64_t group, int64_t groups) {
    if (group >= groups) return;
    const int64_t chunk = group / kSets, set = group % kSets;
    const std::byte* w = of.w + chunk * kChunkBytes + set * (kTileBytes / kSets);
    const std::byte* x = of.x + chunk * (kTokenTiles * kTileBytes) + set * (64 / kSets);
    constexpr int kX = 4 + kSum % 2, kW = 6 + kSum % 2;
    zero<kSum>();
    load<kX>(x);
    load<kW>(w);
    ByteProduct::add<kSum, kX, kW>();
    store<kSum>(group_sums_[kSum]);
  }
  template <int kSum>
  LACUNA_INLINE_MEMBER void end_group(const Operands& of, int64_t group, int64_t groups,
                                      __m512 (&whole)[kTile]) {
    if (group >= groups) return;
    const __m512 scale =
        _mm512_load_ps(of.scales + group / kSets * kChunkBytes + group % kSets * 64);
#pragma GCC unroll 16
    for (int t = 0; t < kTile; ++t)
      whole[t] = _mm512_fmadd_ps(
          _mm512_cvtepi32_ps(_mm512_load_si512(group_sums_[kSum] + t * kTile)), scale, whole[t]);
  }

  alignas(64) int32_t group_sums_[4][kTile * kTile];
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
