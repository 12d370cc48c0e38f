// What cuda_sm90_wgmma_sp says in PTX: the sparse tensor cores of a warpgroup, tiles that a copy
// swizzles, barriers of a cluster.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "lacuna/kernels/cuda/halves.cuh"

namespace lacuna::kernels::linear_nm {

// --- multiplying
// -----------------------------------------------------------------------------------

#define LACUNA_SUMS_4(c, d, i) "+" c(d[i]), "+" c(d[i + 1]), "+" c(d[i + 2]), "+" c(d[i + 3])
#define LACUNA_SUMS_16(c, d, i)                                                   \
  LACUNA_SUMS_4(c, d, i), LACUNA_SUMS_4(c, d, i + 4), LACUNA_SUMS_4(c, d, i + 8), \
      LACUNA_SUMS_4(c, d, i + 12)
#define LACUNA_SUMS_32(c, d, i) LACUNA_SUMS_16(c, d, i), LACUNA_SUMS_16(c, d, i + 16)
#define LACUNA_SUMS_64(c, d, i) LACUNA_SUMS_32(c, d, i), LACUNA_SUMS_32(c, d, i + 32)
#define LACUNA_SUMS_128(c, d, i) LACUNA_SUMS_64(c, d, i), LACUNA_SUMS_64(c, d, i + 64)
#define LACUNA_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define LACUNA_NAMES_32 \
  LACUNA_NAMES_16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LACUNA_NAMES_64                                                              \
  LACUNA_NAMES_32                                                                    \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LACUNA_NAMES_128                                                                   \
  LACUNA_NAMES_64                                                                          \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"       \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"       \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110" \
  ", %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124"   \
  ", %125, %126, %127"

// d (+)= W x of 64 rows, 16 kept values of each (two bytes a value; else 32) in `a`, and twice as
// many tokens as d has sums; x where the descriptor `b` says. It runs until wgmma_wait: nobody
// touches d and a before that. kSelector: whether lanes 0 and 1 or 2 and 3 of every four hold the
// metadata of two bytes; of bytes all do, and it is 0. (The last seven: the numbers of the
// operands.)
#define LACUNA_WGMMA_SP(name, types, sum, letter, count, tokens, tail, A0, A1, A2, A3, X, E, S, P) \
  template <int kSelector>                                                                         \
  __device__ __forceinline__ void name(sum(&d)[count], const uint4& a, std::uint64_t b,            \
                                       unsigned metadata, int add) {                               \
    asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %" #P                                         \
                 ", 0;\n"                                                                          \
                 " wgmma.mma_async.sp.sync.aligned.m64n" #tokens types " {" LACUNA_NAMES_##count   \
                 "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #X ", %" #E ", %" #S ", p" tail  \
                 ";\n}"                                                                            \
                 : LACUNA_SUMS_##count(letter, d, 0)                                               \
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b), "r"(metadata), "n"(kSelector),  \
                   "r"(add));                                                                      \
  }
#define LACUNA_WGMMA_SP_OF(name, types, sum, letter, tail)                                 \
  LACUNA_WGMMA_SP(name, types, sum, letter, 16, 32, tail, 16, 17, 18, 19, 20, 21, 22, 23)  \
  LACUNA_WGMMA_SP(name, types, sum, letter, 32, 64, tail, 32, 33, 34, 35, 36, 37, 38, 39)  \
  LACUNA_WGMMA_SP(name, types, sum, letter, 64, 128, tail, 64, 65, 66, 67, 68, 69, 70, 71) \
  LACUNA_WGMMA_SP(name, types, sum, letter, 128, 256, tail, 128, 129, 130, 131, 132, 133, 134, 135)

LACUNA_WGMMA_SP_OF(wgmma_sp_bf16, "k32.f32.bf16.bf16", float, "f", ", 1, 1, 0")
LACUNA_WGMMA_SP_OF(wgmma_sp_f16, "k32.f32.f16.f16", float, "f", ", 1, 1, 0")
LACUNA_WGMMA_SP_OF(wgmma_sp_fp8, "k64.f32.e4m3.e4m3", float, "f", ", 1, 1")
LACUNA_WGMMA_SP_OF(wgmma_sp_int8, "k64.s32.s8.s8", int, "r", "")

#undef LACUNA_WGMMA_SP_OF
#undef LACUNA_WGMMA_SP
#undef LACUNA_NAMES_128
#undef LACUNA_NAMES_64
#undef LACUNA_NAMES_32
#undef LACUNA_NAMES_16
#undef LACUNA_SUMS_128
#undef LACUNA_SUMS_64
#undef LACUNA_SUMS_32
#undef LACUNA_SUMS_16
#undef LACUNA_SUMS_4

// Before the first wgmma that reads registers written by others than wgmma.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most kLeft of the groups committed are unfinished.
template <int kLeft>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// After wgmma_wait: what is done with the sums stays behind it.
template <int kSums>
__device__ __forceinline__ void hold_sums(float (&d)[kSums]) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int kSums>
__device__ __forceinline__ void hold_sums(int (&d)[kSums]) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

// Rows of 128 bytes, swizzled in groups of 8 rows; `address` a multiple of 1,024; one more for
// each 16 bytes of columns to skip.
__device__ __forceinline__ std::uint64_t swizzled_descriptor(unsigned address) {
  constexpr std::uint64_t kSwizzle128 = 1ull << 62, kGroupStride = 1024ull >> 4 << 32;
  return kSwizzle128 | kGroupStride | 1ull << 16 | ((address & 0x3ffff) >> 4);
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// --- copying
// ---------------------------------------------------------------------------------------

// The map's box at (column, row) into the same place of the shared memory of every block of the
// cluster in `blocks`, whose barriers count its bytes; what lies beyond the tensor is zero.
__device__ __forceinline__ void tile_copy_to_all(unsigned to, const CUtensorMap& map, int column,
                                                 int row, unsigned barrier, unsigned blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(static_cast<std::uint16_t>(blocks))
      : "memory");
}

// The map itself, which a copy reads, ahead of it.
__device__ __forceinline__ void fetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Shared memory into the map's box at (column, row), what lies beyond the tensor left out.
__device__ __forceinline__ void tile_store(const CUtensorMap& map, int column, int row,
                                           unsigned from) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map),
      "r"(column), "r"(row), "r"(from)
      : "memory");
}

__device__ __forceinline__ void stores_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until all but the last kLeft groups of this thread's stores have read shared memory.
template <int kLeft>
__device__ __forceinline__ void stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kLeft) : "memory");
}

// What this thread has written to shared memory is seen by copies from now on.
__device__ __forceinline__ void async_proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The map's box at (column, row) into this block's shared memory, whose barrier counts its bytes.
__device__ __forceinline__ void tile_copy(unsigned to, const CUtensorMap& map, int column, int row,
                                          unsigned barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ unsigned load_shared1(unsigned address) {
  unsigned v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

// Four 8 x 8 matrices of two bytes, each turned; lanes 8i .. 8i+7 say where the rows of the i-th
// go.
__device__ __forceinline__ void store_matrices_turned(unsigned to, unsigned a, unsigned b,
                                                      unsigned c, unsigned d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// Two of them: lanes 8i .. 8i+7 with i < 2 say where.
__device__ __forceinline__ void store_matrices_turned(unsigned to, unsigned a, unsigned b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(a),
               "r"(b)
               : "memory");
}

// Of 8 x 8 pairs of bytes, lane 4g+t having (g, 2t) and (g, 2t+1): those of (2t, g), (2t+1, g).
__device__ __forceinline__ unsigned turn_matrix(unsigned v) {
  unsigned turned;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(v));
  return turned;
}

// Both times the factor of their row, each times that of its token: bf16.
__device__ __forceinline__ unsigned scaled_pack(float low, float high, float row, float2 token) {
  return cuda::Bf16::round(low * row * token.x, high * row * token.y);
}
__device__ __forceinline__ unsigned scaled_pack(int low, int high, float row, float2 token) {
  return scaled_pack(__int2float_rn(low), __int2float_rn(high), row, token);
}

__device__ __forceinline__ float2 load_shared_floats(unsigned address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ void store_shared1(unsigned address, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(v) : "memory");
}

// A value that is kept, not worked out again where it is used (from a register of the thread that
// takes long to read).
__device__ __forceinline__ unsigned kept(unsigned v) {
  asm volatile("" : "+r"(v));
  return v;
}

// --- waiting
// ---------------------------------------------------------------------------------------

// At a barrier of any block of the cluster (cuda::cluster_address).
__device__ __forceinline__ void barrier_arrive_in_cluster(unsigned remote) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(remote) : "memory");
}

// Among the 128 threads of a warpgroup.
__device__ __forceinline__ void barrier_of_group(int name) {
  asm volatile("bar.sync %0, 128;" ::"r"(name) : "memory");
}

}  // namespace lacuna::kernels::linear_nm
