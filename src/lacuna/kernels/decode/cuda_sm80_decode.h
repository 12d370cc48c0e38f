#pragma once

#include <cuda_runtime_api.h>

#include "lacuna/kernels/decode/decode.h"

namespace lacuna::kernels::decode {

/// On an NVIDIA GPU; `queue` is a cudaStream_t, every pointer one into device memory, and what
/// they did is there when the stream has come so far.
/// @limits compute capability 8.0 or later; width of a normalized row at most 16,384
/// @errors those of the launches, which cudaGetLastError() gives
extern const Operations kCuda;

}  // namespace lacuna::kernels::decode
