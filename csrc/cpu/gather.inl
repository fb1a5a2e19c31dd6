// One row of gather_cols, for one instruction set; see gather.cpp for the whole.

#if PRUNEKIT_VECTOR_BYTES == 64

static inline __m512i packed(uint64_t mask, __m512i v, uint8_t) {
  return _mm512_maskz_compress_epi8(mask, v);
}
static inline __m512i packed(uint64_t mask, __m512i v, uint16_t) {
  return _mm512_maskz_compress_epi16(static_cast<__mmask32>(mask), v);
}
static inline __m512i packed(uint64_t mask, __m512i v, uint32_t) {
  return _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), v);
}
static inline __m512i packed(uint64_t mask, __m512i v, uint64_t) {
  return _mm512_maskz_compress_epi64(static_cast<__mmask8>(mask), v);
}

// Packs what stays of each vector, and meanwhile fetches the next row. A whole vector is stored
// each time; the next store overwrites what of it is not wanted.
template <typename T>
static void pack_row(void* to, const void* from, const void* next, const Columns& columns) {
  const T* x = static_cast<const T*>(from);
  T* out = static_cast<T*>(to);
  for (const Block& block : columns.blocks) {
    __builtin_prefetch(static_cast<const T*>(next) + block.column);
    _mm512_storeu_si512(out + block.position,
                        packed(block.mask, _mm512_loadu_si512(x + block.column), T{}));
  }
  for (size_t k = columns.rest; k < columns.index.size(); ++k) out[k] = x[columns.index[k]];
}

#endif

// Follows the index, and meanwhile fetches the next row, one cache line for each GROUP elements:
// all of its lines where half of the columns stay.
template <typename T>
static void index_row(void* to, const void* from, const void* next, const Columns& columns) {
  constexpr size_t GROUP = 32 / sizeof(T);
  const T* x = static_cast<const T*>(from);
  T* out = static_cast<T*>(to);
  const int32_t* index = columns.index.data();
  const size_t count = columns.index.size();
  size_t k = 0;
  for (; k + GROUP <= count; k += GROUP) {
    __builtin_prefetch(static_cast<const T*>(next) + 2 * k);
#pragma GCC unroll 32
    for (size_t i = k; i < k + GROUP; ++i) out[i] = x[index[i]];
  }
  for (; k < count; ++k) out[k] = x[index[k]];
}

template <typename T>
static RowKernel row_kernel_for([[maybe_unused]] const Columns& columns) {
#if PRUNEKIT_VECTOR_BYTES == 64
  if (!columns.blocks.empty()) return pack_row<T>;
#endif
  return index_row<T>;
}

static RowKernel row_kernel(size_t element_size, const Columns& columns) {
  switch (element_size) {
    case 1: return row_kernel_for<uint8_t>(columns);
    case 2: return row_kernel_for<uint16_t>(columns);
    case 4: return row_kernel_for<uint32_t>(columns);
    case 8: return row_kernel_for<uint64_t>(columns);
    default: return nullptr;
  }
}
