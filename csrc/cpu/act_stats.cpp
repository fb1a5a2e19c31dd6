// gated_act_stats: h = act(gate)·up and the per-neuron sums of h, in one pass.
//
// Threads share out tiles of columns, so that a neuron's sums are one thread's and need no second
// stage. A thread walks its tiles in panels: chunks of rows, and in a chunk a pair of vectors at a
// time down the rows with its sums in registers. The chunks' sums are added in fp64.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <type_traits>

#include "../ops.h"
#include "act.h"
#include "isa.h"

#if PRUNEKIT_X86_KERNELS
#include <immintrin.h>
#endif

namespace prunekit {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t TILE = 64;     // columns: whole cache lines and pairs of vectors for every dtype
constexpr int64_t PANEL = 1024;  // columns: each page of the rows is met only a few times

struct Problem {
  const void* gate;
  const void* up;  // null for a plain MLP
  void* h;
  int64_t tokens, width, gate_stride, up_stride;
  const int64_t* spans;
  int64_t prompts;
  float* prompt_stats;
  float* token_stats;
};

using PanelKernel = void (*)(const Problem&, int64_t begin, int64_t width);

}  // namespace
}  // namespace prunekit

#define PRUNEKIT_KERNELS "act_stats.inl"
#include "foreach_isa.h"

namespace prunekit {
namespace {

void check_matrix(const char* name, const Tensor& x) {
  check(x.dim() == 2, "gated_act_stats: ", name, " must be a matrix [T, F], got ", x.dim(),
        " dimensions");
  check(x.stride(1) == 1 || x.size(1) <= 1, "gated_act_stats: ", name,
        " must have unit stride along F, got ", x.stride(1), "; call .contiguous()");
}

void check_inputs(const Tensor& gate, const std::optional<Tensor>& up, const Tensor& spans) {
  check_matrix("gate", gate);
  if (up) {
    check_matrix("up", *up);
    check(up->size(0) == gate.size(0) && up->size(1) == gate.size(1) &&
              up->scalar_type() == gate.scalar_type() && up->is_cpu(),
          "gated_act_stats: up must match gate in shape, dtype and device");
  }
  check(spans.is_cpu() && spans.dim() == 2 && spans.size(1) == 2 &&
            spans.scalar_type() == ScalarType::Long,
        "gated_act_stats: spans must be [P, 2] int64 on the CPU");
}

// A large [T, F] that begins well away from where gate and up do in their pages. Large tensors all
// tend to begin at one place of a page, and then loads of gate wait for a store of h some rows
// before, which has the same last 12 bits of address: a fifth of the whole time.
Tensor output_beside(const Tensor& gate, const std::optional<Tensor>& up) {
  constexpr int64_t PAGE = 4096, LINE = 64, LARGE = 1 << 20;
  constexpr int64_t APART = 4;  // lines: more than a row's step reads or writes of one matrix
  const int64_t tokens = gate.size(0), width = gate.size(1), size = gate.element_size();
  if (tokens * width * size < LARGE) return torch::stable::new_empty(gate, {tokens, width});
  Tensor whole = torch::stable::new_empty(gate, {tokens * width + 4 * APART * LINE / size});
  const auto place = [](const Tensor& x) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(x.const_data_ptr()) % PAGE / LINE);
  };
  int64_t lines = 0;
  const auto clashes = [&](const Tensor& x) {
    constexpr int64_t LINES = PAGE / LINE;
    const int64_t behind = (place(whole) + lines + LINES - place(x)) % LINES;
    return behind < APART || behind > LINES - APART;
  };
  while (clashes(gate) || (up && clashes(*up))) ++lines;  // under 4·APART times
  const Tensor part = torch::stable::narrow(whole, 0, lines * LINE / size, tokens * width);
  return torch::stable::view(part, {tokens, width});
}

void check_spans(const int64_t* spans, int64_t prompts, int64_t tokens) {
  int64_t done = 0;
  for (int64_t p = 0; p < prompts; ++p) {
    const int64_t start = spans[2 * p], end = spans[2 * p + 1];
    check(done <= start && start <= end && end <= tokens,
          "gated_act_stats: spans must ascend without overlap within [0, ", tokens, "], got [",
          start, ", ", end, "] at position ", p);
    done = end;
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> gated_act_stats(
    const Tensor& gate, const std::optional<Tensor>& up, const Tensor& spans, int64_t act) {
  check_inputs(gate, up, spans);
  check(0 <= act && act <= static_cast<int64_t>(Act::relu2),
        "gated_act_stats: unknown activation code ", act);
  const int64_t tokens = gate.size(0), width = gate.size(1), prompts = spans.size(0);
  const Tensor ordered = torch::stable::contiguous(spans);
  const int64_t* rows = ordered.const_data_ptr<int64_t>();
  check_spans(rows, prompts, tokens);

  const PanelKernel kernel =
      PRUNEKIT_BEST(panel_kernel)(gate.scalar_type(), static_cast<Act>(act), up.has_value());
  check(kernel != nullptr, "gated_act_stats: dtype must be bf16, fp16, fp32 or fp64");

  Tensor h = output_beside(gate, up);
  Tensor prompt_stats = torch::stable::new_empty(gate, {2, prompts, width}, ScalarType::Float);
  Tensor token_stats = torch::stable::new_empty(gate, {3, width}, ScalarType::Float);
  const Problem problem{
      gate.const_data_ptr(), up ? up->const_data_ptr() : nullptr, h.mutable_data_ptr(),
      tokens, width, gate.stride(0), up ? up->stride(0) : 0, rows, prompts,
      prompt_stats.mutable_data_ptr<float>(), token_stats.mutable_data_ptr<float>()};

  const int64_t tiles = (width + TILE - 1) / TILE;
  const int64_t worth_a_thread = 1 + 32768 / ((tokens + 1) * TILE);
  torch::stable::parallel_for(0, tiles, worth_a_thread, [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(end * TILE, width), whole = last / TILE * TILE;
    for (int64_t column = begin * TILE; column < whole; column += PANEL)
      kernel(problem, column, std::min(PANEL, whole - column));
    if (whole < last) kernel(problem, whole, last - whole);
  });
  return {h, prompt_stats, token_stats};
}

}  // namespace prunekit
