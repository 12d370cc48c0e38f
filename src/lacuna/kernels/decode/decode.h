// What a decode step does between its linear operations, for few tokens: gather rows, normalize,
// rotate and keep keys, attend over the cache, activate, widen the logits.
//
// One table of functions a device, every operand a plain pointer: a step is a fixed sequence of
// calls on one arena, and nothing of it allocates, locks or asks a framework. Elements are rounded
// to their type where the torch forward rounds them, so that both give the same model.
#pragma once

#include <cstdint>
#include <vector>

#include "lacuna/core/activation.h"
#include "lacuna/core/cpu.h"
#include "lacuna/core/dtype.h"
#include "lacuna/core/executor.h"

namespace lacuna::kernels::decode {

/// Largest head that attend() holds in registers or on the stack.
inline constexpr int64_t kMaxHeadDim = 256;
/// Widest row that a GPU normalizes.
inline constexpr int64_t kMaxGpuRow = 16384;
/// Of Widen.
inline constexpr int64_t kWidenWorkspaceBytes = 4096;

/// out[t] = table[row(t)], or out[t] += it (rounded to the type). Row t is ids[t], or without ids
/// `*position` + offset + t; of tokens that are each of a sequence of their own position[t] +
/// offset.
/// @shape table [rows, width], out [tokens, width]
struct Gather {
  DType dtype = DType::kBF16;
  int64_t tokens = 0, width = 0;
  const void* table = nullptr;
  const int32_t* ids = nullptr;
  const int32_t* position = nullptr;
  int64_t offset = 0;
  bool own_sequences = false;
  bool add = false;
  void* out = nullptr;
};

/// s = x + delta (or x), kept in `sum` if that is set; out = norm(s) w (+ b), if there is an out.
/// Without b RMSNorm, s / sqrt(mean s^2 + eps) rounded before w (https://arxiv.org/abs/1910.07467),
/// with b LayerNorm. Sums in float32.
/// @shape x, delta, sum, out [rows, width], any of them the same memory; weight, bias [width]
struct Normalize {
  DType dtype = DType::kBF16;
  int64_t rows = 0, width = 0;
  const void* x = nullptr;
  const void* delta = nullptr;
  void* sum = nullptr;
  const void* weight = nullptr;
  const void* bias = nullptr;
  float epsilon = 0;
  void* out = nullptr;
};

/// Turns q in place and writes k, turned, and v behind the `*position` tokens of the cache.
///
/// With a sequence_stride each token is the next one of a sequence of its own, which has
/// position[t] tokens, and whose keys (and values) begin t times so many elements after the first
/// one's. Rotary positions pair element i with i + head_dim/2 (https://arxiv.org/abs/2104.09864).
/// @shape q [tokens, heads, head_dim]; k, v [tokens, kv_heads, head_dim]; keys, values [kv_heads,
/// capacity, head_dim]; cos, sin [positions, head_dim], or null: nothing turns
struct Rotate {
  DType dtype = DType::kBF16;
  int64_t tokens = 0, heads = 0, kv_heads = 0, head_dim = 0, capacity = 0;
  int64_t stride = 0;  ///< elements from a token's q, k or v to the next token's; 0: side by side
  int64_t sequence_stride = 0;  ///< 0: all tokens are of one sequence
  void* q = nullptr;
  const void* k = nullptr;
  const void* v = nullptr;
  const void* cos = nullptr;
  const void* sin = nullptr;
  void* keys = nullptr;
  void* values = nullptr;
  const int32_t* position = nullptr;
};

/// out[t,h] = sum_s softmax_s(q[t,h] · keys[s] / sqrt(head_dim)) values[s] over s <= `*position` +
/// t, of these the last `window` where that is not 0. Float32 throughout, one rounding at the end.
/// With a sequence_stride over s <= position[t] of the token's own sequence, as in Rotate.
/// @shape q, out [tokens, heads, head_dim]; keys, values as in Rotate; head h reads key head
/// h / (heads / kv_heads)
/// @limits head_dim <= kMaxHeadDim, on a GPU 64 tokens
struct Attend {
  DType dtype = DType::kBF16;
  int64_t tokens = 0, heads = 0, kv_heads = 0, head_dim = 0, capacity = 0, window = 0;
  int64_t q_stride = 0;         ///< elements from a token's q to the next token's; 0: side by side
  int64_t sequence_stride = 0;  ///< 0: all tokens are of one sequence
  const void* q = nullptr;
  const void* keys = nullptr;
  const void* values = nullptr;
  const int32_t* position = nullptr;
  void* out = nullptr;
  /// Operations::attend_workspace_bytes, zero before the first call (every call leaves zero what
  /// has to be).
  void* workspace = nullptr;
};

/// out = act(gate) * up, the activation rounded before the product; without a gate out = act(up).
/// @shape gate, up, out [count], any of them the same memory; with a stride gate and up have rows
/// of `width`, `stride` apart, and out has its own memory, where they lie side by side
struct Activate {
  DType dtype = DType::kBF16;
  Activation activation = Activation::kSilu;
  int64_t count = 0, width = 0, stride = 0;
  const void* gate = nullptr;
  const void* up = nullptr;
  void* out = nullptr;
};

/// wide = logits as float32; best[row] = the lowest index of the largest one, or -1 if one of them
/// is not a finite number.
/// @shape logits, wide [rows, count], best [rows]
struct Widen {
  DType dtype = DType::kBF16;
  int64_t count = 0, rows = 1;
  const void* logits = nullptr;
  float* wide = nullptr;
  int32_t* best = nullptr;
  /// kWidenWorkspaceBytes for each row, zero before the first call, on a GPU.
  void* workspace = nullptr;
};

/// The functions of one device. `queue` is what orders them: an Executor* on a CPU, where they
/// return when they are done; a cudaStream_t on a GPU (cuda_sm80_decode.h), where positions and ids
/// lie in device memory too, so that a recorded step serves every token.
/// @dtype f32, bf16, f16
/// @determinism the same bits on any number of threads of one CPU model
struct Operations {
  const char* name = nullptr;
  void (*gather)(const Gather&, void* queue) = nullptr;
  void (*normalize)(const Normalize&, void* queue) = nullptr;
  void (*rotate)(const Rotate&, void* queue) = nullptr;
  size_t (*attend_workspace_bytes)(const Attend&) = nullptr;
  void (*attend)(const Attend&, void* queue) = nullptr;
  /// Both, of the same tokens and cache. Afterwards q holds what nobody should read.
  void (*rotate_and_attend)(const Rotate&, const Attend&, void* queue) = nullptr;
  void (*activate)(const Activate&, void* queue) = nullptr;
  void (*widen)(const Widen&, void* queue) = nullptr;
};

/// Those that this CPU runs, the fastest first.
std::vector<const Operations*> cpu_operations(const CpuFeatures& cpu = cpu_features());

}  // namespace lacuna::kernels::decode
