// What this CPU can do, asked once.
#pragma once

#include <string>
#include <vector>

namespace lacuna {

struct CpuFeatures {
  std::string name;  ///< the processor's own brand string
  bool avx2 = false, fma = false, f16c = false;
  bool avx512 = false;  ///< F, BW, VL and DQ together
  bool avx512_vbmi2 = false, avx512_bf16 = false, avx512_vnni = false;
  bool avx_vnni = false;  ///< vpdpbusd in 256 bits, without AVX-512
  bool gfni = false;
  bool amx_bf16 = false;  ///< and its tiles; the system has permitted them to this process
  bool amx_int8 = false;  ///< likewise
  std::vector<std::string> list() const;
};

/// The running CPU's features (only what the operating system also enables).
const CpuFeatures& cpu_features();

}  // namespace lacuna
