// The idea: one warp takes 1,024 columns of a row. Each lane holds 32 of their bits; a scan over
// the lanes' counts says where each lane's values begin. Then the warp walks over its columns, two
// a lane, so that loads and stores lie side by side:
//
//   bits    |lane 0: 32 bits|lane 1|...|lane 31|      counted, scanned: values before each
//   step s  |w = bits of lane 2s      |w = bits of lane 2s+1  |
//           lanes 0..15: columns 0..31 lanes 16..31: 32..63     value index = scan + ones below
//
// A warp that doesn't begin its row counts the ones before it itself: no pass over the matrix ahead
// of this one, and rows are cut finely enough to fill the machine.
#include "lacuna/kernels/expand/cuda_sm80_expand.h"

namespace lacuna::kernels::expand {
namespace {

constexpr int kWarpColumns = 1024;
constexpr int kBlockWarps = 8;

// 32 bits of a row from bit 32 * word on; those past its last byte are 0.
__device__ __forceinline__ unsigned row_word(const unsigned char* bits, int64_t stride,
                                             int64_t word, bool aligned) {
  if (word * 4 >= stride) return 0;
  if (aligned) return *reinterpret_cast<const unsigned*>(bits + word * 4);
  unsigned value = 0;
  for (int64_t i = 0; i < 4 && word * 4 + i < stride; ++i)
    value |= static_cast<unsigned>(bits[word * 4 + i]) << (8 * i);
  return value;
}

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T low, high;
};

template <class T>
__global__ void expand_kernel(const GpuBitmapMatrix matrix, int64_t row_warps, T* dense) {
  const int lane = threadIdx.x & 31;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kBlockWarps + (threadIdx.x >> 5);
  const int64_t row = warp / row_warps, part = warp % row_warps;
  if (row >= matrix.rows) return;
  const int64_t stride = (matrix.columns + 7) / 8;
  const unsigned char* bits = matrix.bitmap + row * stride;
  const bool aligned = stride % 4 == 0 && reinterpret_cast<uintptr_t>(matrix.bitmap) % 4 == 0;

  int before = 0;
  for (int64_t word = lane; word < part * 32; word += 32)
    before += __popc(row_word(bits, stride, word, aligned));
  before = __reduce_add_sync(~0u, before);
  const T* values = static_cast<const T*>(matrix.values) + before +
                    (matrix.row_values ? matrix.row_values[row] : row * matrix.values_per_row);

  const unsigned own = row_word(bits, stride, part * 32 + lane, aligned);
  int sum = __popc(own);
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(~0u, sum, distance);
    if (lane >= distance) sum += other;
  }
  const int first = sum - __popc(own);

  const int64_t column0 = part * kWarpColumns;
  const int steps =
      static_cast<int>(min(static_cast<int64_t>(16), (matrix.columns - column0 + 63) / 64));
  T* out = dense + row * matrix.columns + column0;
  const bool pairs =
      matrix.columns % 2 == 0 && reinterpret_cast<uintptr_t>(dense) % sizeof(Pair<T>) == 0;
  const int bit = 2 * (lane & 15);
#pragma unroll 4
  for (int s = 0; s < steps; ++s) {
    const int holder = 2 * s + (lane >> 4);
    const unsigned word = __shfl_sync(~0u, own, holder);
    const T* next = values + __shfl_sync(~0u, first, holder) + __popc(word & ((1u << bit) - 1));
    const bool low = word >> bit & 1, high = word >> (bit + 1) & 1;
    const Pair<T> two{low ? next[0] : T{0}, high ? next[low] : T{0}};
    const int column = 64 * s + 2 * lane;
    if (pairs) {
      if (column0 + column < matrix.columns) *reinterpret_cast<Pair<T>*>(out + column) = two;
    } else {
      if (column0 + column < matrix.columns) out[column] = two.low;
      if (column0 + column + 1 < matrix.columns) out[column + 1] = two.high;
    }
  }
}

template <class T>
cudaError_t launch(const GpuBitmapMatrix& matrix, void* dense, cudaStream_t stream) {
  const int64_t row_warps = (matrix.columns + kWarpColumns - 1) / kWarpColumns;
  const int64_t blocks = (matrix.rows * row_warps + kBlockWarps - 1) / kBlockWarps;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX || reinterpret_cast<uintptr_t>(matrix.values) % sizeof(T) != 0 ||
      reinterpret_cast<uintptr_t>(dense) % sizeof(T) != 0)
    return cudaErrorInvalidValue;
  expand_kernel<T><<<static_cast<unsigned>(blocks), kBlockWarps * 32, 0, stream>>>(
      matrix, row_warps, static_cast<T*>(dense));
  return cudaGetLastError();
}

}  // namespace

cudaError_t expand(const GpuBitmapMatrix& matrix, void* dense, cudaStream_t stream) {
  switch (matrix.element_bytes) {
    case 2:
      return launch<unsigned short>(matrix, dense, stream);
    case 4:
      return launch<unsigned>(matrix, dense, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace lacuna::kernels::expand
