// Entries of the library's table for a kernel whose layout is a struct of its own, which has
// packed_bytes, around the functions that take that struct.
#pragma once

#include <cuda_runtime_api.h>

#include "lacuna/kernels/gpu_abi.h"

namespace lacuna::kernels::cuda {

template <class Layout>
struct OwnLayout {
  /// @param kMeasure  (dense, n, k, scratch, Layout*, stream) -> cudaError_t
  template <auto kMeasure>
  static int measure(const void* dense, int64_t n, int64_t k, void* scratch, GpuLayout* layout,
                     GpuStream stream) {
    Layout own;
    const cudaError_t error =
        kMeasure(dense, n, k, scratch, &own, static_cast<cudaStream_t>(stream));
    layout->packed_bytes = own.packed_bytes;
    hold(layout, own);
    return error;
  }
  /// @param kPack  (dense, scratch, Layout, packed, stream) -> cudaError_t
  template <auto kPack>
  static int pack(const GpuLayout* layout, const void* dense, const void* scratch, void* packed,
                  GpuPackReport*, GpuStream stream) {
    return kPack(dense, scratch, held<Layout>(layout), packed, static_cast<cudaStream_t>(stream));
  }
  /// @param kUnpack  (packed, Layout, dense, stream) -> cudaError_t
  template <auto kUnpack>
  static int unpack(const GpuLayout* layout, const void* packed, void* dense, GpuStream stream) {
    return kUnpack(packed, held<Layout>(layout), dense, static_cast<cudaStream_t>(stream));
  }
};

}  // namespace lacuna::kernels::cuda
