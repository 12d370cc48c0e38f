// W 2:4 sparse in bf16 or f16 as mma.sp and wgmma.sp read it: the units that the kernels of this
// folder multiply.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "lacuna/kernels/gpu_abi.h"

namespace lacuna::kernels::linear_nm {

// A unit: 16 rows x 128 columns, its metadata first.
inline constexpr int kMmaSpMetadataBytes = 256;
inline constexpr int kMmaSpSteps = 4;        // of 32 columns
inline constexpr int kMmaSpStepBytes = 512;  // of values
inline constexpr int kMmaSpUnitBytes =
    kMmaSpMetadataBytes + kMmaSpSteps * kMmaSpStepBytes;  // 2,304

// What packing found: groups of four with more than two non-zeros, whose two lowest columns were
// kept. Set by `mma_sp_pack`; read it after the stream is done.
using PackReport = GpuPackReport;

// Bytes of packed weights: 9 bits a weight, rows padded to a multiple of 16.
std::size_t mma_sp_packed_bytes(std::int64_t n, std::int64_t k);

// Packs W (bf16 or f16, row-major, zeros already in place) for `mma_sp_run`. -0.0 counts as zero; a
// group with fewer than two non-zeros is filled up with zeros; NaN and Inf are kept as they are.
// @shape dense [N,K], packed mma_sp_packed_bytes(N, K)
// @errors more than two non-zeros in a group: counted in *report (device memory, may be null)
cudaError_t mma_sp_pack(const void* dense, std::int64_t n, std::int64_t k, void* packed,
                        PackReport* report, cudaStream_t stream);

// W again, from its packed form: every weight that was not a zero, bit by bit, and +0.
// @shape packed mma_sp_packed_bytes(N, K), dense [N,K], aligned to 8 bytes
// @cost 1.125 N K bytes read, 2 N K written
cudaError_t mma_sp_unpack(const void* packed, std::int64_t n, std::int64_t k, void* dense,
                          cudaStream_t stream);

// What the library's layout of such a weight holds, and the table's functions around it.
struct MmaSpShape {
  std::int64_t n, k;
};
int mma_sp_layout_measure(const void* dense, std::int64_t n, std::int64_t k, void* scratch,
                          GpuLayout* layout, GpuStream stream);
int mma_sp_layout_pack(const GpuLayout* layout, const void* dense, const void* scratch,
                       void* packed, GpuPackReport* report, GpuStream stream);
int mma_sp_layout_unpack(const GpuLayout* layout, const void* packed, void* dense,
                         GpuStream stream);

}  // namespace lacuna::kernels::linear_nm
