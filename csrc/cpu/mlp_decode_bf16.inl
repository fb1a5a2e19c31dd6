// Decoding bf16 by the CPU's own products of bf16 pairs: x as it came, h rounded as torch rounds it.
#include "mlp_decode_passes.inl"

struct Bf16Pairs {
  using E = Bf16;
  using Held = uint16_t;

  INLINE void hold(const uint16_t* from, int64_t count, uint16_t* to) {
    std::memcpy(to, from, count * sizeof(*to));
    std::fill_n(to + count, (UNIT - count % UNIT) % UNIT, uint16_t{0});
  }
  INLINE void hold_h(uint16_t* to, Pair<Float> h) { Bf16::store_rounded(to, h); }
  template <int64_t tokens>
  INLINE void add(Float (&sums)[tokens][2], const uint16_t* w, const uint16_t* x,
                  int64_t x_stride) {
    const auto weights = load_vector<__m512bh>(w);
#pragma GCC unroll 4
    for (int64_t t = 0; t < tokens; ++t)
      sums[t][0] = _mm512_dpbf16_ps(sums[t][0], weights, load_vector<__m512bh>(x + t * x_stride));
  }
};

static Kernels kernels(Act act, int64_t tokens) { return kernels_of<Bf16Pairs>(act, tokens); }

#undef INLINE
