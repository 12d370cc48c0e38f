// What liblacuna_cuda.so shows to the program that loads it: one table of plain C structs. Only
// pointers, sizes and numbers cross, so that neither side needs the headers or the compiler of the
// other.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

namespace lacuna::kernels {

namespace decode {
struct Operations;  // decode/decode.h
}

extern "C" {

/// A cudaStream_t. All pointers to matrices below are device memory; nothing waits for the stream
/// unless it says so. Functions that return int return a cudaError_t: 0 is success.
typedef void* GpuStream;
/// A cudaGraphExec_t.
typedef void* GpuRecording;

/// What packing found, in device memory.
struct GpuPackReport {
  unsigned long long violations;   ///< groups that break the pattern
  unsigned long long first_group;  ///< the lowest of them, row * groups_per_row + group; ~0: none
};

/// How one weight is packed: the kernel's own, made by its measure(). The packed bytes mean nothing
/// without it. Where it has no bytes, the kernel reads W as it is: pack() does nothing, and run()
/// and unpack() take W (aligned to 16 bytes) for the packed weight.
struct GpuLayout {
  size_t packed_bytes;
  alignas(16) unsigned char storage[112];
};

/// How one launch is cut: the kernel's own, made by its plan().
struct GpuPlan {
  alignas(16) unsigned char storage[64];
};

/// A kernel for y[T,N] = x[T,K] · W[N,K]^T with a weight that it packs for itself.
struct GpuLinearKernel {
  const char* operation;  ///< "linear_nm"
  const char* name;       ///< of the candidate: "cuda_sm90_mma_sp"

  /// Packing has two steps, for the layout and its size may depend on the weight. First measure()
  /// looks at W ([N,K], 16 bits) and decides; it may wait for the stream, and leave what pack()
  /// needs in the scratch (scratch_bytes() of device memory). Where the shape decides, it looks at
  /// nothing.
  size_t (*scratch_bytes)(int64_t n, int64_t k);
  int (*measure)(const void* dense, int64_t n, int64_t k, void* scratch, GpuLayout* layout,
                 GpuStream stream);
  /// Writes layout->packed_bytes; `packed` is aligned to 128 bytes.
  int (*pack)(const GpuLayout* layout, const void* dense, const void* scratch, void* packed,
              GpuPackReport* report, GpuStream stream);
  /// The weight again, [N,K], dense; a dropped weight is +0.
  int (*unpack)(const GpuLayout* layout, const void* packed, void* dense, GpuStream stream);

  /// run() takes 1 .. max_tokens(), and from many_tokens() on any number: from there it beats
  /// unpack() and the dense product (0: never). Plans for few tokens are meant to be kept, those
  /// for many cost little to make.
  int64_t (*max_tokens)(const GpuLayout* layout);
  int64_t (*many_tokens)(const GpuLayout* layout);
  /// For the current device. Everything that can be checked is checked here.
  int (*plan)(const GpuLayout* layout, int64_t tokens, GpuPlan* plan);
  size_t (*workspace_bytes)(const GpuLayout* layout, const GpuPlan* plan);
  /// x and y are row-major and contiguous, x and the workspace aligned to 16 bytes, for many tokens
  /// and rounded x y too. With `overlap_previous` the
  /// launch is programmatic: it may read W while the kernel ahead of it in the stream still runs,
  /// but touches neither x nor y nor the workspace before that kernel is complete.
  int (*run)(const GpuLayout* layout, const GpuPlan* plan, const void* packed, const void* x,
             void* y, void* workspace, int overlap_previous, GpuStream stream);

  /// A kernel of codes, else null: W of measure() and pack() is a matrix of codes, as bf16 numbers,
  /// and this adds their scales, bf16 [N] or [N, groups], to what pack() has written. unpack()
  /// gives codes times scales, rounded to bf16.
  int (*pack_scales)(const GpuLayout* layout, const void* scales, void* packed, GpuStream stream);

  /// A kernel that can also round x to codes, one scale a token, and multiply those, else null:
  /// such a plan for run(), for any number of tokens from rounded_from() on (0: never), where it is
  /// the faster one. No other plan rounds x.
  int64_t (*rounded_from)(const GpuLayout* layout);
  int (*plan_rounded)(const GpuLayout* layout, int64_t tokens, GpuPlan* plan);

  /// Writes the codes of W [N,K], a byte each (e4m3 or int8), for a dense product of many tokens.
  /// Null where W has none of 8 bits with one scale a row, or run() takes many tokens itself.
  int (*unpack_codes)(const GpuLayout* layout, const void* packed, void* codes, GpuStream stream);
};

/// A compact matrix with a bitmap (format/compact.h), its parts in device memory.
struct GpuBitmapMatrix {
  int64_t rows, columns;
  int32_t element_bytes;  ///< of a value: 2 or 4
  const unsigned char* bitmap;
  const void* values;
  const int64_t* row_values;  ///< values before each row [rows]; null: values_per_row each
  int64_t values_per_row;
};

/// A stripe of columns of a weight that is pruned, with what surrounds it in device memory: every
/// pointer stands at the stripe's first column (`upper` at its first row, too).
struct GpuColumnLoop {
  int64_t rows;
  int32_t width;     ///< 1 .. 128 columns
  int32_t keep, of;  ///< of = 0: `kept` is given, else it is chosen in groups of 1 .. 64
  float* weight;     ///< [rows, width] of rows `weight_stride` apart
  int64_t weight_stride;
  unsigned char* kept;  ///< 1 or 0, as weight
  int64_t kept_stride;
  const float* upper;  ///< [width, width], upper triangular
  int64_t upper_stride;
  float* error;  ///< [rows, width], contiguous: written
};

/// x [T,K], bf16, that becomes codes: e4m3, else int8. Aligned to 16 bytes, K a multiple of 16.
struct GpuRounding {
  int64_t tokens, columns;
  int32_t e4m3;
  const void* x;
  void* codes;    ///< [T,K], a byte each
  float* scales;  ///< [T]; of a token with NaN or Inf NaN, and its codes 0
};

/// y[t,n] = sums[t,n] token_scales[t] row_scales[n], bf16. Aligned to 16 bytes, N a multiple of 8.
struct GpuScaling {
  int64_t tokens, rows;
  const int32_t* sums;
  const float* token_scales;
  const float* row_scales;
  void* y;
};

/// All of the library.
struct GpuTable {
  int32_t version;  ///< kGpuAbiVersion of the headers it was built with
  const char* (*error_text)(int error);
  /// The matrix, dense, in elements of the same type.
  int (*expand)(const GpuBitmapMatrix* matrix, void* dense, GpuStream stream);
  const GpuLinearKernel* const* linear;
  int32_t linear_count;
  const decode::Operations* decode;  ///< their queue is a GpuStream

  /// Between device memory and pinned host memory, either way.
  int (*copy)(void* to, const void* from, size_t bytes, GpuStream stream);
  /// What a launch that tells no error itself has met since the last call (decode's), then
  /// forgotten.
  int (*last_error)();
  /// Until all that was put onto the stream is done.
  int (*wait)(GpuStream stream);
  /// What this thread puts onto the stream between the two is not run but recorded (a CUDA graph).
  int (*record_begin)(GpuStream stream);
  int (*record_end)(GpuStream stream, GpuRecording* recording);
  int (*replay)(GpuRecording recording, GpuStream stream);
  void (*forget)(GpuRecording recording);

  /// Optimal brain surgery inside a stripe (kernels/column_loop).
  int (*column_loop)(const GpuColumnLoop* stripe, GpuStream stream);

  /// What stands around a dense product of codes (kernels/code_product).
  int (*round_tokens)(const GpuRounding* rounding, GpuStream stream);
  int (*scale_sums)(const GpuScaling* scaling, GpuStream stream);

  /// Whether cuSPARSE is there to be loaded (linear_csr's kernel stands on it).
  int (*has_cusparse)();
  /// Whether cuSPARSELt is (a kernel of linear_nm).
  int (*has_cusparselt)();
};

/// The one function that the library exports, as kGpuTableSymbol.
typedef const GpuTable* (*GpuTableFunction)();

}  // extern "C"

/// A kernel's own data in the storage of a GpuLayout or GpuPlan.
template <class T, class Holder>
void hold(Holder* holder, const T& value) {
  static_assert(sizeof(value) <= sizeof(holder->storage));
  memcpy(holder->storage, &value, sizeof(value));
}
template <class T, class Holder>
T held(const Holder* holder) {
  T value;
  memcpy(&value, holder->storage, sizeof(value));
  return value;
}

/// Changes with any struct above.
inline constexpr int32_t kGpuAbiVersion = 9;
inline constexpr const char* kGpuTableSymbol = "lacuna_gpu_table";

}  // namespace lacuna::kernels
