// What stands around a dense product of 8-bit codes, which a library computes: x as codes ahead of
// it, and scales behind one of int8, whose sums are whole numbers. GpuRounding and GpuScaling say
// what the functions do.
#pragma once

#include <cuda_runtime_api.h>

#include "lacuna/kernels/gpu_abi.h"

namespace lacuna::kernels::code_product {

// Rounds as cuda/sm90_round_tokens.cuh says.
// @cost x twice (the second time mostly from L2), codes once
// @errors cudaErrorInvalidValue: a shape or an alignment that isn't as asked for
cudaError_t round_tokens(const GpuRounding& rounding, cudaStream_t stream);

// Both factors in float32, then one rounding.
// @cost sums and y once
// @errors cudaErrorInvalidValue: a shape or an alignment that isn't as asked for
cudaError_t scale_sums(const GpuScaling& scaling, cudaStream_t stream);

}  // namespace lacuna::kernels::code_product
