// CUTLASS's sparse GEMM for Hopper as a rival: a few cuts of it, behind plain functions (its
// headers take a minute to compile).
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

struct CutlassRival {
  const char* name;
  size_t (*values_bytes)(int n, int k);
  size_t (*metadata_bytes)(int n, int k);
  /// W dense bf16 [N,K] into its two parts, by CUTLASS's own compressor.
  bool (*compress)(void* dense, int n, int k, void* values, void* metadata, cudaStream_t stream);
  /// y[T,N] = x[T,K] W^T, bf16. Scratch: 16 MB.
  bool (*run)(const void* values, const void* metadata, const void* x, void* y, int n, int k, int t,
              void* scratch, cudaStream_t stream);
};
extern const CutlassRival kCutlass[];
extern const int kCutlassCount;
