// The block types as they lie in the file. A block begins with its float16 scales (or ends with
// them, Q6_K) and holds the small integers that they multiply. "Bit-equal" hangs on the order of
// the roundings: every product and every sum below is one float32 operation, in this order, and
// this file is compiled for an instruction set without fused multiply-add.
#include <algorithm>

#include "lacuna/core/half.h"
#include "lacuna/io/gguf/gguf.h"

namespace lacuna::io {
namespace {

constexpr int kSmall = 32;   // elements of a block of the older types
constexpr int kLarge = 256;  // elements of a block of the K types
constexpr int64_t kChunkElements = 1 << 16;

float scale_at(const uint8_t* at) { return f16_to_float(read_unaligned<uint16_t>(at)); }

/// scale, 16 bytes: element i in the low half of byte i, element i + 16 in the high half
void expand_q4_0(const uint8_t* block, float* out) {
  const float scale = scale_at(block);
  const uint8_t* quants = block + 2;
  for (int i = 0; i < kSmall / 2; ++i) {
    out[i] = scale * static_cast<float>((quants[i] & 15) - 8);
    out[i + kSmall / 2] = scale * static_cast<float>((quants[i] >> 4) - 8);
  }
}

/// scale, offset, 16 bytes as Q4_0's
void expand_q4_1(const uint8_t* block, float* out) {
  const float scale = scale_at(block), offset = scale_at(block + 2);
  const uint8_t* quants = block + 4;
  for (int i = 0; i < kSmall / 2; ++i) {
    out[i] = scale * static_cast<float>(quants[i] & 15) + offset;
    out[i + kSmall / 2] = scale * static_cast<float>(quants[i] >> 4) + offset;
  }
}

/// The fifth bits of all 32 elements, then 16 bytes as Q4_0's.
void unpack_5_bits(const uint8_t* packed, uint8_t* quants) {
  const auto high = read_unaligned<uint32_t>(packed);
  for (int i = 0; i < kSmall / 2; ++i) {
    const uint8_t low = packed[4 + i];
    quants[i] = static_cast<uint8_t>((low & 15) | ((high >> i & 1) << 4));
    quants[i + kSmall / 2] =
        static_cast<uint8_t>((low >> 4) | ((high >> (i + kSmall / 2) & 1) << 4));
  }
}

void expand_q5_0(const uint8_t* block, float* out) {
  const float scale = scale_at(block);
  uint8_t quants[kSmall];
  unpack_5_bits(block + 2, quants);
  for (int i = 0; i < kSmall; ++i) out[i] = scale * static_cast<float>(quants[i] - 16);
}

void expand_q5_1(const uint8_t* block, float* out) {
  const float scale = scale_at(block), offset = scale_at(block + 2);
  uint8_t quants[kSmall];
  unpack_5_bits(block + 4, quants);
  for (int i = 0; i < kSmall; ++i) out[i] = scale * static_cast<float>(quants[i]) + offset;
}

/// scale, 32 signed bytes
void expand_q8_0(const uint8_t* block, float* out) {
  const float scale = scale_at(block);
  for (int i = 0; i < kSmall; ++i)
    out[i] = static_cast<float>(static_cast<int8_t>(block[2 + i])) * scale;
}

/// Q4_K and Q5_K: 8 groups of 32 elements with a 6-bit scale and a 6-bit minimum each, packed into
/// 12 bytes. Groups 0-3 have the low 6 bits of bytes 0-3 (scale) and 4-7 (minimum). Groups 4-7 have
/// their low 4 bits in bytes 8-11 (scale low half, minimum high half) and their upper 2 bits in the
/// upper 2 bits of bytes 0-3 and 4-7.
struct Groups {
  float scale[8], minimum[8];

  Groups(const uint8_t* block, const uint8_t* packed) {
    const float d = scale_at(block), dmin = scale_at(block + 2);
    for (int g = 0; g < 4; ++g) {
      set(g, d, dmin, packed[g] & 63, packed[4 + g] & 63);
      set(g + 4, d, dmin, (packed[8 + g] & 15) | (packed[g] >> 6 << 4),
          (packed[8 + g] >> 4) | (packed[4 + g] >> 6 << 4));
    }
  }
  void set(int group, float d, float dmin, int six_bit_scale, int six_bit_minimum) {
    scale[group] = d * static_cast<float>(six_bit_scale);
    minimum[group] = dmin * static_cast<float>(six_bit_minimum);
  }
};

/// scale, minimum scale, 12 bytes of groups, 128 bytes: each 32 bytes hold two groups, the first in
/// the low halves
void expand_q4_k(const uint8_t* block, float* out) {
  const Groups groups(block, block + 4);
  const uint8_t* quants = block + 16;
  for (int g = 0; g < 8; ++g)
    for (int i = 0; i < 32; ++i) {
      const int quant = quants[g / 2 * 32 + i] >> (g % 2 * 4) & 15;
      out[g * 32 + i] = groups.scale[g] * static_cast<float>(quant) - groups.minimum[g];
    }
}

/// as Q4_K, with the fifth bits before the halves: bit g of byte i belongs to element i of group g
void expand_q5_k(const uint8_t* block, float* out) {
  const Groups groups(block, block + 4);
  const uint8_t *high = block + 16, *low = block + 48;
  for (int g = 0; g < 8; ++g)
    for (int i = 0; i < 32; ++i) {
      const int quant = (low[g / 2 * 32 + i] >> (g % 2 * 4) & 15) | (high[i] >> g & 1) << 4;
      out[g * 32 + i] = groups.scale[g] * static_cast<float>(quant) - groups.minimum[g];
    }
}

/// 128 bytes of low halves, 64 bytes of upper 2 bits, 16 signed scales (one for 16 elements), the
/// scale of the scales. Each half of the block (128 elements, 4 groups of 32): group g takes the
/// low or (g >= 2) high halves of 64 bytes, and bits 2g of 32 bytes.
void expand_q6_k(const uint8_t* block, float* out) {
  const uint8_t *low = block, *high = block + 128, *scales = block + 192;
  const float d = scale_at(block + 208);
  for (int at = 0; at < kLarge; ++at) {
    const int half = at / 128, group = at % 128 / 32, i = at % 32;
    const int four = low[half * 64 + group % 2 * 32 + i] >> (group / 2 * 4) & 15;
    const int two = high[half * 32 + i] >> (group * 2) & 3;
    const float scale = d * static_cast<float>(static_cast<int8_t>(scales[at / 16]));
    out[at] = scale * static_cast<float>((four | two << 4) - 32);
  }
}

void expand_f32(const uint8_t* block, float* out) { *out = read_unaligned<float>(block); }
void expand_f16(const uint8_t* block, float* out) { *out = scale_at(block); }
void expand_bf16(const uint8_t* block, float* out) {
  *out = bf16_to_float(read_unaligned<uint16_t>(block));
}

struct Layout {
  GgufBlock block;
  void (*expand)(const uint8_t* block, float* out);
};

Layout layout_of(GgufType type) {
  switch (type) {
    case GgufType::kF32:
      return {{"F32", 1, 4}, expand_f32};
    case GgufType::kF16:
      return {{"F16", 1, 2}, expand_f16};
    case GgufType::kBF16:
      return {{"BF16", 1, 2}, expand_bf16};
    case GgufType::kQ4_0:
      return {{"Q4_0", kSmall, 2 + 16}, expand_q4_0};
    case GgufType::kQ4_1:
      return {{"Q4_1", kSmall, 4 + 16}, expand_q4_1};
    case GgufType::kQ5_0:
      return {{"Q5_0", kSmall, 2 + 4 + 16}, expand_q5_0};
    case GgufType::kQ5_1:
      return {{"Q5_1", kSmall, 4 + 4 + 16}, expand_q5_1};
    case GgufType::kQ8_0:
      return {{"Q8_0", kSmall, 2 + 32}, expand_q8_0};
    case GgufType::kQ4_K:
      return {{"Q4_K", kLarge, 4 + 12 + 128}, expand_q4_k};
    case GgufType::kQ5_K:
      return {{"Q5_K", kLarge, 4 + 12 + 32 + 128}, expand_q5_k};
    case GgufType::kQ6_K:
      return {{"Q6_K", kLarge, 128 + 64 + 16 + 2}, expand_q6_k};
  }
  return {};
}

void expand_blocks(const Layout& layout, const GgufTensor& tensor, int64_t first, int64_t count,
                   float* out) {
  const auto* bytes = tensor.bytes.as<uint8_t>();
  for (int64_t i = 0; i < count; ++i)
    layout.expand(bytes + (first + i) * layout.block.bytes, out + i * layout.block.elements);
}

}  // namespace

GgufBlock gguf_block(GgufType type) { return layout_of(type).block; }

Status dequantize(const GgufTensor& tensor, float* out, const Executor& executor) {
  const Layout layout = layout_of(tensor.type);
  const auto elements = element_count(tensor.shape);
  if (!elements || *elements % layout.block.elements != 0 ||
      *elements / layout.block.elements !=
          static_cast<int64_t>(tensor.bytes.size()) / layout.block.bytes)
    return bad_input("tensor \"{}\": {} bytes don't fit the shape {} in {}.", tensor.name,
                     tensor.bytes.size(), shape_text(tensor.shape), layout.block.name);
  const int64_t blocks = *elements / layout.block.elements;
  const int64_t step = kChunkElements / layout.block.elements;
  executor.parallel_for((blocks + step - 1) / step, [&](int64_t chunk) {
    const int64_t first = chunk * step;
    expand_blocks(layout, tensor, first, std::min(step, blocks - first),
                  out + first * layout.block.elements);
  });
  return {};
}

void dequantize_row(const GgufTensor& tensor, int64_t row, float* out) {
  const Layout layout = layout_of(tensor.type);
  const int64_t blocks = tensor.row_elements() / layout.block.elements;
  expand_blocks(layout, tensor, row * blocks, blocks, out);
}

}  // namespace lacuna::io
