// gated_mlp_decode: a whole MLP for a few tokens, in two passes over the weights.
//
// Decoding is bound by reading the weights, so each is read once: the first pass takes rows of gate
// and up together and leaves h, the second takes rows of down. Threads share out rows; an output is
// one thread's, so the bits do not depend on their number.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../ops.h"
#include "isa.h"
#include "mlp_decode.h"

#if PRUNEKIT_X86_KERNELS
#include <immintrin.h>
#endif

using torch::headeronly::ScalarType;

#define PRUNEKIT_KERNELS "mlp_decode.inl"
#include "foreach_isa.h"

#if PRUNEKIT_X86_KERNELS
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx512bf16")
namespace prunekit::avx512_bf16 {
#define PRUNEKIT_VECTOR_BYTES 64
#include "mlp_decode_bf16.inl"
#undef PRUNEKIT_VECTOR_BYTES
}  // namespace prunekit::avx512_bf16
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx512bf16")
#pragma GCC target("amx-tile,amx-bf16")
namespace prunekit::amx_bf16 {
#define PRUNEKIT_VECTOR_BYTES 64
#include "mlp_decode_amx.inl"
#undef PRUNEKIT_VECTOR_BYTES
}  // namespace prunekit::amx_bf16
#pragma GCC pop_options
#endif

namespace prunekit {
namespace {

using namespace decode;

constexpr int64_t LEAST_TOKENS_ON_TILES = 5;  // fewer are faster by vectors: bench/decode.py

Kernels kernels_for(ScalarType dtype, Act act, int64_t tokens) {
#if PRUNEKIT_X86_KERNELS
  if (dtype == ScalarType::BFloat16 && tokens >= LEAST_TOKENS_ON_TILES &&
      cpu_isa() >= Isa::amx_bf16)
    return amx_bf16::kernels(act);
  if (dtype == ScalarType::BFloat16 && cpu_isa() >= Isa::avx512_bf16)
    return avx512_bf16::kernels(act, tokens);
#endif
  return PRUNEKIT_BEST(kernels)(dtype, act, tokens);
}

Weights weights_of(const char* name, const Tensor& w, const std::optional<Tensor>& bias,
                   int64_t rows, int64_t length, ScalarType dtype) {
  check(w.is_cpu() && w.scalar_type() == dtype && w.dim() == 2 && w.size(0) == rows &&
            w.size(1) == length && (w.stride(1) == 1 || length <= 1),
        "gated_mlp_decode: ", name, " must be [", rows, ", ", length,
        "] of x's dtype on the CPU, with unit stride along its rows");
  if (bias)
    check(bias->is_cpu() && bias->scalar_type() == dtype && bias->dim() == 1 &&
              bias->size(0) == rows && bias->is_contiguous(),
          "gated_mlp_decode: the bias of ", name, " must be a contiguous [", rows,
          "] of x's dtype on the CPU");
  return {w.const_data_ptr(), bias ? bias->const_data_ptr() : nullptr, w.stride(0), rows, length};
}

int64_t rounded_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

}  // namespace

Tensor gated_mlp_decode(
    const Tensor& x, const Tensor& gate, const std::optional<Tensor>& up, const Tensor& down,
    const std::optional<Tensor>& gate_bias, const std::optional<Tensor>& up_bias,
    const std::optional<Tensor>& down_bias, int64_t act) {
  check(x.is_cpu() && x.dim() > 0 && x.is_contiguous() &&
            x.numel() <= MAX_TOKENS * x.size(-1),
        "gated_mlp_decode: x must be a contiguous [..., D] on the CPU, of up to ", MAX_TOKENS,
        " tokens");
  check(0 <= act && act <= static_cast<int64_t>(Act::relu2),
        "gated_mlp_decode: unknown activation code ", act);
  const ScalarType dtype = x.scalar_type();
  const int64_t hidden = x.size(-1), width = gate.size(0);
  const int64_t tokens = hidden ? x.numel() / hidden : 0;
  const Kernels kernel = kernels_for(dtype, static_cast<Act>(act), tokens);
  check(kernel.hidden != nullptr, "gated_mlp_decode: dtype must be bf16, fp16 or fp32");

  Problem p{};
  p.x = x.const_data_ptr();
  p.tokens = tokens;
  p.hidden = hidden;
  p.width = width;
  p.gate = weights_of("gate", gate, gate_bias, width, hidden, dtype);
  if (up) p.up = weights_of("up", *up, up_bias, width, hidden, dtype);
  p.down = weights_of("down", down, down_bias, hidden, width, dtype);
  Tensor y = torch::stable::empty_like(x);
  p.y = y.mutable_data_ptr();

  p.hidden_stride = rounded_up(hidden, kernel.unit);
  p.width_stride = rounded_up(width, kernel.unit);
  const int64_t room = std::max(tokens, kernel.room);
  const int64_t of_hidden = room * p.hidden_stride, of_width = room * p.width_stride;
  thread_local std::vector<float> scratch;  // kept: its pages are met at every layer and token
  scratch.resize(2 * of_hidden + 3 * of_width);
  p.x_held = scratch.data();
  p.down_sums = p.x_held + of_hidden;
  p.h_held = p.down_sums + of_hidden;
  p.gate_sums = p.h_held + of_width;
  p.up_sums = p.gate_sums + of_width;
  kernel.hold_x(p);

  const auto over = [&](int64_t rows, void (*pass)(const Problem&, int64_t, int64_t)) {
    torch::stable::parallel_for(
        0, (rows + kernel.unit - 1) / kernel.unit, 1,
        [&](int64_t begin, int64_t end) { pass(p, begin, end); });
  };
  over(width, kernel.hidden);
  over(hidden, kernel.output);
  return y;
}

}  // namespace prunekit
