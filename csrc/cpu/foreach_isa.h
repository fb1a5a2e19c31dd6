// Compiles PRUNEKIT_KERNELS, the name of an .inl file, once for each instruction set, in a
// namespace of its own: one source serves them all, and no code for one leaks into another. The
// .inl includes no headers: they come before this file, outside of the target pragmas.
// No #pragma once: each .cpp includes this with its own PRUNEKIT_KERNELS.
#include "isa.h"

namespace prunekit::scalar {
#define PRUNEKIT_VECTOR_BYTES 16
#include PRUNEKIT_KERNELS
#undef PRUNEKIT_VECTOR_BYTES
}  // namespace prunekit::scalar

#if PRUNEKIT_X86_KERNELS

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace prunekit::avx2 {
#define PRUNEKIT_VECTOR_BYTES 32
#include PRUNEKIT_KERNELS
#undef PRUNEKIT_VECTOR_BYTES
}  // namespace prunekit::avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2")
namespace prunekit::avx512 {
#define PRUNEKIT_VECTOR_BYTES 64
#include PRUNEKIT_KERNELS
#undef PRUNEKIT_VECTOR_BYTES
}  // namespace prunekit::avx512
#pragma GCC pop_options

#define PRUNEKIT_BEST(function)                                   \
  (::prunekit::cpu_isa() >= ::prunekit::Isa::avx512 ? avx512::function \
   : ::prunekit::cpu_isa() == ::prunekit::Isa::avx2 ? avx2::function   \
                                                    : scalar::function)

#else

#define PRUNEKIT_BEST(function) (scalar::function)

#endif
