// The two passes of gated_mlp_decode over rows of weights, for one way to multiply them:
//   Way::E          the element type of simd.inl
//   Way::Held       the element that x and h are held in for the products
//   hold            puts a token's elements where products want them, the last unit filled with 0
//   hold_h          the same for a unit of h, that comes as a pair
//   add             adds the products of a unit of weights with a unit of what is held
#include "simd.inl"
#include "activations.inl"

using namespace decode;

constexpr int64_t LANES = sizeof(Float) / sizeof(float);
constexpr int64_t UNIT = 2 * LANES;  // columns of a pair of vectors, and rows of a unit of work
constexpr int64_t TOKENS = 4;        // tokens that share one reading of the weights
constexpr int64_t LINE = 64;         // bytes of a cache line

// How a thread asks the memory for weights, added to a way to multiply them: STREAMS runs of rows
// side by side, far from each other, and bytes of each fetched AHEAD of their use.
template <typename Way>
struct FetchedAhead : Way {
  static constexpr int64_t STREAMS = 4, AHEAD = 16 * sizeof(Float);
};
template <typename Way>
struct Followed : Way {
  static constexpr int64_t STREAMS = 2, AHEAD = 0;
};

// Rows of one matrix that are read one after the other.
struct Stream {
  const Weights* weights;
  int64_t first;  // row
  float* sums;    // of the whole matrix, for the first token
};

// Where the sum of a row stands: units of rows are in the order of pairs, so that what follows
// reads and writes them by vectors.
template <typename E>
INLINE int64_t place(int64_t row) {
  static const auto lanes = [] {
    struct Lanes { int32_t of[UNIT]; } lanes;
    for (int64_t k = 0; k < UNIT; ++k) lanes.of[E::column(k)] = static_cast<int32_t>(k);
    return lanes;
  }();
  return row / UNIT * UNIT + lanes.of[row % UNIT];
}

// Reads a unit of which only `count` columns exist; the others read as 0.
template <typename Element>
struct PartOf {
  Element columns[UNIT] = {};
  INLINE PartOf read(const Element* from, int64_t count) {
    PartOf part;
    std::memcpy(part.columns, from, count * sizeof(Element));
    return part;
  }
};

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

// The products of row `i` of each stream with a few tokens.
template <typename Way, int64_t streams, int64_t tokens>
INLINE void dot(const Stream (&from)[streams], int64_t i, const typename Way::Held* x,
                int64_t x_stride, float* const (&to)[streams], int64_t to_stride) {
  using Element = typename Way::E::Element;
  const int64_t length = from[0].weights->length;
  const Element* w[streams];
  for (int64_t s = 0; s < streams; ++s)
    w[s] = static_cast<const Element*>(from[s].weights->data) +
           (from[s].first + i) * from[s].weights->stride;
  Float sums[streams][tokens][2] = {};
  int64_t k = 0;
  for (; k + UNIT <= length; k += UNIT) {
#pragma GCC unroll 4
    for (int64_t s = 0; s < streams; ++s) {
      const char* ahead = reinterpret_cast<const char*>(w[s] + k) + Way::AHEAD;
      if constexpr (Way::AHEAD > 0)
        for (int64_t at = 0; at < static_cast<int64_t>(UNIT * sizeof(Element)); at += LINE)
          __builtin_prefetch(ahead + at);
      Way::template add<tokens>(sums[s], w[s] + k, x + k, x_stride);
    }
  }
  if (k < length) {
    for (int64_t s = 0; s < streams; ++s) {
      const auto part = PartOf<Element>::read(w[s] + k, length - k);
      Way::template add<tokens>(sums[s], part.columns, x + k, x_stride);
    }
  }
  for (int64_t s = 0; s < streams; ++s)
    for (int64_t t = 0; t < tokens; ++t)
      to[s][t * to_stride] = sum_of(sums[s][t][0] + sums[s][t][1]);
}

// The products of `count` rows of each stream with every token.
template <typename Way, int64_t streams>
static void products(const Stream (&from)[streams], int64_t count, const float* held,
                     int64_t held_stride, int64_t tokens, int64_t sums_stride) {
  const auto* x = reinterpret_cast<const typename Way::Held*>(held);
  for (int64_t i = 0; i < count; ++i) {
    float* to[streams];
    for (int64_t s = 0; s < streams; ++s)
      to[s] = from[s].sums + place<typename Way::E>(from[s].first + i);
    const typename Way::Held* at = x;
    for (int64_t left = tokens; left > 0; left -= TOKENS, at += TOKENS * held_stride) {
      switch (std::min(left, TOKENS)) {
        case 4: dot<Way, streams, 4>(from, i, at, held_stride, to, sums_stride); break;
        case 3: dot<Way, streams, 3>(from, i, at, held_stride, to, sums_stride); break;
        case 2: dot<Way, streams, 2>(from, i, at, held_stride, to, sums_stride); break;
        default: dot<Way, streams, 1>(from, i, at, held_stride, to, sums_stride);
      }
      for (int64_t s = 0; s < streams; ++s) to[s] += TOKENS * sums_stride;
    }
  }
}

// The products of rows [first, last) of one matrix, or of two that are as large, in streams and
// what is left over.
template <typename Way, int64_t matrices>
static void products_of(const Weights* const (&weights)[matrices], float* const (&sums)[matrices],
                        int64_t first, int64_t last, const float* held, int64_t held_stride,
                        int64_t tokens, int64_t sums_stride) {
  constexpr int64_t parts = Way::STREAMS / matrices;
  const int64_t part = (last - first) / parts, whole = first + parts * part;
  Stream streams[Way::STREAMS], rest[matrices];
  for (int64_t m = 0; m < matrices; ++m) {
    for (int64_t i = 0; i < parts; ++i)
      streams[i * matrices + m] = {weights[m], first + i * part, sums[m]};
    rest[m] = {weights[m], whole, sums[m]};
  }
  products<Way>(streams, part, held, held_stride, tokens, sums_stride);
  products<Way>(rest, last - whole, held, held_stride, tokens, sums_stride);
}

// Sums whose rows do not exist, in the last unit, read as 0.
INLINE void clear_last_unit(float* sums, int64_t end, int64_t tokens, int64_t stride) {
  for (int64_t t = 0; t < tokens; ++t)
    std::fill_n(sums + t * stride + (end - 1) * UNIT, UNIT, 0.0f);
}

template <typename Way>
static void hidden_products(const Problem& p, int64_t begin, int64_t end) {
  const int64_t first = begin * UNIT, last = std::min(end * UNIT, p.width);
  clear_last_unit(p.gate_sums, end, p.tokens, p.width_stride);
  if (p.up.data == nullptr)
    return products_of<Way, 1>({&p.gate}, {p.gate_sums}, first, last, p.x_held, p.hidden_stride,
                               p.tokens, p.width_stride);
  clear_last_unit(p.up_sums, end, p.tokens, p.width_stride);
  products_of<Way, 2>({&p.gate, &p.up}, {p.gate_sums, p.up_sums}, first, last, p.x_held,
                      p.hidden_stride, p.tokens, p.width_stride);
}

template <typename E>
INLINE Pair<Float> bias_of(const Weights& weights, int64_t row) {
  if (weights.bias == nullptr) return {Float{}, Float{}};
  const auto* bias = static_cast<const typename E::Element*>(weights.bias) + row;
  return E::load(
      PartOf<typename E::Element>::read(bias, std::min(UNIT, weights.rows - row)).columns);
}

INLINE Pair<Float> biased(const float* sums, Pair<Float> bias) {
  return {load_vector<Float>(sums) + bias.first, load_vector<Float>(sums + LANES) + bias.second};
}

// h of the units [begin, end) for every token.
template <typename Way, Act act>
static void hidden(const Problem& p, int64_t begin, int64_t end) {
  using E = typename Way::E;
  hidden_products<Way>(p, begin, end);
  constexpr bool halves = sizeof(typename E::Element) == 2;
  auto* held = reinterpret_cast<typename Way::Held*>(p.h_held);
  for (int64_t row = begin * UNIT; row < end * UNIT; row += UNIT) {
    const Pair<Float> gate_bias = bias_of<E>(p.gate, row), up_bias = bias_of<E>(p.up, row);
    for (int64_t t = 0; t < p.tokens; ++t) {
      const int64_t at = t * p.width_stride + row;
      const Pair<Float> gate = biased(p.gate_sums + at, gate_bias);
      Pair<Float> h = {activate<act, halves>(gate.first), activate<act, halves>(gate.second)};
      if (p.up.data) {
        const Pair<Float> up = biased(p.up_sums + at, up_bias);
        h = {h.first * up.first, h.second * up.second};
      }
      Way::hold_h(held + at, h);
    }
  }
}

// The outputs of the units [begin, end) for every token, rounded to the dtype.
template <typename Way>
static void output(const Problem& p, int64_t begin, int64_t end) {
  using E = typename Way::E;
  using Element = typename E::Element;
  const int64_t last = std::min(end * UNIT, p.hidden);
  products_of<Way, 1>({&p.down}, {p.down_sums}, begin * UNIT, last, p.h_held, p.width_stride,
                      p.tokens, p.hidden_stride);
  for (int64_t row = begin * UNIT; row < last; row += UNIT) {
    const Pair<Float> bias = bias_of<E>(p.down, row);
    for (int64_t t = 0; t < p.tokens; ++t) {
      Element rounded[UNIT];
      E::store_rounded(rounded, biased(p.down_sums + t * p.hidden_stride + row, bias));
      std::memcpy(static_cast<Element*>(p.y) + t * p.hidden + row, rounded,
                  std::min(UNIT, last - row) * sizeof(Element));
    }
  }
}

template <typename Way>
static void hold_x(const Problem& p) {
  auto* held = reinterpret_cast<typename Way::Held*>(p.x_held);
  const auto* x = static_cast<const typename Way::E::Element*>(p.x);
  for (int64_t t = 0; t < p.tokens; ++t)
    Way::hold(x + t * p.hidden, p.hidden, held + t * p.hidden_stride);
}

template <typename Way>
static Kernels kernels_reading(Act act) {
  switch (act) {
    case Act::silu: return {hold_x<Way>, hidden<Way, Act::silu>, output<Way>, UNIT, 1};
    case Act::gelu: return {hold_x<Way>, hidden<Way, Act::gelu>, output<Way>, UNIT, 1};
    case Act::gelu_tanh: return {hold_x<Way>, hidden<Way, Act::gelu_tanh>, output<Way>, UNIT, 1};
    case Act::relu: return {hold_x<Way>, hidden<Way, Act::relu>, output<Way>, UNIT, 1};
    case Act::relu2: return {hold_x<Way>, hidden<Way, Act::relu2>, output<Way>, UNIT, 1};
  }
  return {};
}

// Zen 4's cores (bench/decode.py) follow two streams by themselves and read a tenth slower when told
// what to fetch; Sapphire Rapids' want to be told, and so do Zen 3's, which have vectors of 32 bytes
// and read a fifth faster then. With more tokens than one, four streams share what is read of each
// token, and products bind.
template <typename Way>
static Kernels kernels_of(Act act, int64_t tokens) {
  constexpr bool wide = PRUNEKIT_VECTOR_BYTES == 64;
  return wide && tokens == 1 && cpu_is_amd() ? kernels_reading<Followed<Way>>(act)
                                             : kernels_reading<FetchedAhead<Way>>(act);
}
