// Decoding in fp32 vectors, for one instruction set: weights are widened as they are read, x and h
// are held in fp32 in the order of pairs.
#include "mlp_decode_passes.inl"

template <typename Element_>
struct Widened {
  using E = Element_;
  using Element = typename E::Element;
  using Held = float;

  INLINE void hold(const Element* from, int64_t count, float* to) {
    int64_t k = 0;
    for (; k + UNIT <= count; k += UNIT) hold_h(to + k, E::load(from + k));
    if (k < count) hold_h(to + k, E::load(PartOf<Element>::read(from + k, count - k).columns));
  }
  INLINE void hold_h(float* to, Pair<Float> h) {
    store_vector(to, h.first);
    store_vector(to + LANES, h.second);
  }
  template <int64_t tokens>
  INLINE void add(Float (&sums)[tokens][2], const Element* w, const float* x, int64_t x_stride) {
    const Pair<Float> weights = E::load(w);
#pragma GCC unroll 4
    for (int64_t t = 0; t < tokens; ++t) {
      sums[t][0] += weights.first * load_vector<Float>(x + t * x_stride);
      // A second sum keeps the additions of a lone token from waiting for each other.
      sums[t][tokens == 1] += weights.second * load_vector<Float>(x + t * x_stride + LANES);
    }
  }
};

static Kernels kernels(ScalarType dtype, Act act, int64_t tokens) {
  switch (dtype) {
    case ScalarType::BFloat16: return kernels_of<Widened<Bf16>>(act, tokens);
    case ScalarType::Half: return kernels_of<Widened<Fp16>>(act, tokens);
    case ScalarType::Float: return kernels_of<Widened<Fp32>>(act, tokens);
    default: return {};
  }
}

#undef INLINE
