// What the studies of 8-bit codes share: codes as data, the number of each, cuBLASLt's products of
// them. One translation unit a program includes it.
#pragma once

#include <cuda_fp8.h>

#include "../cuda_harness.h"

// ---------- data ----------
__device__ inline float code_of(float v, bool fp8) {
  if (!fp8) return fminf(127.f, fmaxf(-127.f, rintf(v * 40.f)));
  const __nv_fp8_e4m3 c(v * 100.f);
  return float(c);
}
// Codes as bf16 numbers, of normal values; `sparse`: two random places of each group of four.
__global__ void gen_codes(bf16* w, size_t groups, unsigned long long seed, bool sparse, bool fp8) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < groups;
       i += (size_t)gridDim.x * blockDim.x) {
    const unsigned long long h = mix(i + seed * 0x1000003ull);
    const int pairs[6] = {0x10, 0x20, 0x30, 0x21, 0x31, 0x32};
    const int pair = pairs[h % 6];
    bf16 v[4];
    for (int j = 0; j < 4; ++j) {
      const bool kept = !sparse || j == (pair & 15) || j == pair >> 4;
      v[j] = __float2bfloat16(kept ? code_of(normal(mix(h ^ (0x1111 * (j + 1)))), fp8) : 0.f);
    }
    *reinterpret_cast<uint2*>(w + 4 * i) = *reinterpret_cast<uint2*>(v);
  }
}
// Row scales, bf16: around 2^-8, no two neighbours alike.
__host__ __device__ inline float scale_of(int row) {
  return ldexpf(1.f + (row * 37 % 128) / 128.f, -8 - row % 3);
}
__global__ void gen_scales(bf16* s, int n) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    s[i] = __float2bfloat16(scale_of(i));
}
// y[t][n] *= scale[n]
__global__ void scale_rows(double* y, int n, int t) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < (size_t)n * t;
       i += (size_t)gridDim.x * blockDim.x)
    y[i] *= scale_of(i % n);
}
template <class To>
__global__ void convert(const bf16* from, To* to, size_t n) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
       i += (size_t)gridDim.x * blockDim.x)
    to[i] = To(__bfloat162float(from[i]));
}

static float code_number(int byte, bool fp8) {
  if (!fp8) return (float)(signed char)byte;
  __nv_fp8_e4m3 c;
  c.__x = (__nv_fp8_storage_t)byte;
  return float(c);
}
// ---------- cuBLASLt ----------
// fp8: x in e4m3 too, bf16 out, one factor of 1 each. int8: x in int8, int32 out. Tokens are padded
// to 16: the least that fp8 takes. `reference` [t,n]: what the first copy must give.
static vector<Rival> lt_rivals(bool fp8, const vector<void*>& w, const void* x, void* y,
                               const float* reference, int n, int k, int tokens) {
  const int t = (tokens + 15) / 16 * 16, copies = (int)w.size();
  const cudaDataType in = fp8 ? CUDA_R_8F_E4M3 : CUDA_R_8I, out = fp8 ? CUDA_R_16BF : CUDA_R_32I;
  cublasLtMatmulDesc_t op;
  cublasLtMatrixLayout_t la, lb, lc;
  cublasLtMatmulPreference_t pref;
  const cublasOperation_t tr = CUBLAS_OP_T;
  CB(cublasLtMatmulDescCreate(&op, fp8 ? CUBLAS_COMPUTE_32F : CUBLAS_COMPUTE_32I,
                              fp8 ? CUDA_R_32F : CUDA_R_32I));
  CB(cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_TRANSA, &tr, sizeof tr));
  static float* one_device = nullptr;
  if (!one_device) {
    const float one = 1;
    CK(cudaMalloc(&one_device, 4));
    CK(cudaMemcpy(one_device, &one, 4, cudaMemcpyHostToDevice));
  }
  if (fp8) {
    const int8_t fast = 1;
    CB(cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_FAST_ACCUM, &fast, sizeof fast));
    for (auto a : {CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER})
      CB(cublasLtMatmulDescSetAttribute(op, a, &one_device, sizeof one_device));
  }
  CB(cublasLtMatrixLayoutCreate(&la, in, k, n, k));
  CB(cublasLtMatrixLayoutCreate(&lb, in, k, t, k));
  CB(cublasLtMatrixLayoutCreate(&lc, out, n, t, n));
  CB(cublasLtMatmulPreferenceCreate(&pref));
  CB(cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &kWs,
                                          sizeof kWs));
  cublasLtMatmulHeuristicResult_t h[24];
  int found = 0;
  cublasLtMatmulAlgoGetHeuristic(lt, op, la, lb, lc, lc, pref, 24, h, &found);
  const float onef = 1, zerof = 0;
  const int onei = 1, zeroi = 0;
  const void* one = fp8 ? (const void*)&onef : &onei;
  const void* zero = fp8 ? (const void*)&zerof : &zeroi;
  auto run = [&](int a, int i) {
    return cublasLtMatmul(lt, op, one, w[i], la, x, lb, zero, y, lc, y, lc, &h[a].algo, d_ws, kWs,
                          st) == CUBLAS_STATUS_SUCCESS
               ? cudaSuccess
               : cudaErrorUnknown;
  };
  auto right = [&] {  // within the rounding of bf16, and of fp8's fast sums
    const size_t count = (size_t)n * tokens;
    return (fp8 ? norm_error((const bf16*)y, reference, count)
                : norm_error((const int*)y, reference, count)) < 1e-2;
  };
  vector<Rival> rivals;
  vector<std::pair<double, int>> quick;
  const double guess = n * (double)k / 4e6 + 4;
  for (int a = 0; a < found; a++) {
    CK(cudaMemsetAsync(y, 0xff, (size_t)n * t * (fp8 ? 2 : 4), st));
    if (run(a, 0) != cudaSuccess || !right()) {
      cudaGetLastError();
      continue;
    }
    const Time q = time_graph([&](int i) { return run(a, i); }, copies, guess, 2, 500);
    if (q.us == q.us) quick.push_back({q.us, a});
  }
  std::sort(quick.begin(), quick.end());
  for (size_t i = 0; i < quick.size() && i < 2; i++)
    rivals.push_back(
        {(fp8 ? "LtFp8." : "LtInt8.") + std::to_string(quick[i].second),
         capture([&](int c) { return run(quick[i].second, c); }, copies, guess, 3000)});
  cublasLtMatmulPreferenceDestroy(pref);
  cublasLtMatrixLayoutDestroy(la);
  cublasLtMatrixLayoutDestroy(lb);
  cublasLtMatrixLayoutDestroy(lc);
  cublasLtMatmulDescDestroy(op);
  return rivals;
}
