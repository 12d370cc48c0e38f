// What this process takes of the machine's memory.
#pragma once

#include <cstddef>

namespace lacuna {

/// Most memory that this process has held at a time.
size_t peak_memory_bytes();
/// Memory of the machine.
size_t physical_memory_bytes();

}  // namespace lacuna
