// The idea: a column hangs on all columns to its left, rows on nothing. A warp takes 4 rows, each
// lane 4 neighbouring columns of them in registers, and walks over the columns; the lane that owns
// column j makes e = w / U_jj and hands it to the others. The corner of U lies in shared memory,
// strictly upper, so that what lies to the left of j loses e * 0:
//
//   lane:        0        1      ...   31
//   columns:  0 1 2 3  4 5 6 7   ...  124..127      step j = 5: lane 1 hands out e,
//   U_5:      0 0 0 0  0 0 u u   u u u u u u u      all do w -= e * u
//
// Four rows a warp hide each other's divisions and shuffles.
#include "lacuna/kernels/column_loop/cuda_sm80_column_loop.h"

namespace lacuna::kernels::column_loop {
namespace {

constexpr int kMostColumns = 128, kLaneColumns = 4, kWarpRows = 4, kBlockWarps = 8;
constexpr int kBlockRows = kWarpRows * kBlockWarps;
constexpr size_t kCornerBytes = size_t{kMostColumns} * kMostColumns * sizeof(float);

// One row of a stripe as a lane sees it.
struct LaneColumns {
  float weight[kLaneColumns], error[kLaneColumns];
  unsigned kept;  // bit c: of column c
};

__device__ __forceinline__ float pick(const float (&values)[kLaneColumns], int c) {
  const float low = c & 1 ? values[1] : values[0], high = c & 1 ? values[3] : values[2];
  return c & 2 ? high : low;
}

// Which weights of columns first .. first + n - 1 stay; first and n are the same in all lanes.
__device__ void choose_group(LaneColumns& row, const float (&diagonal)[kLaneColumns], int lane,
                             int first, int n, int keep) {
  float score[kLaneColumns];
  int better[kLaneColumns] = {};
#pragma unroll
  for (int c = 0; c < kLaneColumns; ++c) {
    const float scaled = __fdiv_rn(row.weight[c], diagonal[c]);
    score[c] = scaled * scaled;
  }
  for (int column = first; column < first + n; ++column) {
    const float other = __shfl_sync(~0u, pick(score, column % kLaneColumns), column / kLaneColumns);
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c)
      better[c] += column < lane * kLaneColumns + c ? other >= score[c] : other > score[c];
  }
#pragma unroll
  for (int c = 0; c < kLaneColumns; ++c) {
    const int own = lane * kLaneColumns + c;
    if (own < first || own >= first + n) continue;
    row.kept = (row.kept & ~(1u << c)) | (better[c] < keep ? 1u << c : 0);
  }
}

__global__ void __launch_bounds__(kBlockWarps * 32) column_loop_kernel(const GpuColumnLoop stripe) {
  extern __shared__ __align__(16) float corner[];  // [128][128], strictly upper
  const int width = stripe.width, lane = threadIdx.x & 31;
  for (int i = threadIdx.x; i < width * kMostColumns; i += kBlockWarps * 32) {
    const int row = i / kMostColumns, column = i % kMostColumns;
    corner[i] =
        row < column && column < width ? stripe.upper[row * stripe.upper_stride + column] : 0.0f;
  }
  float diagonal[kLaneColumns];
#pragma unroll
  for (int c = 0; c < kLaneColumns; ++c) {
    const int column = lane * kLaneColumns + c;
    diagonal[c] = column < width ? stripe.upper[column * (stripe.upper_stride + 1)] : 1.0f;
  }
  __syncthreads();

  const int64_t top = static_cast<int64_t>(blockIdx.x) * kBlockRows + threadIdx.x / 32 * kWarpRows;
  LaneColumns rows[kWarpRows];
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    rows[r].kept = 0;
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) {
      const int column = lane * kLaneColumns + c;
      const bool there = top + r < stripe.rows && column < width;
      rows[r].error[c] = 0;
      rows[r].weight[c] = there ? stripe.weight[(top + r) * stripe.weight_stride + column] : 0.0f;
      if (there && stripe.kept[(top + r) * stripe.kept_stride + column] != 0)
        rows[r].kept |= 1u << c;
    }
  }

  int next_group = stripe.of > 0 ? 0 : width;  // where one begins
  for (int owner = 0; owner * kLaneColumns < width; ++owner) {
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) {
      const int j = owner * kLaneColumns + c;
      if (j >= width) break;
      if (j == next_group) {
#pragma unroll
        for (int r = 0; r < kWarpRows; ++r)
          choose_group(rows[r], diagonal, lane, j, min(stripe.of, width - j), stripe.keep);
        next_group += stripe.of;
      }
      const float4 u =
          *reinterpret_cast<const float4*>(corner + j * kMostColumns + lane * kLaneColumns);
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r) {
        LaneColumns& row = rows[r];
        const bool dropped = lane == owner && !(row.kept >> c & 1);
        float e = dropped ? __fdiv_rn(row.weight[c], diagonal[c]) : 0.0f;
        if (lane == owner) row.error[c] = e;
        if (dropped) row.weight[c] = 0;
        e = __shfl_sync(~0u, e, owner);
        row.weight[0] = fmaf(-e, u.x, row.weight[0]);
        row.weight[1] = fmaf(-e, u.y, row.weight[1]);
        row.weight[2] = fmaf(-e, u.z, row.weight[2]);
        row.weight[3] = fmaf(-e, u.w, row.weight[3]);
      }
    }
  }

#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    if (top + r >= stripe.rows) break;
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) {
      const int column = lane * kLaneColumns + c;
      if (column >= width) break;
      stripe.weight[(top + r) * stripe.weight_stride + column] = rows[r].weight[c];
      stripe.error[(top + r) * width + column] = rows[r].error[c];
      if (stripe.of > 0)
        stripe.kept[(top + r) * stripe.kept_stride + column] = rows[r].kept >> c & 1;
    }
  }
}

}  // namespace

cudaError_t column_loop(const GpuColumnLoop& stripe, cudaStream_t stream) {
  if (stripe.width < 1 || stripe.width > kMostColumns || stripe.of < 0 || stripe.of > 64)
    return cudaErrorInvalidValue;
  const int64_t blocks = (stripe.rows + kBlockRows - 1) / kBlockRows;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  if (const cudaError_t error =
          cudaFuncSetAttribute(column_loop_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(kCornerBytes)))
    return error;
  column_loop_kernel<<<static_cast<unsigned>(blocks), kBlockWarps * 32, kCornerBytes, stream>>>(
      stripe);
  return cudaGetLastError();
}

}  // namespace lacuna::kernels::column_loop
