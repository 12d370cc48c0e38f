#include "lacuna/kernels/decode/cpu_lanes.h"

namespace lacuna::kernels::decode {

constinit const Operations kAvx2 = operations("cpu_avx2");

}  // namespace lacuna::kernels::decode
