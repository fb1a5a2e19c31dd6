// Reading, for one instruction set; see read.cpp.
#include "simd.inl"

// The sum of `words` floats, from eight streams far apart: as fast as a core can ask. What does not
// fill a vector of every stream is added one by one.
static float sum_streams(const float* from, int64_t words) {
  constexpr int64_t STREAMS = 8, LANES = sizeof(Float) / sizeof(float);
  const int64_t part = words / STREAMS / LANES * LANES;
  Float sums[STREAMS] = {};
  for (int64_t k = 0; k < part; k += LANES) {
#pragma GCC unroll 8
    for (int64_t s = 0; s < STREAMS; ++s) sums[s] += load_vector<Float>(from + s * part + k);
  }
  Float sum{};
  for (int64_t s = 0; s < STREAMS; ++s) sum += sums[s];
  float total = 0;
  for (int64_t i = 0; i < LANES; ++i) total += sum[i];
  for (int64_t k = STREAMS * part; k < words; ++k) total += from[k];
  return total;
}

#undef INLINE
