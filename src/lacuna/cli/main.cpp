#include <unistd.h>

#include <cstdlib>

#include "lacuna/cli/run.h"

namespace {

/// Threads of torch's OpenMP pool spin while they wait, unless the environment says otherwise when
/// the library is loaded, which is before main(). On cores that others use too, spinning made an
/// evaluation three times slower; on idle ones waiting passively costs nothing that was measured.
void wait_passively(char** argv) {
  if (std::getenv("OMP_WAIT_POLICY") != nullptr || std::getenv("GOMP_SPINCOUNT") != nullptr) return;
  setenv("OMP_WAIT_POLICY", "passive", 1);
  execv("/proc/self/exe", argv);  // comes back only when it failed: then they spin
}

}  // namespace

int main(int argc, char** argv) {
  wait_passively(argv);
  return lacuna::cli::run(argc, argv);
}
