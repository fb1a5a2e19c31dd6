// The activations of prunekit/ops/activations.py, elementwise on vectors, after simd.inl.
// fp32 vectors use polynomials; fp64 ones call the C library lane by lane, being for checks alone.

// exp(x) within 1 ulp: 2^n·e^r with |r| <= ln(2)/2.
INLINE Float exp(Float x) {
  x = clamp(x, 128);
  const Float shift = splat<Float>(0x1.8p23f);  // leaves no bits for a fraction
  const Float n = (x * 0x1.715476p+0f + shift) - shift;
  const Float r = x - n * 0x1.62e400p-1f - n * 0x1.7f7d1cp-20f;
  Float p = r * 0x1.694000p-10f + 0x1.125edcp-7f;
  p = p * r + 0x1.555b5ap-5f;
  p = p * r + 0x1.555450p-3f;
  p = p * r + 0x1.fffff6p-2f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return scale(p, n);
}

// erf(x) within 1 ulp: an odd polynomial near 0, 1 - e^p(|x|) further out.
INLINE Float erf(Float x) {
  const Float t = magnitude(x), s = x * x;
  Float far = t * -0x1.220000p-16f + 0x1.91cfb2p-12f;
  far = far * s + (t * -0x1.fd1438p-9f + 0x1.8d6342p-6f);
  far = far * t - 0x1.b55cb8p-4f;
  far = far * t - 0x1.450aa0p-1f;
  far = far * t - 0x1.079d0cp-3f;
  far = 1.0f - exp(far * t - t);
  Float near = s * -0x1.38e000p-11f + 0x1.471a58p-8f;
  near = near * s - 0x1.b691b2p-6f;
  near = near * s + 0x1.ce1c44p-4f;
  near = near * s - 0x1.812700p-2f;
  near = near * s + 0x1.06eba8p-3f;
  near = near * x + x;
  const Int sign = bits<Int>(x) & INT32_MIN;
  return t > 0x1.db0000p-1f ? bits<Float>(bits<Int>(far) | sign) : near;
}

INLINE Double exp(Double x) {
  for (size_t i = 0; i < sizeof(x) / sizeof(x[0]); ++i) x[i] = std::exp(x[i]);
  return x;
}

INLINE Double erf(Double x) {
  for (size_t i = 0; i < sizeof(x) / sizeof(x[0]); ++i) x[i] = std::erf(x[i]);
  return x;
}

template <Act act, typename V>
INLINE V activate(V x) {
  using Real = std::remove_reference_t<decltype(x[0])>;
  if constexpr (act == Act::silu) {
    return x / (1 + exp(-x));
  } else if constexpr (act == Act::gelu) {
    return x * Real(0.5) * (1 + erf(x * Real(M_SQRT1_2)));
  } else if constexpr (act == Act::gelu_tanh) {
    // (1 + tanh(u)) / 2 is the sigmoid of 2u: one exponential, and no cancellation.
    const V u = x * Real(M_2_SQRTPI * M_SQRT1_2) * (1 + Real(0.044715) * x * x);
    return x / (1 + exp(-2 * u));
  } else {
    const V positive = x < 0 ? V{} : x;  // this way round, NaN stays
    return act == Act::relu ? positive : positive * positive;
  }
}
