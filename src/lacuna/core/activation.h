// The functions between the two halves of a feed-forward block.
#pragma once

#include <cstdint>

namespace lacuna {

enum class Activation : uint8_t { kSilu, kGelu, kGeluTanh, kRelu, kRelu2 };  // relu2: relu(x)^2

}  // namespace lacuna
