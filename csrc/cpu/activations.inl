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

// Φ(x) = (1 + erf(x/√2))/2 within 1e-7, by the polynomial of kernels/activations.py for
// log2(2·Φ(-|x|)), and 2^y = 2^n·2^r with |r| <= 1/2.
INLINE Float normal_cdf(Float x) {
  const Float a = magnitude(x);
  Float y = a * -3.7520735e-08f + 1.05514357e-06f;
  y = y * a - 1.27613757e-05f;
  y = y * a + 8.49960488e-05f;
  y = y * a - 0.000302427594f;
  y = y * a + 3.41017476e-05f;
  y = y * a + 0.00691961125f;
  y = y * a - 0.0524311177f;
  y = y * a - 0.459221959f;
  y = y * a - 1.15110421f;
  y = clamp(y * a - 1.0f, 150);
  const Float shift = splat<Float>(0x1.8p23f);  // leaves no bits for a fraction
  const Float n = (y + shift) - shift, r = y - n;
  Float p = r * 0x1.41fbbcp-13f + 0x1.5f3e54p-10f;
  p = p * r + 0x1.3b2d4cp-7f;
  p = p * r + 0x1.c6aee8p-5f;
  p = p * r + 0x1.ebfbdcp-3f;
  p = p * r + 0x1.62e430p-1f;
  p = p * r + 1.0f;
  const Float tail = scale(p, n);
  return x < 0 ? tail : 1.0f - tail;
}

INLINE Double exp(Double x) {
  for (size_t i = 0; i < sizeof(x) / sizeof(x[0]); ++i) x[i] = std::exp(x[i]);
  return x;
}

INLINE Double normal_cdf(Double x) {
  for (size_t i = 0; i < sizeof(x) / sizeof(x[0]); ++i) x[i] = std::erfc(-x[i] * M_SQRT1_2) / 2;
  return x;
}

template <Act act, typename V>
INLINE V activate(V x) {
  using Real = std::remove_reference_t<decltype(x[0])>;
  if constexpr (act == Act::silu) {
    return x / (1 + exp(-x));
  } else if constexpr (act == Act::gelu) {
    return x * normal_cdf(x);
  } else if constexpr (act == Act::gelu_tanh) {
    // (1 + tanh(u)) / 2 is the sigmoid of 2u: one exponential, and no cancellation.
    const V u = x * Real(M_2_SQRTPI * M_SQRT1_2) * (1 + Real(0.044715) * x * x);
    return x / (1 + exp(-2 * u));
  } else {
    const V positive = x < 0 ? V{} : x;  // this way round, NaN stays
    return act == Act::relu ? positive : positive * positive;
  }
}
