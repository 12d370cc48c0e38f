#include "lacuna/core/cpu.h"

#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lacuna {
namespace {

#if defined(__x86_64__)
/// Tiles are 8 KiB of state a thread, which Linux keeps only for processes that asked for it.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace

std::vector<std::string> CpuFeatures::list() const {
  std::vector<std::string> names;
  const auto add = [&](bool present, const char* feature) {
    if (present) names.emplace_back(feature);
  };
  add(avx2, "avx2"), add(fma, "fma"), add(f16c, "f16c"), add(avx512, "avx512");
  add(avx512_vbmi2, "avx512_vbmi2"), add(avx512_bf16, "avx512_bf16"),
      add(avx512_vnni, "avx512_vnni"), add(avx_vnni, "avx_vnni"), add(gfni, "gfni"),
      add(amx_bf16, "amx_bf16"), add(amx_int8, "amx_int8");
  return names;
}

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = [] {
    CpuFeatures f;
#if defined(__x86_64__)
    __builtin_cpu_init();
    f.avx2 = __builtin_cpu_supports("avx2");
    f.fma = __builtin_cpu_supports("fma");
    f.avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    f.avx512_vbmi2 = f.avx512 && __builtin_cpu_supports("avx512vbmi2");
    f.avx512_vnni = f.avx512 && __builtin_cpu_supports("avx512vnni");
    f.avx512_bf16 = f.avx512 && __builtin_cpu_supports("avx512bf16");
    f.gfni = f.avx2 && __builtin_cpu_supports("gfni");
    unsigned a, b, c, d;
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) f.avx_vnni = f.avx2 && (a >> 4 & 1);
    if (__get_cpuid(1, &a, &b, &c, &d)) f.f16c = f.avx2 && (c & bit_F16C);
    constexpr unsigned kAmxBF16 = 1u << 22, kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;  // of leaf 7
    if (f.avx512 && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAmxTile) && may_use_tiles()) {
      f.amx_bf16 = d & kAmxBF16;
      f.amx_int8 = d & kAmxInt8;
    }
    char brand[49] = {};
    for (unsigned leaf = 0; leaf < 3; ++leaf) {
      if (!__get_cpuid(0x80000002u + leaf, &a, &b, &c, &d)) break;
      const unsigned words[4] = {a, b, c, d};
      std::memcpy(brand + 16 * leaf, words, 16);
    }
    f.name = brand;
    while (!f.name.empty() && f.name.back() == ' ') f.name.pop_back();
#endif
    if (f.name.empty()) f.name = "unknown";
    return f;
  }();
  return features;
}

}  // namespace lacuna
