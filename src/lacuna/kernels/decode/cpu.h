#pragma once

#include "lacuna/kernels/decode/decode.h"

namespace lacuna::kernels::decode {

extern const Operations kAvx512, kAvx2, kPortable;

}  // namespace lacuna::kernels::decode
