#include "isa.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace prunekit {
namespace {

Isa best_of_cpu() {
#if PRUNEKIT_X86_KERNELS
  // These lists hold what foreach_isa.h and mlp_decode.cpp let the compiler use.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  return bf16 ? Isa::avx512_bf16 : avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::scalar;
#else
  return Isa::scalar;
#endif
}

Isa cap() {
  const char* value = std::getenv("PRUNEKIT_CPU_ISA");
  const std::string name = value ? value : "";
  if (name.empty() || name == "avx512_bf16") return Isa::avx512_bf16;
  if (name == "avx512") return Isa::avx512;
  if (name == "avx2") return Isa::avx2;
  if (name == "scalar") return Isa::scalar;
  throw std::invalid_argument("PRUNEKIT_CPU_ISA: got '" + name +
                              "'; expected avx512_bf16, avx512, avx2 or scalar");
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = std::min(best_of_cpu(), cap());
  return isa;
}

}  // namespace prunekit
