#include "lacuna/kernels/decode/cpu.h"

namespace lacuna::kernels::decode {

std::vector<const Operations*> cpu_operations(const CpuFeatures& cpu) {
  std::vector<const Operations*> all;
#if defined(__x86_64__)
  // The flags of the files *_avx512.cc allow the compiler all of these.
  if (cpu.avx512 && cpu.avx512_vbmi2 && cpu.avx512_vnni && cpu.avx512_bf16) all.push_back(&kAvx512);
  if (cpu.avx2 && cpu.fma && cpu.f16c) all.push_back(&kAvx2);
#endif
  all.push_back(&kPortable);
  return all;
}

}  // namespace lacuna::kernels::decode
