// Vectors of one register, in the compiler's own vector types: the same lines become SSE2, AVX2,
// AVX-512 or NEON. Included by a kernel's .inl, inside the namespace of an instruction set.

#define INLINE static inline __attribute__((always_inline))

typedef float Float __attribute__((vector_size(PRUNEKIT_VECTOR_BYTES)));
typedef int32_t Int __attribute__((vector_size(PRUNEKIT_VECTOR_BYTES)));
typedef uint32_t UInt __attribute__((vector_size(PRUNEKIT_VECTOR_BYTES)));
typedef double Double __attribute__((vector_size(PRUNEKIT_VECTOR_BYTES)));
typedef int64_t Long __attribute__((vector_size(PRUNEKIT_VECTOR_BYTES)));

template <typename To, typename From>
INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename V, typename Real>
INLINE V splat(Real value) {
  using Lane = std::remove_reference_t<decltype(V{}[0])>;
  return V{} + static_cast<Lane>(value);
}

template <typename V>
INLINE V load_vector(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <typename V>
INLINE void store_vector(void* to, V v) {
  std::memcpy(to, &v, sizeof(v));
}

// Two vectors of neighbouring columns, as an element type lays them out: see `column` below.
template <typename V>
struct Pair {
  V first, second;
};

// The element types in memory, each with the vector that computes for it.
//   load           reads a pair of vectors
//   store_rounded  writes a pair, and returns what memory then holds: what a reader of h will see
//   column(k)      the column, counted from the pair's first, that stands in lane k of its 2·lanes
// Columns of 16 bits are taken apart by shifts, even ones first, odd ones second: it costs less
// than to widen neighbours, and no instruction set lacks it.

template <typename V>
struct Wide {
  using Vector = V;
  using Element = std::remove_reference_t<decltype(V{}[0])>;
  INLINE Pair<V> load(const Element* from) {
    return {load_vector<V>(from), load_vector<V>(from + sizeof(V) / sizeof(Element))};
  }
  INLINE Pair<V> store_rounded(Element* to, Pair<V> h) {
    store_vector(to, h.first);
    store_vector(to + sizeof(V) / sizeof(Element), h.second);
    return h;
  }
  INLINE int64_t column(int64_t lane) { return lane; }
};

using Fp32 = Wide<Float>;
using Fp64 = Wide<Double>;

INLINE int64_t column_of_halves(int64_t lane) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
  constexpr int64_t lanes = sizeof(Float) / sizeof(float);
  return lane < lanes ? 2 * lane : 2 * (lane - lanes) + 1;
}

struct Bf16 {
  using Vector = Float;
  using Element = uint16_t;
  INLINE Pair<Float> load(const uint16_t* from) {
    const UInt words = load_vector<UInt>(from);
    return {bits<Float>(words << 16), bits<Float>(words & 0xffff0000)};
  }
  INLINE Pair<Float> store_rounded(uint16_t* to, Pair<Float> h) {
    const UInt even = round(h.first), odd = round(h.second);
    store_vector(to, (even >> 16) | odd);
    return {bits<Float>(even), bits<Float>(odd)};
  }
  INLINE int64_t column(int64_t lane) { return column_of_halves(lane); }

 private:
  INLINE UInt round(Float v) {
    const UInt word = bits<UInt>(v);
    const UInt nearest_even = word + 0x7fff + ((word >> 16) & 1);
    return (v == v ? nearest_even : splat<UInt>(0x7fc00000)) & 0xffff0000;
  }
};

#if PRUNEKIT_VECTOR_BYTES >= 32

// The CPU itself converts fp16, and keeps the columns in their order.
struct Fp16 {
  using Vector = Float;
  using Element = uint16_t;
  static constexpr int64_t lanes = sizeof(Float) / sizeof(float);
  INLINE Pair<Float> load(const uint16_t* from) {
    return {widen(load_vector<Halves>(from)), widen(load_vector<Halves>(from + lanes))};
  }
  INLINE Pair<Float> store_rounded(uint16_t* to, Pair<Float> h) {
    const Halves first = narrow(h.first), second = narrow(h.second);
    store_vector(to, first);
    store_vector(to + lanes, second);
    return {widen(first), widen(second)};
  }
  INLINE int64_t column(int64_t lane) { return lane; }

 private:
#if PRUNEKIT_VECTOR_BYTES == 64
  using Halves = __m256i;
  INLINE Float widen(Halves halves) { return _mm512_cvtph_ps(halves); }
  INLINE Halves narrow(Float v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
#else
  using Halves = __m128i;
  INLINE Float widen(Halves halves) { return _mm256_cvtph_ps(halves); }
  INLINE Halves narrow(Float v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
#endif
};

#else

struct Fp16 {
  using Vector = Float;
  using Element = uint16_t;
  INLINE Pair<Float> load(const uint16_t* from) {
    const UInt words = load_vector<UInt>(from);
    return {widen(words & 0xffff), widen(words >> 16)};
  }
  INLINE Pair<Float> store_rounded(uint16_t* to, Pair<Float> h) {
    const UInt even = narrow(h.first), odd = narrow(h.second);
    store_vector(to, even | (odd << 16));
    return {widen(even), widen(odd)};
  }
  INLINE int64_t column(int64_t lane) { return column_of_halves(lane); }

 private:
  // A normal half needs its exponent rebiased, which a multiplication by 2^-112 does (and keeps inf
  // and NaN); a subnormal one is placed in the mantissa of 0.5, which is then subtracted.
  INLINE Float widen(UInt half) {
    const UInt doubled = half << 17;
    const Float normal = bits<Float>((doubled >> 4) + 0x70000000u) * 0x1p-112f;
    const Float subnormal = bits<Float>((doubled >> 17) | 0x3f000000u) - 0.5f;
    const UInt magnitude = doubled < (1u << 27) ? bits<UInt>(subnormal) : bits<UInt>(normal);
    return bits<Float>(((half & 0x8000) << 16) | magnitude);
  }
  // Adding a power of two as large as the value's own last half bit makes the FPU round there; the
  // pair of scalings turns what is too large for a half into inf.
  INLINE UInt narrow(Float v) {
    const UInt word = bits<UInt>(v);
    const UInt doubled = word + word;
    const Float scaled = bits<Float>(word & 0x7fffffffu) * 0x1p+112f * 0x1p-110f;
    const UInt exponent = doubled & 0xff000000u;
    const UInt clamped = exponent < 0x71000000u ? splat<UInt>(0x71000000) : exponent;
    const UInt sum = bits<UInt>(bits<Float>((clamped >> 1) + 0x07800000u) + scaled);
    const UInt rounded = ((sum >> 13) & 0x7c00) + (sum & 0x0fff);
    const UInt magnitude = doubled > 0xff000000u ? splat<UInt>(0x7e00) : rounded;
    return ((word >> 16) & 0x8000) | magnitude;
  }
};

#endif

INLINE Float magnitude(Float x) { return bits<Float>(bits<Int>(x) & 0x7fffffff); }
INLINE Double magnitude(Double x) { return bits<Double>(bits<Long>(x) & INT64_MAX); }

// The smaller and the larger of x and a limit, NaN as it is.
INLINE Float at_most(Float x, float limit) {
  const Float high = splat<Float>(limit);
#if PRUNEKIT_VECTOR_BYTES == 64
  return _mm512_min_ps(high, x);
#else
  return high < x ? high : x;
#endif
}
INLINE Float at_least(Float x, float limit) {
  const Float low = splat<Float>(limit);
#if PRUNEKIT_VECTOR_BYTES == 64
  return _mm512_max_ps(low, x);
#else
  return low > x ? low : x;
#endif
}

// Returns x·2^n for a whole n in [-250, 250]; half of n at a time, it can reach inf and 0. With
// vectors of 64 bytes n is any, and floored.
INLINE Float scale(Float x, Float n) {
#if PRUNEKIT_VECTOR_BYTES == 64
  return _mm512_scalef_ps(x, n);
#else
  const Int exponent = __builtin_convertvector(n, Int), half = exponent >> 1;
  return x * bits<Float>((half + 127) << 23) * bits<Float>((exponent - half + 127) << 23);
#endif
}
