// Names of the two floats of 16 bits, for headers that hosts read (halves.cuh has what they do).
#pragma once

namespace lacuna::kernels::cuda {

struct Bf16;
struct Fp16;

}  // namespace lacuna::kernels::cuda
