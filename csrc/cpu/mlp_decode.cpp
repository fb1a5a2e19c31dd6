// gated_mlp_decode: a whole MLP for a few tokens, in two passes over the weights.
//
// Decoding is bound by reading the weights, so each is read once: the first pass takes rows of gate
// and up together and leaves h in fp32, the second takes rows of down. Threads share out rows; an
// output is one thread's, so the bits do not depend on their number.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../ops.h"
#include "act.h"
#include "isa.h"

#if PRUNEKIT_X86_KERNELS
#include <immintrin.h>
#endif

namespace prunekit {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t MAX_TOKENS = 16;

struct Weights {
  const void* data;  // null where there is no such projection
  const void* bias;  // or null
  int64_t stride, length;
};

// y = down(act(gate(x))·up(x)); x_wide and h_wide hold fp32 in the order of a kernel's vectors.
struct Problem {
  const void* x;
  void* y;
  int64_t tokens, hidden, width;
  Weights gate, up, down;
  float *x_wide, *h_wide;
  int64_t x_stride, h_stride;
};

struct Kernels {
  void (*widen)(const Problem&);
  void (*hidden)(const Problem&, int64_t first);
  void (*output)(const Problem&, int64_t first);
  int64_t unit;  // neurons, or outputs, that one call computes
};

}  // namespace
}  // namespace prunekit

#define PRUNEKIT_KERNELS "mlp_decode.inl"
#include "foreach_isa.h"

namespace prunekit {
namespace {

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
  return {w.const_data_ptr(), bias ? bias->const_data_ptr() : nullptr, w.stride(0), length};
}

int64_t rounded_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

}  // namespace

Tensor gated_mlp_decode(
    const Tensor& x, const Tensor& gate, const std::optional<Tensor>& up, const Tensor& down,
    const std::optional<Tensor>& gate_bias, const std::optional<Tensor>& up_bias,
    const std::optional<Tensor>& down_bias, int64_t act) {
  check(x.is_cpu() && x.dim() == 2 && x.is_contiguous() && x.size(0) <= MAX_TOKENS,
        "gated_mlp_decode: x must be a contiguous [T, D] on the CPU with T up to ", MAX_TOKENS);
  check(0 <= act && act <= static_cast<int64_t>(Act::relu2),
        "gated_mlp_decode: unknown activation code ", act);
  const ScalarType dtype = x.scalar_type();
  const Kernels kernel = PRUNEKIT_BEST(kernels)(dtype, static_cast<Act>(act));
  check(kernel.hidden != nullptr, "gated_mlp_decode: dtype must be bf16, fp16 or fp32");
  const int64_t tokens = x.size(0), hidden = x.size(1), width = gate.size(0);

  Problem p{x.const_data_ptr(), nullptr, tokens, hidden, width, {}, {}, {}, nullptr, nullptr, 0, 0};
  p.gate = weights_of("gate", gate, gate_bias, width, hidden, dtype);
  if (up) p.up = weights_of("up", *up, up_bias, width, hidden, dtype);
  p.down = weights_of("down", down, down_bias, hidden, width, dtype);
  Tensor y = torch::stable::new_empty(x, {tokens, hidden});
  p.y = y.mutable_data_ptr();

  p.x_stride = rounded_up(hidden, kernel.unit);
  p.h_stride = rounded_up(width, kernel.unit);
  thread_local std::vector<float> scratch;  // kept: its pages are met at every layer and token
  scratch.resize(tokens * (p.x_stride + p.h_stride));
  p.x_wide = scratch.data();
  p.h_wide = p.x_wide + tokens * p.x_stride;
  kernel.widen(p);

  const auto over = [&](int64_t rows, void (*unit)(const Problem&, int64_t)) {
    const int64_t units = (rows + kernel.unit - 1) / kernel.unit;
    torch::stable::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u) unit(p, u * kernel.unit);
    });
  };
  over(width, kernel.hidden);
  over(hidden, kernel.output);
  return y;
}

}  // namespace prunekit
