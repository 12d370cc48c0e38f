#include "lacuna/core/memory.h"

#include <sys/resource.h>

namespace lacuna {

size_t peak_memory_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<size_t>(usage.ru_maxrss) * 1024;
}

}  // namespace lacuna
