// What the decode kernels of every instruction set share; see mlp_decode.cpp for the whole.
#pragma once

#include <cstdint>

#include "act.h"

namespace prunekit::decode {

constexpr int64_t MAX_TOKENS = 16;

struct Weights {
  const void* data;  // null where there is no such projection
  const void* bias;  // or null
  int64_t stride, rows, length;
};

// y = down(act(gate(x))·up(x)). The scratch holds x and h as a kernel's products want them, and
// the sums of gate, up and down in fp32, one row of width_stride or hidden_stride a token.
struct Problem {
  const void* x;
  void* y;
  int64_t tokens, hidden, width;
  Weights gate, up, down;
  float *x_held, *h_held, *gate_sums, *up_sums, *down_sums;
  int64_t hidden_stride, width_stride;
};

// The units of a pass are `unit` neurons, or outputs; threads share them out in runs.
struct Kernels {
  void (*hold_x)(const Problem&);
  void (*hidden)(const Problem&, int64_t begin, int64_t end);
  void (*output)(const Problem&, int64_t begin, int64_t end);
  int64_t unit;
  int64_t room;  // tokens that the scratch has room for, at the least
};

}  // namespace prunekit::decode
