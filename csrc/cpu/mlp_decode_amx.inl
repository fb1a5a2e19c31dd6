// Decoding bf16 on matrix tiles: 16 rows of weights times 16 tokens at once, 32 columns a step.
//
// A tile of weights is read as it lies. What it is multiplied with is held by pairs of columns, the
// tokens of a pair side by side: [columns / 2][16][2], tokens that do not exist as 0. Sums come as
// [rows][16] in fp32, so h is computed by vectors over the tokens, and two of its rows make one
// pair of columns of what the second pass multiplies with.
#include "simd.inl"
#include "activations.inl"

using namespace decode;

constexpr int64_t ROWS = 16;               // of a tile
constexpr int64_t UNIT = 2 * ROWS;         // rows of a unit of work, and columns of a tile
constexpr int64_t PAIRS = UNIT / 2;        // of columns
static_assert(MAX_TOKENS == 16);

// The tiles' shapes in this thread; what another library had set before is put back.
class Shapes {
 public:
  Shapes() {
    _tile_storeconfig(&before_);
    Config config;
    config.palette = 1;
    for (int tile = 0; tile < 5; ++tile) {
      config.row_bytes[tile] = 64;
      config.rows[tile] = ROWS;
    }
    _tile_loadconfig(&config);
  }
  ~Shapes() {
    if (before_.palette)
      _tile_loadconfig(&before_);
    else
      _tile_release();
  }
  Shapes(const Shapes&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette = 0, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } before_;
};

// Sums of two tiles of rows with every token.
struct Sums {
  alignas(64) float of[2][ROWS][MAX_TOKENS];
};

// A tile at an edge, filled up with 0.
struct Edge {
  alignas(64) uint16_t columns[ROWS][UNIT] = {};

  Edge(const Weights& w, int64_t row, int64_t column) {
    const int64_t count = std::min(UNIT, w.length - column);
    for (int64_t r = 0; r < std::min(ROWS, w.rows - row); ++r)
      std::memcpy(columns[r], static_cast<const uint16_t*>(w.data) + (row + r) * w.stride + column,
                  count * sizeof(uint16_t));
  }
};

// The products of 16 rows of `a` and 16 rows of `b`, which are as long, with every token.
static void products(const Weights& a, int64_t a_row, const Weights& b, int64_t b_row,
                     const float* held, Sums& sums) {
  const auto at = [](const Weights& w, int64_t row, int64_t column) {
    return static_cast<const uint16_t*>(w.data) + row * w.stride + column;
  };
  constexpr int HELD_BYTES = 4 * MAX_TOKENS;
  const bool whole = a_row + ROWS <= a.rows && b_row + ROWS <= b.rows;
  const int64_t inner = whole ? a.length / UNIT * UNIT : 0;
  _tile_zero(0);
  _tile_zero(1);
  int64_t k = 0;
  for (; k < inner; k += UNIT, held += PAIRS * MAX_TOKENS) {
    _tile_loadd(2, held, HELD_BYTES);
    _tile_loadd(3, at(a, a_row, k), 2 * a.stride);
    _tile_dpbf16ps(0, 3, 2);
    _tile_loadd(4, at(b, b_row, k), 2 * b.stride);
    _tile_dpbf16ps(1, 4, 2);
  }
  for (; k < a.length; k += UNIT, held += PAIRS * MAX_TOKENS) {
    const Edge of_a(a, a_row, k), of_b(b, b_row, k);
    _tile_loadd(2, held, HELD_BYTES);
    _tile_loadd(3, of_a.columns, 2 * UNIT);
    _tile_dpbf16ps(0, 3, 2);
    _tile_loadd(4, of_b.columns, 2 * UNIT);
    _tile_dpbf16ps(1, 4, 2);
  }
  _tile_stored(0, sums.of[0], HELD_BYTES);
  _tile_stored(1, sums.of[1], HELD_BYTES);
}

INLINE Float biased(const float* sums, const Weights& weights, int64_t row) {
  const Float sum = load_vector<Float>(sums);
  if (weights.bias == nullptr || row >= weights.rows) return sum;
  const uint32_t bias = static_cast<const uint16_t*>(weights.bias)[row];
  return sum + bits<float>(bias << 16);
}

INLINE __m512i rounded(Float v) {
  return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
}

static void hold_x(const Problem& p) {
  const auto tokens = static_cast<__mmask16>((1u << p.tokens) - 1);
  const __m512i numbers = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i offsets =
      _mm512_mullo_epi32(numbers, _mm512_set1_epi32(static_cast<int>(2 * p.hidden)));
  const auto* x = static_cast<const uint16_t*>(p.x);
  int64_t k = 0;
  for (; k + 2 <= p.hidden; k += 2)
    _mm512_storeu_si512(p.x_held + k / 2 * MAX_TOKENS,
                        _mm512_mask_i32gather_epi32(__m512i{}, tokens, offsets, x + k, 1));
  auto* rest = reinterpret_cast<uint32_t*>(p.x_held + k / 2 * MAX_TOKENS);
  std::fill_n(rest, (p.hidden_stride - k) / 2 * MAX_TOKENS, uint32_t{0});
  if (k < p.hidden)
    for (int64_t t = 0; t < p.tokens; ++t) rest[t] = x[t * p.hidden + k];
}

// h of the units [begin, end) for every token.
template <Act act>
static void hidden(const Problem& p, int64_t begin, int64_t end) {
  const Shapes shapes;
  const Weights& up = p.up.data ? p.up : p.gate;
  for (int64_t first = begin * UNIT; first < end * UNIT; first += ROWS) {
    Sums sums;
    products(p.gate, first, up, first, p.x_held, sums);
    const auto h = [&](int64_t r) {
      const Float gate = activate<act, true>(biased(sums.of[0][r], p.gate, first + r));
      return p.up.data ? gate * biased(sums.of[1][r], p.up, first + r) : gate;
    };
    for (int64_t r = 0; r < ROWS; r += 2)
      _mm512_storeu_si512(
          p.h_held + (first + r) / 2 * MAX_TOKENS,
          _mm512_or_si512(rounded(h(r)), _mm512_slli_epi32(rounded(h(r + 1)), 16)));
  }
}

// The outputs of the units [begin, end) for every token, rounded to bf16.
static void output(const Problem& p, int64_t begin, int64_t end) {
  const Shapes shapes;
  auto* y = static_cast<uint16_t*>(p.y);
  for (int64_t first = begin * UNIT; first < end * UNIT; first += UNIT) {
    Sums sums;
    products(p.down, first, p.down, first + ROWS, p.h_held, sums);
    const int64_t rows = std::min(UNIT, p.hidden - first);
    alignas(32) uint16_t of_rows[UNIT][MAX_TOKENS];
    for (int64_t r = 0; r < rows; ++r)
      store_vector(of_rows[r], _mm512_cvtneps_pbh(
                                   biased(sums.of[r / ROWS][r % ROWS], p.down, first + r)));
    for (int64_t t = 0; t < p.tokens; ++t)
      for (int64_t r = 0; r < rows; ++r) y[t * p.hidden + first + r] = of_rows[r][t];
  }
}

static Kernels kernels(Act act) {
  constexpr int64_t room = MAX_TOKENS / 2;  // of bf16 for 16 tokens, in floats a column
  switch (act) {
    case Act::silu: return {hold_x, hidden<Act::silu>, output, UNIT, room};
    case Act::gelu: return {hold_x, hidden<Act::gelu>, output, UNIT, room};
    case Act::gelu_tanh: return {hold_x, hidden<Act::gelu_tanh>, output, UNIT, room};
    case Act::relu: return {hold_x, hidden<Act::relu>, output, UNIT, room};
    case Act::relu2: return {hold_x, hidden<Act::relu2>, output, UNIT, room};
  }
  return {};
}

#undef INLINE
