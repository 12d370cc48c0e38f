// Places of cuda_sm90_gap: how 4 chunks of them lie in memory, what one lane holds of them, and how
// values and gaps come out again. 8 places a lane are a chunk, 4 chunks a unit.
//
//   bf16, gap of 3 bits: 16 bits a place       0       512      1024     1536     2048
//                                              +-------+--------+--------+--------+
//     lane: 16 bytes, a place in 2             | places 0 | places 1 | .. 2 | .. 3 |
//                                              +-------+--------+--------+--------+
//     bit  15   | 14 .. 10 |  9 .. 3  | 2 .. 0
//          sign | exponent | mantissa | gap        without the gap an fp16: one instruction widens
//          it
//
//   The exponent counts from `top` down, 30 of them. What doesn't fit (smaller than the 2^-29th
//   part of the largest, denormal, Inf, NaN) is a stray and lies elsewhere. 4 bits: the fourth bits
//   of all gaps in 128 bytes ahead, one word a lane.
//
//   windows (kWindowBits): 16 places of a lane are a chunk, 2 chunks a unit, 20 bits a place. A
//   place has no gap but its offset from where the chunk before ended, 7 bits, so that a chunk's
//   places may stand in any order: in that in which 16 lanes meet few banks of x.
//                                              0          512        1024       1280
//                                              +----------+-----------+----------+
//     lane: 16 bytes, 16 bytes, 8 bytes        | places 0 | .. and 8  | upper    |
//                                              +----------+-----------+----------+
//     The lower 3 bits of the offset stand where a gap does; 4 upper bits in the last 8 bytes.
//
//   codes of 8 bits: gaps in 3 or 4 planes ahead (gap i of chunk c in bits 4i .. of word c; of 3
//   bits those of chunk 3 are the fourth bits of the other planes), then the values of 2 chunks in
//   16 bytes a lane; int8 plus 128.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "lacuna/kernels/cuda/load_once.cuh"
#include "lacuna/kernels/cuda/sm90_codes.cuh"
#include "lacuna/kernels/linear_bitmap/cuda_sm90_gap.h"

namespace lacuna::kernels::linear_bitmap {

inline constexpr int kUpperBytes = 256;   // 8 bytes a lane
inline constexpr int kPlaneBytes = 128;   // one word a lane
inline constexpr int kVectorBytes = 512;  // 16 bytes a lane
inline constexpr int kExponents = 30;     // of fp16's normal numbers
inline constexpr int kMostTop = 157;      // 2^(top - 30) is a bf16

/// Places of one lane in a chunk, and chunks in a unit.
__host__ __device__ constexpr int chunk_values(int bits) { return bits == kWindowBits ? 16 : 8; }
__host__ __device__ constexpr int unit_chunks(int bits) { return bits == kWindowBits ? 2 : 4; }

/// Bytes ahead of a unit's values, and of its first chunks' values.
__host__ __device__ constexpr int head_bytes(GapValues values, int bits) {
  if (bits == kWindowBits) return 0;
  return (values == GapValues::kBf16 ? bits - 3 : bits) * kPlaneBytes;
}
__host__ __device__ constexpr int value_bytes(GapValues values, int bits, int chunks) {
  if (bits == kWindowBits) return chunks * (2 * kVectorBytes + kUpperBytes);
  return (values == GapValues::kBf16 ? chunks : (chunks + 1) / 2) * kVectorBytes;
}
__host__ __device__ constexpr int unit_bytes(GapValues values, int bits) {
  return head_bytes(values, bits) + value_bytes(values, bits, unit_chunks(bits));
}

using cuda::load_once16;
using cuda::load_once4;
using cuda::load_once8;

__device__ __forceinline__ int exponent_of(unsigned bf16) {
  return static_cast<int>(bf16 >> 7 & 255);
}

/// Whether a bf16 that isn't zero has a place; `top` 0: all have.
__device__ __forceinline__ bool fits(unsigned bf16, int top) {
  const int e = exponent_of(bf16);
  return top == 0 || (e >= max(1, top - (kExponents - 1)) && e <= top);
}

/// A pair of fp16.
__device__ __forceinline__ float2 widened(unsigned pair) {
  float2 v;
  asm("{\n .reg .b16 low, high;\n"
      " mov.b32 {low, high}, %2;\n"
      " cvt.f32.f16 %0, low;\n"
      " cvt.f32.f16 %1, high;\n}"
      : "=f"(v.x), "=f"(v.y)
      : "r"(pair));
  return v;
}

/// The upper 13 bits of a place, from a bf16 that fits.
__device__ __forceinline__ unsigned narrowed(unsigned value, int top) {
  return (value & 0x8000) | ((value & 0x7fff) - ((top - kExponents) << 7)) << 3;
}

/// Two places as bf16. `factor`: 2^(top - 30).
__device__ __forceinline__ unsigned widened_to_bf16(unsigned pair, float factor) {
  const unsigned tiny = (pair & 0x80008000u) | (pair >> 3 & 0x0fff0fffu);
  const __nv_bfloat162 v =
      __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&tiny), __float2bfloat162_rn(factor));
  return *reinterpret_cast<const unsigned*>(&v);
}

/// The gaps of a chunk, byte j: of places 2j and 2j + 1.
struct Gaps {
  unsigned even, odd;
};

/// What a lane holds of a unit. Each chunk's part may be asked for again, of the next unit, as soon
/// as the chunk is used. (`left`: chunks that there are of the unit asked for.)
template <GapValues kValues, int kBits>
struct GapUnit {
  static constexpr int kChunks = unit_chunks(kBits);
  using Code = std::conditional_t<kValues == GapValues::kFp8, cuda::Fp8, cuda::Int8>;

  const unsigned char *head_from, *values_from;
  unsigned next_planes[kBits], words[kChunks];
  uint4 values[kChunks / 2];

  __device__ __forceinline__ GapUnit(const unsigned char* stream, int lane)
      : head_from(stream + lane * 4),
        values_from(stream + head_bytes(kValues, kBits) + lane * 16) {}

  __device__ __forceinline__ void load(int c, int unit, int left) {
    const std::size_t ahead = static_cast<std::size_t>(unit) * unit_bytes(kValues, kBits);
    if (c < kBits && left > 0) next_planes[c] = load_once4(head_from + ahead + c * kPlaneBytes);
    if (c % 2 == 1 && c - 1 < left) {
      values[c / 2] = load_once16(values_from + ahead + c / 2 * kVectorBytes);
    }
  }
  __device__ __forceinline__ void next(int units) {
    head_from += units * unit_bytes(kValues, kBits);
    values_from += units * unit_bytes(kValues, kBits);
  }

  /// Before the first chunk.
  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int c = 0; c < kBits; ++c) words[c] = next_planes[c];
    if constexpr (kBits == 3) {
      words[3] = (words[0] >> 3 & 0x11111111u) | (words[1] >> 2 & 0x22222222u) |
                 (words[2] >> 1 & 0x44444444u);
    }
  }
  __device__ __forceinline__ Gaps gaps(int c) const {
    constexpr unsigned kMask = kBits == 3 ? 0x07070707u : 0x0f0f0f0fu;
    return {words[c] & kMask, words[c] >> 4 & kMask};
  }
  /// Of places 2j and 2j + 1.
  __device__ __forceinline__ float2 pair(int c, int j) const {
    const uint4& v = values[c / 2];
    const unsigned four = c % 2 == 0 ? (j < 2 ? v.x : v.y) : (j < 2 ? v.z : v.w);
    unsigned halves;
    if constexpr (kValues == GapValues::kFp8) {
      asm("cvt.rn.f16x2.e4m3x2 %0, %1;"
          : "=r"(halves)
          : "h"(static_cast<unsigned short>(j % 2 == 0 ? four : four >> 16)));
    } else {
      const unsigned biased = __byte_perm(four, 0x64646464u, j % 2 == 0 ? 0x4140 : 0x4342);
      asm("sub.f16x2 %0, %1, %2;" : "=r"(halves) : "r"(biased), "r"(0x64806480u));  // 1024 + 128
    }
    return widened(halves);
  }
  /// The same as bf16. `factor`: the scale of the row.
  __device__ __forceinline__ unsigned bf16_pair(int c, int j, float factor) const {
    const float2 v = pair(c, j);
    const __nv_bfloat162 b = __floats2bfloat162_rn(v.x * factor, v.y * factor);
    return *reinterpret_cast<const unsigned*>(&b);
  }

  /// Packs place i of a lane, in memory that was zero. A `value` of 0 only takes the place.
  static __device__ __forceinline__ void put(unsigned char* unit, int c, int i, int lane,
                                             unsigned value, unsigned gap, int) {
    unsigned char* const values = unit + head_bytes(kValues, kBits);
    values[c / 2 * kVectorBytes + lane * 16 + c % 2 * chunk_values(kBits) + i] =
        static_cast<unsigned char>(Code::encode(static_cast<unsigned short>(value)) ^
                                   (kValues == GapValues::kInt8 ? 0x80 : 0));
    unsigned* const words = reinterpret_cast<unsigned*>(unit + lane * 4);
    if (kBits == 4 || c < 3) {
      if (gap != 0) atomicOr(words + c * (kPlaneBytes / 4), gap << (4 * i));
    } else {
      for (int b = 0; b < 3; ++b) {
        if (gap >> b & 1) atomicOr(words + b * (kPlaneBytes / 4), 8u << (4 * i));
      }
    }
  }
};

template <int kBits>
struct GapUnit<GapValues::kBf16, kBits> {
  static constexpr GapValues kValues = GapValues::kBf16;
  static constexpr int kChunks = unit_chunks(kBits);
  const unsigned char *head_from, *values_from;
  unsigned next_high = 0, high = 0;
  uint4 places[kChunks];

  __device__ __forceinline__ GapUnit(const unsigned char* stream, int lane)
      : head_from(stream + lane * 4),
        values_from(stream + head_bytes(kValues, kBits) + lane * 16) {}

  __device__ __forceinline__ void load(int c, int unit, int left) {
    if (c >= left) return;
    const std::size_t ahead = static_cast<std::size_t>(unit) * unit_bytes(kValues, kBits);
    if (kBits == 4 && c == 0) next_high = load_once4(head_from + ahead);
    places[c] = load_once16(values_from + ahead + c * kVectorBytes);
  }
  __device__ __forceinline__ void next(int units) {
    head_from += units * unit_bytes(kValues, kBits);
    values_from += units * unit_bytes(kValues, kBits);
  }

  __device__ __forceinline__ void begin() { high = next_high; }
  __device__ __forceinline__ Gaps gaps(int c) const {
    const unsigned front = __byte_perm(places[c].x, places[c].y, 0x6240);
    const unsigned back = __byte_perm(places[c].z, places[c].w, 0x6240);
    Gaps g = {__byte_perm(front, back, 0x5410) & 0x07070707u,
              __byte_perm(front, back, 0x7632) & 0x07070707u};
    if constexpr (kBits == 4) {
      g.even |= high << (3 - c) & 0x08080808u;
      g.odd |= high >> (1 + c) & 0x08080808u;
    }
    return g;
  }
  /// By 2^(142 - top).
  __device__ __forceinline__ float2 pair(int c, int j) const {
    return widened(word(c, j) & 0xfff8fff8u);
  }
  /// `factor`: 2^(top - 30).
  __device__ __forceinline__ unsigned bf16_pair(int c, int j, float factor) const {
    return widened_to_bf16(word(c, j), factor);
  }

  static __device__ __forceinline__ void put(unsigned char* unit, int c, int i, int lane,
                                             unsigned value, unsigned gap, int top) {
    unsigned char* const values = unit + head_bytes(kValues, kBits);
    reinterpret_cast<unsigned short*>(values + c * kVectorBytes + lane * 16)[i] =
        static_cast<unsigned short>((value != 0 ? narrowed(value, top) : 0) | (gap & 7));
    // Of place i in byte i / 2, the even places' in the low halves.
    if (gap > 7) {
      atomicOr(reinterpret_cast<unsigned*>(unit + lane * 4), 1u << (i / 2 * 8 + i % 2 * 4 + c));
    }
  }

 private:
  __device__ __forceinline__ unsigned word(int c, int j) const {
    const uint4& p = places[c];
    return j == 0 ? p.x : j == 1 ? p.y : j == 2 ? p.z : p.w;
  }
};

/// Windows.
template <>
struct GapUnit<GapValues::kBf16, kWindowBits> {
  static constexpr int kChunks = unit_chunks(kWindowBits);
  static constexpr int kChunkBytes = value_bytes(GapValues::kBf16, kWindowBits, 1);
  const unsigned char *from, *upper_from;
  uint4 places[2 * kChunks];
  uint2 upper[kChunks];

  __device__ __forceinline__ GapUnit(const unsigned char* stream, int lane)
      : from(stream + lane * 16), upper_from(stream + 2 * kVectorBytes + lane * 8) {}

  __device__ __forceinline__ void load(int c, int unit, int left) {
    if (c >= left) return;
    const std::size_t ahead = static_cast<std::size_t>(unit * kChunks + c) * kChunkBytes;
    places[2 * c] = load_once16(from + ahead);
    places[2 * c + 1] = load_once16(from + ahead + kVectorBytes);
    upper[c] = load_once8(upper_from + ahead);
  }
  __device__ __forceinline__ void next(int units) {
    from += units * kChunks * kChunkBytes;
    upper_from += units * kChunks * kChunkBytes;
  }
  __device__ __forceinline__ void begin() {}

  /// Places 2w and 2w + 1.
  __device__ __forceinline__ unsigned word(int c, int w) const {
    const uint4& p = places[2 * c + w / 4];
    return w % 4 == 0 ? p.x : w % 4 == 1 ? p.y : w % 4 == 2 ? p.z : p.w;
  }
  /// Offsets of places 4q, 4q + 2, 4q + 1, 4q + 3, a byte each.
  __device__ __forceinline__ unsigned offsets(int c, int q) const {
    const unsigned lower = __byte_perm(word(c, 2 * q), word(c, 2 * q + 1), 0x6240);
    const unsigned four = q < 2 ? upper[c].x : upper[c].y;
    return (lower & 0x07070707u) | ((q % 2 == 0 ? four << 3 : four >> 1) & 0x78787878u);
  }
  /// By 2^(142 - top).
  __device__ __forceinline__ float2 pair(int c, int w) const {
    return widened(word(c, w) & 0xfff8fff8u);
  }
  __device__ __forceinline__ unsigned bf16_pair(int c, int w, float factor) const {
    return widened_to_bf16(word(c, w), factor);
  }

  /// Where the 4 upper bits of place i stand among a lane's 64.
  static __device__ __forceinline__ int upper_at(int i) {
    const int q = i / 4, byte = i % 2 * 2 + i / 2 % 2;
    return q / 2 * 32 + byte * 8 + q % 2 * 4;
  }
  /// Packs place i of a lane, in memory that was zero.
  static __device__ __forceinline__ void put(unsigned char* chunk, int i, int lane, unsigned value,
                                             unsigned offset, int top) {
    reinterpret_cast<unsigned short*>(chunk + i / 8 * kVectorBytes + lane * 16)[i % 8] =
        static_cast<unsigned short>((value != 0 ? narrowed(value, top) : 0) | (offset & 7));
    const int at = upper_at(i);
    if (offset > 7) {
      atomicOr(reinterpret_cast<unsigned*>(chunk + 2 * kVectorBytes + lane * 8) + at / 32,
               offset >> 3 << (at % 32));
    }
  }
};

}  // namespace lacuna::kernels::linear_bitmap
