// CUTLASS's sparse GEMM for Hopper as a rival: a few cuts of it, behind plain functions (its
// headers take a minute to compile).
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

// The tile scheduler's order: tiles walked along W's rows or along the tokens, in bands.
struct CutlassOrder {
  int band = 1;    // as CUTLASS rounds it: 1, 2, 4, 8
  char along = 0;  // 'm': W's rows, 'n': tokens, 0: CUTLASS's choice
};
struct CutlassRival {
  const char* name;
  size_t (*values_bytes)(int n, int k);
  size_t (*metadata_bytes)(int n, int k);
  /// W dense [N,K] into its two parts, by CUTLASS's own compressor. One kind's cuts share them.
  bool (*compress)(void* dense, int n, int k, void* values, void* metadata, cudaStream_t stream);
  /// y[T,N] = scale * x[T,K] W^T, in bf16 (where the name says so int32). Scratch: 16 MB.
  bool (*run)(const void* values, const void* metadata, const void* x, void* y, int n, int k, int t,
              float scale, CutlassOrder order, void* scratch, cudaStream_t stream);
};
struct CutlassCuts {
  const CutlassRival* first;
  int count;
};
CutlassCuts cutlass_bf16();
CutlassCuts cutlass_fp8();       // sums in registers of their own every few steps
CutlassCuts cutlass_fp8_fast();  // sums as the tensor cores keep them
CutlassCuts cutlass_int8();
