#include "lacuna/kernels/decode/cpu_lanes.h"

namespace lacuna::kernels::decode {

constinit const Operations kAvx512 = operations("cpu_avx512");

}  // namespace lacuna::kernels::decode
