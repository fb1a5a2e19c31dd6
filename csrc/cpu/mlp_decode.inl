// The two passes of gated_mlp_decode for one instruction set; see mlp_decode.cpp for the whole.
#include "simd.inl"
#include "activations.inl"

constexpr int64_t LANES = sizeof(Float) / sizeof(float);
constexpr int64_t UNIT = 2 * LANES;  // columns of a pair of vectors, and rows that a task takes
constexpr int64_t ROWS = 4;          // weight rows read side by side
constexpr int64_t TOKENS = 4;        // tokens that share one reading of them

// Which lane of a pair each column of it stands in.
template <typename E>
struct LaneOf {
  int32_t lane[UNIT];
  LaneOf() {
    for (int64_t k = 0; k < UNIT; ++k) lane[E::column(k)] = static_cast<int32_t>(k);
  }
};

// Reads a pair of which only `count` columns exist; the others read as 0.
template <typename E>
INLINE Pair<Float> load_part(const typename E::Element* from, int64_t count) {
  typename E::Element part[UNIT] = {};
  std::memcpy(part, from, count * sizeof(part[0]));
  return E::load(part);
}

// Widens `count` elements to fp32 in the order of pairs, the last pair filled up with 0.
template <typename E>
static void widen(const typename E::Element* from, int64_t count, float* to) {
  for (int64_t k = 0; k < count; k += UNIT) {
    const Pair<Float> pair =
        k + UNIT <= count ? E::load(from + k) : load_part<E>(from + k, count - k);
    store_vector(to + k, pair.first);
    store_vector(to + k + LANES, pair.second);
  }
}

// The sum of a vector's lanes, halves onto halves: few steps that wait for each other.
INLINE float sum_of(Float v) {
#if PRUNEKIT_VECTOR_BYTES == 64
  return _mm512_reduce_add_ps(v);
#else
  float lanes[LANES];
  store_vector(lanes, v);
  for (int64_t half = LANES / 2; half; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
#endif
}

// out[r][t] = row r of w · token t of x, for a few rows and tokens.
template <typename E, int64_t rows, int64_t tokens>
INLINE void dot(const typename E::Element* w, int64_t w_stride, const float* x, int64_t x_stride,
                int64_t length, float (&out)[ROWS][TOKENS]) {
  Float sums[rows][tokens][2] = {};
  int64_t k = 0;
  const auto add = [&](const auto& load) {
#pragma GCC unroll 4
    for (int64_t r = 0; r < rows; ++r) {
      const Pair<Float> pair = load(w + r * w_stride + k);
#pragma GCC unroll 4
      for (int64_t t = 0; t < tokens; ++t) {
        const float* at = x + t * x_stride + k;
        sums[r][t][0] += pair.first * load_vector<Float>(at);
        // A second sum keeps the additions of a lone token from waiting for each other.
        sums[r][t][tokens == 1] += pair.second * load_vector<Float>(at + LANES);
      }
    }
  };
  for (; k + UNIT <= length; k += UNIT) add([](const auto* from) { return E::load(from); });
  if (k < length) add([&](const auto* from) { return load_part<E>(from, length - k); });
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t t = 0; t < tokens; ++t) {
      out[r][t] = sum_of(sums[r][t][0] + sums[r][t][1]);
    }
  }
}

// The products of up to UNIT rows with every token: to[t][lane of the row].
template <typename E>
static void products(const Weights& weights, int64_t first, int64_t count, const float* x,
                     int64_t x_stride, int64_t tokens, float* to) {
  static const LaneOf<E> lanes;
  for (int64_t row = 0; row < count; row += ROWS) {
    const auto* w = static_cast<const typename E::Element*>(weights.data) +
                    (first + row) * weights.stride;
    const int64_t rows = std::min(ROWS, count - row);
    for (int64_t t = 0; t < tokens;) {
      float out[ROWS][TOKENS];
      const float* at = x + t * x_stride;
      const int64_t taken = rows == ROWS && tokens - t >= TOKENS ? TOKENS : 1;
      if (rows < ROWS) {
        for (int64_t r = 0; r < rows; ++r) {
          float alone[ROWS][TOKENS];
          dot<E, 1, 1>(w + r * weights.stride, 0, at, x_stride, weights.length, alone);
          out[r][0] = alone[0][0];
        }
      } else if (taken == TOKENS) {
        dot<E, ROWS, TOKENS>(w, weights.stride, at, x_stride, weights.length, out);
      } else {
        dot<E, ROWS, 1>(w, weights.stride, at, x_stride, weights.length, out);
      }
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < taken; ++i) to[(t + i) * UNIT + lanes.lane[row + r]] = out[r][i];
      t += taken;
    }
  }
}

template <typename E>
static Pair<Float> bias_of(const Weights& weights, int64_t first, int64_t count) {
  if (weights.bias == nullptr) return {Float{}, Float{}};
  return load_part<E>(static_cast<const typename E::Element*>(weights.bias) + first, count);
}

// h of UNIT neurons for every token, in fp32, in the order of pairs.
template <typename E, Act act>
static void hidden_unit(const Problem& p, int64_t first) {
  const int64_t count = std::min(UNIT, p.width - first);
  float gate[MAX_TOKENS * UNIT] = {}, up[MAX_TOKENS * UNIT] = {};
  products<E>(p.gate, first, count, p.x_wide, p.x_stride, p.tokens, gate);
  if (p.up.data) products<E>(p.up, first, count, p.x_wide, p.x_stride, p.tokens, up);
  const Pair<Float> gate_bias = bias_of<E>(p.gate, first, count);
  const Pair<Float> up_bias = bias_of<E>(p.up, first, count);
  for (int64_t t = 0; t < p.tokens; ++t) {
    const float *g = gate + t * UNIT, *u = up + t * UNIT;
    Pair<Float> h = {activate<act>(load_vector<Float>(g) + gate_bias.first),
                     activate<act>(load_vector<Float>(g + LANES) + gate_bias.second)};
    if (p.up.data) {
      h.first *= load_vector<Float>(u) + up_bias.first;
      h.second *= load_vector<Float>(u + LANES) + up_bias.second;
    }
    float* to = p.h_wide + t * p.h_stride + first;
    store_vector(to, h.first);
    store_vector(to + LANES, h.second);
  }
}

// UNIT outputs of every token, rounded to the dtype.
template <typename E>
static void output_unit(const Problem& p, int64_t first) {
  using Element = typename E::Element;
  const int64_t count = std::min(UNIT, p.hidden - first);
  float sums[MAX_TOKENS * UNIT] = {};
  products<E>(p.down, first, count, p.h_wide, p.h_stride, p.tokens, sums);
  const Pair<Float> bias = bias_of<E>(p.down, first, count);
  for (int64_t t = 0; t < p.tokens; ++t) {
    Element rounded[UNIT];
    E::store_rounded(rounded, {load_vector<Float>(sums + t * UNIT) + bias.first,
                               load_vector<Float>(sums + t * UNIT + LANES) + bias.second});
    std::memcpy(static_cast<Element*>(p.y) + t * p.hidden + first, rounded,
                count * sizeof(Element));
  }
}

template <typename E>
static void widen_tokens(const Problem& p) {
  for (int64_t t = 0; t < p.tokens; ++t)
    widen<E>(static_cast<const typename E::Element*>(p.x) + t * p.hidden, p.hidden,
             p.x_wide + t * p.x_stride);
}

template <typename E>
static Kernels kernels_for(Act act) {
  switch (act) {
    case Act::silu: return {widen_tokens<E>, hidden_unit<E, Act::silu>, output_unit<E>, UNIT};
    case Act::gelu: return {widen_tokens<E>, hidden_unit<E, Act::gelu>, output_unit<E>, UNIT};
    case Act::gelu_tanh:
      return {widen_tokens<E>, hidden_unit<E, Act::gelu_tanh>, output_unit<E>, UNIT};
    case Act::relu: return {widen_tokens<E>, hidden_unit<E, Act::relu>, output_unit<E>, UNIT};
    case Act::relu2: return {widen_tokens<E>, hidden_unit<E, Act::relu2>, output_unit<E>, UNIT};
  }
  return {};
}

static Kernels kernels(ScalarType dtype, Act act) {
  switch (dtype) {
    case ScalarType::BFloat16: return kernels_for<Bf16>(act);
    case ScalarType::Half: return kernels_for<Fp16>(act);
    case ScalarType::Float: return kernels_for<Fp32>(act);
    default: return {};
  }
}

#undef INLINE
