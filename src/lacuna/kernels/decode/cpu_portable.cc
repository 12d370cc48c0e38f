#include "lacuna/kernels/decode/cpu_lanes.h"

namespace lacuna::kernels::decode {

constinit const Operations kPortable = operations("cpu_portable");

}  // namespace lacuna::kernels::decode
