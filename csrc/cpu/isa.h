// The instruction set that the kernels use: the CPU's best, capped by PRUNEKIT_CPU_ISA.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PRUNEKIT_X86_KERNELS 1
#else
#define PRUNEKIT_X86_KERNELS 0
#endif

namespace prunekit {

// The values are what prunekit::cpu_isa returns; prunekit/ops/isa.py names them in this order.
enum class Isa { scalar, avx2, avx512, avx512_bf16, amx_bf16 };

Isa cpu_isa();

bool cpu_is_amd();

}  // namespace prunekit
