// The activations of prunekit/ops/activations.py, elementwise on vectors, after simd.inl.
// fp32 vectors use polynomials; fp64 ones call the C library lane by lane, being for checks alone.

// exp(x) within 1 ulp: 2^n·e^r with |r| <= ln(2)/2.
INLINE Float exp(Float x) {
  x = at_most(at_least(x, -128), 128);
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

// 2^y for y <= 0, by 2^floor(y)·2^r: within 2e-9 or, for results of 16 bits, 3e-6 of the value.
template <bool halves>
INLINE Float exp2_of_negative(Float y) {
#if PRUNEKIT_VECTOR_BYTES == 64
  const Float n = y, r = _mm512_reduce_ps(y, _MM_FROUND_TO_NEG_INF);  // scale floors n by itself
#else
  y = at_least(y, -150);
  const Int whole = __builtin_convertvector(y, Int);  // towards zero
  const Float n = __builtin_convertvector(whole, Float) - 1, r = y - n;  // r in (0, 1]
#endif
  Float p;
  if constexpr (halves) {
    p = r * 0x1.bb7c84p-7f + 0x1.aa1422p-5f;
    p = p * r + 0x1.ee7980p-3f;
    p = p * r + 0x1.62d166p-1f;
    p = p * r + 0x1.00002cp+0f;
  } else {
    p = r * 0x1.c72114p-13f + 0x1.461962p-10f;
    p = p * r + 0x1.3d27fep-7f;
    p = p * r + 0x1.c68502p-5f;
    p = p * r + 0x1.ebfd9ep-3f;
    p = p * r + 0x1.62e42ap-1f;
    p = p * r + 1.0f;
  }
  return scale(p, n);
}

// Φ(-a) = erfc(a/√2)/2 for a >= 0, by a polynomial for log2(2·Φ(-a)): within 1e-7, where that of
// kernels/activations.py serves, or, for results of 16 bits, 1e-6 and 1e-4 of the value down to
// Φ(-6). Either one's leading term is negative, so what is far out goes to 0.
template <bool halves>
INLINE Float normal_tail(Float a) {
  Float y;
  if constexpr (halves) {
    y = a * -1.41470548e-06f + 5.37609631e-05f;
    y = y * a - 0.000874843623f;
    y = y * a + 0.00831770897f;
    y = y * a - 0.0536365397f;
    y = y * a - 0.458720267f;
    y = y * a - 1.15117466f;
  } else {
    y = a * -3.7520735e-08f + 1.05514357e-06f;
    y = y * a - 1.27613757e-05f;
    y = y * a + 8.49960488e-05f;
    y = y * a - 0.000302427594f;
    y = y * a + 3.41017476e-05f;
    y = y * a + 0.00691961125f;
    y = y * a - 0.0524311177f;
    y = y * a - 0.459221959f;
    y = y * a - 1.15110421f;
  }
  return exp2_of_negative<halves>(y * a - 1.0f);
}

// x·Φ(x) = max(x, 0) - |x|·Φ(-|x|)
template <bool halves>
INLINE Float gelu(Float x) {
  const Float a = at_most(magnitude(x), FLT_MAX);  // inf·0 would be NaN
  return at_least(x, 0) - a * normal_tail<halves>(a);
}

INLINE Double exp(Double x) {
  for (size_t i = 0; i < sizeof(x) / sizeof(x[0]); ++i) x[i] = std::exp(x[i]);
  return x;
}

template <bool halves>
INLINE Double gelu(Double x) {
  for (size_t i = 0; i < sizeof(x) / sizeof(x[0]); ++i) x[i] *= std::erfc(-x[i] * M_SQRT1_2) / 2;
  return x;
}

// act(x); with `halves`, for a result that will be rounded to 16 bits.
template <Act act, bool halves, typename V>
INLINE V activate(V x) {
  using Real = std::remove_reference_t<decltype(x[0])>;
  if constexpr (act == Act::silu) {
    return x / (1 + exp(-x));
  } else if constexpr (act == Act::gelu) {
    return gelu<halves>(x);
  } else if constexpr (act == Act::gelu_tanh) {
    // (1 + tanh(u)) / 2 is the sigmoid of 2u: one exponential, and no cancellation.
    const V u = x * Real(M_2_SQRTPI * M_SQRT1_2) * (1 + Real(0.044715) * x * x);
    return x / (1 + exp(-2 * u));
  } else {
    const V positive = x < 0 ? V{} : x;  // this way round, NaN stays
    return act == Act::relu ? positive : positive * positive;
  }
}
