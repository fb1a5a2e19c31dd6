#include "isa.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace prunekit {
namespace {

#if PRUNEKIT_X86_KERNELS
// Whether this process may use matrix tiles, for which Linux has to be asked.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long REQUEST_STATE = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, REQUEST_STATE, TILE_DATA) == 0;
#else
  return false;
#endif
}
#endif

Isa best_of_cpu() {
#if PRUNEKIT_X86_KERNELS
  // These lists hold what foreach_isa.h and mlp_decode.cpp let the compiler use.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  const bool amx = bf16 && __builtin_cpu_supports("amx-tile") &&
                   __builtin_cpu_supports("amx-bf16") && may_use_tiles();
  if (amx) return Isa::amx_bf16;
  return bf16 ? Isa::avx512_bf16 : avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::scalar;
#else
  return Isa::scalar;
#endif
}

Isa cap() {
  const char* value = std::getenv("PRUNEKIT_CPU_ISA");
  const std::string name = value ? value : "";
  if (name.empty() || name == "amx_bf16") return Isa::amx_bf16;
  if (name == "avx512_bf16") return Isa::avx512_bf16;
  if (name == "avx512") return Isa::avx512;
  if (name == "avx2") return Isa::avx2;
  if (name == "scalar") return Isa::scalar;
  throw std::invalid_argument("PRUNEKIT_CPU_ISA: got '" + name +
                              "'; expected amx_bf16, avx512_bf16, avx512, avx2 or scalar");
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = std::min(best_of_cpu(), cap());
  return isa;
}

bool cpu_is_amd() {
#if PRUNEKIT_X86_KERNELS
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

}  // namespace prunekit
