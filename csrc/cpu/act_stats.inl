// One panel of gated_act_stats, for one instruction set; see act_stats.cpp for the whole.

#include "simd.inl"
#include "activations.inl"

// Rows whose sums stay in registers: few enough for their fp32 sums to be exact to about an ulp.
constexpr int64_t ROWS = 64;
constexpr int64_t LINE = 64;  // bytes of a cache line

// A matrix to walk: the panel's first column in the current row, and the distance between rows.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
};

// The sums over the panel's counted rows so far, in the lanes' order. Chunks of rows are added one
// after the other, whatever the threads do, so the same input gives the same bits.
struct PanelSums {
  double prompt_abs[PANEL], prompt_squares[PANEL];
  double sum[PANEL], max_abs[PANEL], active[PANEL];
};

template <typename V>
INLINE void add_lanes(double* to, V v) {
  std::remove_reference_t<decltype(v[0])> lanes[sizeof(v) / sizeof(v[0])];
  store_vector(lanes, v);
  for (size_t i = 0; i < std::size(lanes); ++i) to[i] += static_cast<double>(lanes[i]);
}

// NaN stays in a maximum once it is there, as torch's amax has it.
template <typename V>
INLINE void max_lanes(double* to, V v) {
  std::remove_reference_t<decltype(v[0])> lanes[sizeof(v) / sizeof(v[0])];
  store_vector(lanes, v);
  for (size_t i = 0; i < std::size(lanes); ++i)
    to[i] = to[i] >= lanes[i] || to[i] != to[i] ? to[i] : lanes[i];
}

// The sums over a chunk's rows of one vector of columns.
template <typename V>
struct VectorSums {
  using Mask = decltype(V{} > V{});
  V abs{}, sum{}, square_sum{};
  Mask max_abs{}, active{};

  INLINE void add(VectorSums& to, V gate, V h) {
    const V size = magnitude(h);
    const Mask order = bits<Mask>(size);  // as integers, magnitudes keep their order, NaN highest
    to.abs += size;
    to.sum += h;
    to.square_sum += h * h;
    to.max_abs = to.max_abs > order ? to.max_abs : order;
    to.active -= gate > 0;  // a true lane is -1
  }
  INLINE void flush(const VectorSums& from, PanelSums& to, int64_t lane) {
    add_lanes(to.prompt_abs + lane, from.abs);
    add_lanes(to.sum + lane, from.sum);
    add_lanes(to.prompt_squares + lane, from.square_sum);
    max_lanes(to.max_abs + lane, bits<V>(from.max_abs));
    add_lanes(to.active + lane, from.active);
  }
};

template <typename Type, Act act, bool gated, bool counted, typename T = typename Type::Element>
INLINE void chunk(
    Rows<const T> gate, Rows<const T> up, Rows<T> h, int64_t rows, int64_t width, PanelSums& sums) {
  using V = typename Type::Vector;
  constexpr int64_t lanes = sizeof(V) / sizeof(V{}[0]);
  constexpr bool halves = sizeof(T) == 2;

  for (int64_t column = 0; column < width; column += 2 * lanes) {
    VectorSums<V> first, second;
    // The hardware does not foresee a walk down the rows: fetch what the next one will visit.
    const bool more = column + 2 * lanes < width;
    const int64_t gate_ahead = more ? 2 * lanes : ROWS * gate.stride - column;
    const int64_t up_ahead = more ? 2 * lanes : ROWS * up.stride - column;
    const int64_t h_ahead = more ? 2 * lanes : ROWS * h.stride - column;
    for (int64_t row = 0; row < rows; ++row) {
      const T* gate_at = gate.data + row * gate.stride + column;
      const T* up_at = up.data + row * up.stride + column;
      T* h_at = h.data + row * h.stride + column;
      for (int64_t line = 0; line < 2 * lanes; line += LINE / sizeof(T)) {
        __builtin_prefetch(gate_at + gate_ahead + line);
        if (gated) __builtin_prefetch(up_at + up_ahead + line);
        __builtin_prefetch(h_at + h_ahead + line, 1);
      }

      const Pair<V> x = Type::load(gate_at);
      Pair<V> y{activate<act, halves>(x.first), activate<act, halves>(x.second)};
      if (gated) {
        const Pair<V> factor = Type::load(up_at);
        y = {y.first * factor.first, y.second * factor.second};
      }
      y = Type::store_rounded(h_at, y);
      if (counted) {
        VectorSums<V>::add(first, x.first, y.first);
        VectorSums<V>::add(second, x.second, y.second);
      }
    }
    if (counted) {
      VectorSums<V>::flush(first, sums, column);
      VectorSums<V>::flush(second, sums, column + lanes);
    }
  }
}

// A panel that is no whole number of pairs wide is computed in padded copies.
template <typename Type, Act act, bool gated, bool counted, typename T = typename Type::Element>
static void padded_chunk(
    Rows<const T> gate, Rows<const T> up, Rows<T> h, int64_t rows, int64_t width, PanelSums& sums) {
  T gate_copy[ROWS * TILE] = {}, up_copy[ROWS * TILE] = {}, h_copy[ROWS * TILE];
  for (int64_t row = 0; row < rows; ++row) {
    std::copy_n(gate.data + row * gate.stride, width, gate_copy + row * TILE);
    if (gated) std::copy_n(up.data + row * up.stride, width, up_copy + row * TILE);
  }
  chunk<Type, act, gated, counted, T>(
      {gate_copy, TILE}, {up_copy, TILE}, {h_copy, TILE}, rows, TILE, sums);
  for (int64_t row = 0; row < rows; ++row)
    std::copy_n(h_copy + row * TILE, width, h.data + row * h.stride);
}

template <typename Type>
static void write(float* to, const double* from, int64_t width) {
  constexpr int64_t pair = 2 * sizeof(typename Type::Vector) / sizeof(typename Type::Vector{}[0]);
  for (int64_t group = 0; group < width; group += pair)
    for (int64_t lane = 0; lane < pair; ++lane) {
      const int64_t column = group + Type::column(lane);
      if (column < width) to[column] = static_cast<float>(from[group + lane]);
    }
}

// Columns [begin, begin + width) of the whole problem: whole tiles, or a part of one.
template <typename Type, Act act, bool gated>
static void panel(const Problem& problem, int64_t begin, int64_t width) {
  using T = typename Type::Element;
  PanelSums sums{};

  const auto walk = [&](auto counted, int64_t start, int64_t end) {
    for (int64_t row = start; row < end; row += ROWS) {
      const int64_t rows = std::min(ROWS, end - row);
      const T* gate_data = static_cast<const T*>(problem.gate) + begin;
      const T* up_data = gated ? static_cast<const T*>(problem.up) + begin : gate_data;
      const int64_t up_stride = gated ? problem.up_stride : problem.gate_stride;
      const Rows<const T> gate{gate_data + row * problem.gate_stride, problem.gate_stride};
      const Rows<const T> up{up_data + row * up_stride, up_stride};
      const Rows<T> h{
          static_cast<T*>(problem.h) + row * problem.width + begin, problem.width};
      if (width % TILE == 0)
        chunk<Type, act, gated, counted.value>(gate, up, h, rows, width, sums);
      else
        padded_chunk<Type, act, gated, counted.value>(gate, up, h, rows, width, sums);
    }
  };

  int64_t done = 0;
  for (int64_t p = 0; p < problem.prompts; ++p) {
    const int64_t start = problem.spans[2 * p], end = problem.spans[2 * p + 1];
    std::fill_n(sums.prompt_abs, PANEL, 0.0);
    std::fill_n(sums.prompt_squares, PANEL, 0.0);
    walk(std::false_type{}, done, start);
    walk(std::true_type{}, start, end);
    float* abs_sums = problem.prompt_stats + p * problem.width + begin;
    write<Type>(abs_sums, sums.prompt_abs, width);
    write<Type>(abs_sums + problem.prompts * problem.width, sums.prompt_squares, width);
    done = end;
  }
  walk(std::false_type{}, done, problem.tokens);
  float* stats = problem.token_stats + begin;
  for (const double* row : {sums.sum, sums.max_abs, sums.active}) {
    write<Type>(stats, row, width);
    stats += problem.width;
  }
}

template <typename Type, Act act>
static PanelKernel panel_for(bool gated) {
  return gated ? panel<Type, act, true> : panel<Type, act, false>;
}

template <typename Type>
static PanelKernel panel_for(Act act, bool gated) {
  switch (act) {
    case Act::silu: return panel_for<Type, Act::silu>(gated);
    case Act::gelu: return panel_for<Type, Act::gelu>(gated);
    case Act::gelu_tanh: return panel_for<Type, Act::gelu_tanh>(gated);
    case Act::relu: return panel_for<Type, Act::relu>(gated);
    case Act::relu2: return panel_for<Type, Act::relu2>(gated);
  }
  return nullptr;
}

static PanelKernel panel_kernel(ScalarType dtype, Act act, bool gated) {
  switch (dtype) {
    case ScalarType::BFloat16: return panel_for<Bf16>(act, gated);
    case ScalarType::Half: return panel_for<Fp16>(act, gated);
    case ScalarType::Float: return panel_for<Fp32>(act, gated);
    case ScalarType::Double: return panel_for<Fp64>(act, gated);
    default: return nullptr;
  }
}

#undef INLINE
