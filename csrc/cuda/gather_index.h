// The gather kernels' whole bodies, as functions that also compile as plain C++: gather.cu wraps
// them in __global__ functions, and a test runs them on the CPU over every block and thread.
//
// A body is a sequence of phases. team.phase(f) calls f(thread) for every thread of the block and
// then waits for all of them; what a thread keeps from one phase to the next lies in Private
// variables. What stands between phases is computed from the same values by every thread.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>

#if defined(__CUDACC__)
#define PRUNEKIT_BODY __host__ __device__ __forceinline__
#define PRUNEKIT_UNROLL _Pragma("unroll")
#define PRUNEKIT_ROLLED _Pragma("unroll 1")
#else
#define PRUNEKIT_BODY inline
#define PRUNEKIT_UNROLL
#define PRUNEKIT_ROLLED
#endif

// The test defines these before it includes this file, and sees every access to a matrix.
#if !defined(PRUNEKIT_READS)
#define PRUNEKIT_READS(address, bytes)
#define PRUNEKIT_WRITES(address, bytes)
#endif

namespace prunekit::gather {

constexpr int THREADS = 128;           // a block of every kernel but rows in place
constexpr int STRIP_THREADS = 512;     // a block of rows in place
constexpr int VECTOR = 16;             // bytes of the widest load and store
constexpr int COPIES = 4;              // vectors that a thread has in flight
constexpr int STRIP_BYTES = 64;        // of each row, what one block of rows in place owns
constexpr int DEPTH = 8;               // vectors that a thread of it has in flight
constexpr int EDGE_STRIP_LANES = 8;    // and, of unaligned rows, the threads that share a strip
constexpr int EDGE_DEPTH = 4;          // and the vectors, each put together from two
constexpr int GROUP = 2;               // rows that a block of columns takes at a time
constexpr int ROWS_A_BLOCK = 16;       // of columns: an index entry is read once for all of them
constexpr int ROWS_IN_PLACE = 8;       // fewer, because such a block does all columns of its rows
constexpr int WINDOW_BYTES = 12 << 10; // of a row, what a block of columns can keep at a time

// What the caller has.
struct Matrix {
  void* data;
  int64_t rows, columns, row_stride;  // in elements
};

struct Index {
  const void* entries;
  int64_t count;
  bool wide;  // int64, else int32

  PRUNEKIT_BODY int64_t at(int64_t k) const {
    if (wide) {
      const int64_t* entry = static_cast<const int64_t*>(entries) + k;
      PRUNEKIT_READS(entry, 8);
      return *entry;
    }
    const int32_t* entry = static_cast<const int32_t*>(entries) + k;
    PRUNEKIT_READS(entry, 4);
    return *entry;
  }
};

template <int BYTES>
struct Word;
template <> struct Word<1> { uint8_t bits; };
template <> struct Word<2> { uint16_t bits; };
template <> struct Word<4> { uint32_t bits; };
template <> struct Word<8> { uint64_t bits; };
template <> struct alignas(VECTOR) Word<VECTOR> { uint32_t bits[4]; };

template <typename W>
PRUNEKIT_BODY W load(const char* address) {
  PRUNEKIT_READS(address, static_cast<int>(sizeof(W)));
#if defined(__CUDA_ARCH__)
  return *reinterpret_cast<const W*>(address);
#else
  W word;
  std::memcpy(&word, address, sizeof(W));
  return word;
#endif
}

template <typename W>
PRUNEKIT_BODY void store(char* address, const W& word) {
  PRUNEKIT_WRITES(address, static_cast<int>(sizeof(W)));
#if defined(__CUDA_ARCH__)
  *reinterpret_cast<W*>(address) = word;
#else
  std::memcpy(address, &word, sizeof(W));
#endif
}

// Puts a vector into shared memory, which no other program sees.
template <typename T>
PRUNEKIT_BODY void keep(T* address, const Word<VECTOR>& word) {
#if defined(__CUDA_ARCH__)
  *reinterpret_cast<Word<VECTOR>*>(address) = word;
#else
  std::memcpy(address, &word, VECTOR);
#endif
}

PRUNEKIT_BODY int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PRUNEKIT_BODY int64_t blocks_of(int64_t items, int64_t each) { return (items + each - 1) / each; }

// How many bytes beyond a multiple of a vector.
PRUNEKIT_BODY int beyond_vector(const void* address) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(address) % VECTOR);
}

// Element number `at` of a vector, and a vector from its elements, kept in registers by shifts.
template <typename T>
PRUNEKIT_BODY T element(const Word<VECTOR>& vector, int at) {
  if constexpr (sizeof(T) == 8) {
    return vector.bits[2 * at] | static_cast<uint64_t>(vector.bits[2 * at + 1]) << 32;
  } else {
    constexpr int EACH = 4 / sizeof(T);
    return static_cast<T>(vector.bits[at / EACH] >> at % EACH * 8 * static_cast<int>(sizeof(T)));
  }
}

template <typename T>
PRUNEKIT_BODY void put(Word<VECTOR>& vector, int at, T value) {
  if constexpr (sizeof(T) == 8) {
    vector.bits[2 * at] = static_cast<uint32_t>(value);
    vector.bits[2 * at + 1] = static_cast<uint32_t>(value >> 32);
  } else {
    constexpr int EACH = 4 / sizeof(T);
    const uint32_t bits = static_cast<uint32_t>(value)
                          << at % EACH * 8 * static_cast<int>(sizeof(T));
    vector.bits[at / EACH] = at % EACH ? vector.bits[at / EACH] | bits : bits;
  }
}

// ---- Bytes that lie anywhere. A run goes where its destination's own vectors are: each of them is
// stored whole but at the two ends, and is put together from the two vectors of the source that it
// straddles. Nothing outside of the run is read, so where one of these would reach out of it, the
// words do that lie within. ---------------------------------------------------------------------

// The vector that begins `slip` bytes into low and ends in high, slip being a multiple of WORD.
template <int WORD>
PRUNEKIT_BODY Word<VECTOR> straddling(
    const Word<VECTOR>& low, const Word<VECTOR>& high, int slip) {
  uint32_t bits[8] = {low.bits[0], low.bits[1], low.bits[2], low.bits[3],
                      high.bits[0], high.bits[1], high.bits[2], high.bits[3]};
  PRUNEKIT_UNROLL
  for (int i = 0; i < 6; ++i) bits[i] = slip & 8 ? bits[i + 2] : bits[i];
  PRUNEKIT_UNROLL
  for (int i = 0; i < 5; ++i) bits[i] = slip & 4 ? bits[i + 1] : bits[i];
  Word<VECTOR> vector;
  PRUNEKIT_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint64_t both = bits[i] | static_cast<uint64_t>(bits[i + 1]) << 32;
    vector.bits[i] = WORD < 4 ? static_cast<uint32_t>(both >> slip % 4 * 8) : bits[i];
  }
  return vector;
}

// `bytes` bytes to move, in words of WORD, which divides both addresses and the length.
template <int WORD>
struct Run {
  const char* from;
  char* to;
  int64_t bytes;

  // Where the destination's vector number `vector` begins, in the run or just before it.
  PRUNEKIT_BODY int64_t at(int64_t vector) const { return vector * VECTOR - beyond_vector(to); }

  // How far into one of its vectors the source is where the destination begins one.
  PRUNEKIT_BODY int slip() const { return beyond_vector(from + at(0)); }

  // Whether the source's vectors that hold this one of the destination lie within the run.
  PRUNEKIT_BODY bool by_vectors(int64_t at) const {
    if (WORD == 8 && slip() != 0) return false;  // its two words are as quick
    return at >= slip() && at - slip() + (slip() ? 2 * VECTOR : VECTOR) <= bytes;
  }

  PRUNEKIT_BODY void load_vectors(int64_t at, Word<VECTOR>& low, Word<VECTOR>& high) const {
    const char* start = from + at - slip();
    low = load<Word<VECTOR>>(start);
    if (slip() != 0) high = load<Word<VECTOR>>(start + VECTOR);
  }

  PRUNEKIT_BODY Word<VECTOR> load_words(int64_t at) const {
    Word<VECTOR> vector;
    PRUNEKIT_UNROLL
    for (int i = 0; i < VECTOR / WORD; ++i) {
      const int64_t word = at + i * WORD;
      decltype(Word<WORD>::bits) bits = 0;
      if (word >= 0 && word < bytes) bits = load<Word<WORD>>(from + word).bits;
      put(vector, i, bits);
    }
    return vector;
  }

  PRUNEKIT_BODY void store_at(int64_t at, const Word<VECTOR>& vector) const {
    if (at >= 0 && at + VECTOR <= bytes) {
      store(to + at, vector);
      return;
    }
    PRUNEKIT_UNROLL
    for (int i = 0; i < VECTOR / WORD; ++i) {
      const int64_t word = at + i * WORD;
      if (word >= 0 && word < bytes)
        store(to + word, Word<WORD>{element<decltype(Word<WORD>::bits)>(vector, i)});
    }
  }
};

// Loads one vector of each run: those of whole vectors are all on their way before one is used.
template <int WORD, int N>
PRUNEKIT_BODY void load_runs(
    const Run<WORD> (&run)[N], const int64_t (&at)[N], Word<VECTOR> (&held)[N]) {
  Word<VECTOR> high[N];
  PRUNEKIT_UNROLL
  for (int i = 0; i < N; ++i)
    if (run[i].by_vectors(at[i])) run[i].load_vectors(at[i], held[i], high[i]);
  PRUNEKIT_UNROLL
  for (int i = 0; i < N; ++i) {
    if (!run[i].by_vectors(at[i]))
      held[i] = run[i].load_words(at[i]);
    else if (run[i].slip() != 0)
      held[i] = straddling<WORD>(held[i], high[i], run[i].slip());
  }
}

// ---- Rows: a row is a run of bytes, whatever its elements mean. ---------------------------------

struct RowJob {
  const char* from;
  char* to;
  int64_t from_stride, to_stride;  // bytes
  Index index;
  int word;           // bytes, dividing every address, stride and width; a vector: aligned rows
  int64_t words;      // of a row
  int lane_bits;      // 2^lane_bits threads share a row
  int64_t across;     // blocks beside each other along a row
  int64_t blocks;
  int64_t strip;      // of unaligned rows in place: bytes of each row that a block owns,
  int lead;           // and how many of the first strip's lie before the row
};

// The widest word that divides all of these, at most `most` bytes.
inline int widest_word(uint64_t of_all, int most) {
  int word = most;
  while (of_all % word != 0) word /= 2;
  return word;
}

// Shares rows out to threads, by the vectors of the destination that a row lies in, at most.
inline void share_rows(RowJob& job, int word) {
  const int64_t bytes = job.words * job.word;
  job.word = word;
  job.words = bytes / word;
  const int lead = job.to_stride % VECTOR == 0 ? beyond_vector(job.to) : VECTOR - word;
  const int64_t vectors = blocks_of(bytes + lead, VECTOR);
  job.lane_bits = 0;
  while (1 << job.lane_bits < THREADS && int64_t{COPIES} << job.lane_bits < vectors)
    ++job.lane_bits;
  job.across = blocks_of(vectors, int64_t{COPIES} << job.lane_bits);
  job.blocks = job.across * blocks_of(job.index.count, THREADS >> job.lane_bits);
}

inline RowJob plan_rows(
    const Matrix& to, const Matrix& from, const Index& index, int element_size) {
  RowJob job{static_cast<const char*>(from.data), static_cast<char*>(to.data),
             from.row_stride * element_size, to.row_stride * element_size, index, 1, 0, 0, 0, 0,
             0, 0};
  const int64_t bytes = from.columns * element_size;
  if (bytes == 0 || index.count == 0) return job;
  const uint64_t addresses = reinterpret_cast<uint64_t>(job.from) |
                             reinterpret_cast<uint64_t>(job.to);
  job.words = bytes;
  share_rows(job, widest_word(addresses | job.from_stride | job.to_stride | bytes, VECTOR));
  return job;
}

// A thread copies COPIES vectors of one row: all are on their way before the first is stored.
template <int WORD, typename Team>
PRUNEKIT_BODY void rows_block(Team& team, const RowJob& job, uint32_t block) {
  const uint32_t across = static_cast<uint32_t>(job.across);
  const int64_t first_row = static_cast<int64_t>(block / across) * (THREADS >> job.lane_bits);
  const int64_t first_vector = static_cast<int64_t>(block % across) * COPIES << job.lane_bits;
  team.phase([&](int thread) {
    const int lane = thread & ((1 << job.lane_bits) - 1);
    const int64_t row = first_row + (thread >> job.lane_bits);
    if (row >= job.index.count) return;
    const char* from = job.from + job.index.at(row) * job.from_stride;
    char* to = job.to + row * job.to_stride;
    Word<VECTOR> held[COPIES];
    if constexpr (WORD == VECTOR) {
      PRUNEKIT_UNROLL
      for (int i = 0; i < COPIES; ++i) {
        const int64_t at = first_vector + lane + (int64_t{i} << job.lane_bits);
        if (at < job.words) held[i] = load<Word<VECTOR>>(from + at * VECTOR);
      }
      PRUNEKIT_UNROLL
      for (int i = 0; i < COPIES; ++i) {
        const int64_t at = first_vector + lane + (int64_t{i} << job.lane_bits);
        if (at < job.words) store(to + at * VECTOR, held[i]);
      }
    } else {
      Run<WORD> run[COPIES];
      int64_t at[COPIES];
      PRUNEKIT_UNROLL
      for (int i = 0; i < COPIES; ++i) {
        run[i] = {from, to, job.words * WORD};
        at[i] = run[i].at(first_vector + lane + (int64_t{i} << job.lane_bits));
      }
      load_runs(run, at, held);
      PRUNEKIT_UNROLL
      for (int i = 0; i < COPIES; ++i) run[i].store_at(at[i], held[i]);
    }
  });
}

// ---- Rows in place. A block owns a strip of STRIP_BYTES of every row; no other block reads or
// writes there, so blocks may run in any order. Within its strip it takes the positions of the
// index in batches of B, ascending: all rows of a batch are read, then all are written.
//
// Nothing is read after it was overwritten: the index ascends strictly from index[0] >= 0, hence
// index[k] >= k. Batch b writes rows below (b + 1)·B. Any later batch reads rows index[k] with
// k >= (b + 1)·B, hence at or beyond (b + 1)·B. Within a batch the phases separate reads from
// writes. ------------------------------------------------------------------------------------

inline RowJob plan_rows_in_place(const Matrix& matrix, const Index& index, int element_size) {
  RowJob job = plan_rows(matrix, matrix, index, element_size);
  if (job.blocks == 0) return job;
  job.strip = STRIP_BYTES;
  if (job.word != VECTOR) {
    // Rows that lie alike have strips of whole vectors; of others, a strip ends within vectors,
    // and is so much narrower that its lanes reach all of those it lies in.
    const bool alike = job.to_stride % VECTOR == 0;
    job.strip = (alike ? EDGE_STRIP_LANES : EDGE_STRIP_LANES - 1) * VECTOR;
    job.lead = alike ? beyond_vector(job.to) : 0;
  }
  job.blocks = blocks_of(job.words * job.word + job.lead, job.strip);
  return job;
}

template <typename Team>
PRUNEKIT_BODY void strip_of_vectors(Team& team, const RowJob& job, uint32_t block) {
  constexpr int LANES = STRIP_BYTES / VECTOR;
  constexpr int ROWS = STRIP_THREADS / LANES;
  typename Team::template Private<Word<VECTOR>[DEPTH]> held;
  for (int64_t batch = 0; batch < job.index.count; batch += ROWS * DEPTH) {
    team.phase([&](int thread) {
      // Beyond the end the last vector is read again, and not stored: no load waits for a branch.
      const int64_t at =
          smaller(static_cast<int64_t>(block) * LANES + thread % LANES, job.words - 1);
      int64_t from[DEPTH];
      PRUNEKIT_UNROLL
      for (int i = 0; i < DEPTH; ++i)
        from[i] = job.index.at(smaller(batch + i * ROWS + thread / LANES, job.index.count - 1));
      PRUNEKIT_UNROLL
      for (int i = 0; i < DEPTH; ++i)
        held[thread][i] = load<Word<VECTOR>>(job.from + from[i] * job.from_stride + at * VECTOR);
    });
    team.phase([&](int thread) {
      const int64_t at = static_cast<int64_t>(block) * LANES + thread % LANES;
      PRUNEKIT_UNROLL
      for (int i = 0; i < DEPTH; ++i) {
        const int64_t row = batch + i * ROWS + thread / LANES;
        if (at < job.words && row < job.index.count)
          store(job.to + row * job.to_stride + at * VECTOR, held[thread][i]);
      }
    });
  }
}

// The same of unaligned rows: what a block owns of a row is a run.
template <int WORD, typename Team>
PRUNEKIT_BODY void strip_of_runs(Team& team, const RowJob& job, uint32_t block) {
  constexpr int LANES = EDGE_STRIP_LANES;
  constexpr int ROWS = STRIP_THREADS / LANES;
  const int64_t start = static_cast<int64_t>(block) * job.strip - job.lead;
  const int64_t begin = start < 0 ? 0 : start;
  const int64_t bytes = smaller(start + job.strip, job.words * WORD) - begin;
  typename Team::template Private<Word<VECTOR>[EDGE_DEPTH]> held;
  for (int64_t batch = 0; batch < job.index.count; batch += ROWS * EDGE_DEPTH) {
    team.phase([&](int thread) {
      Run<WORD> run[EDGE_DEPTH];
      int64_t at[EDGE_DEPTH];
      PRUNEKIT_UNROLL
      for (int i = 0; i < EDGE_DEPTH; ++i) {
        const int64_t row = smaller(batch + i * ROWS + thread / LANES, job.index.count - 1);
        run[i] = {job.from + job.index.at(row) * job.from_stride + begin,
                  job.to + row * job.to_stride + begin, bytes};
        at[i] = run[i].at(thread % LANES);
      }
      load_runs(run, at, held[thread]);
    });
    team.phase([&](int thread) {
      PRUNEKIT_UNROLL
      for (int i = 0; i < EDGE_DEPTH; ++i) {
        const int64_t row = batch + i * ROWS + thread / LANES;
        const Run<WORD> run{nullptr, job.to + row * job.to_stride + begin, bytes};
        if (row < job.index.count) run.store_at(run.at(thread % LANES), held[thread][i]);
      }
    });
  }
}

template <int WORD, typename Team>
PRUNEKIT_BODY void rows_in_place_block(Team& team, const RowJob& job, uint32_t block) {
  if constexpr (WORD == VECTOR)
    strip_of_vectors(team, job, block);
  else
    strip_of_runs<WORD>(team, job, block);
}

// ---- Columns. A block makes a tile of the output, THREADS vectors wide. From half of the columns
// on, the picked ones touch nearly every 32-byte sector, so the block reads the window from the
// tile's lowest column to its highest whole, in vectors, into shared memory, and picks there. Of an
// ascending index the windows of a row's tiles do not overlap: b·R·(C + K) bytes move. A window
// that does not fit (fewer than about one column in six is kept, or the order is arbitrary) is not
// read: its columns are picked from global memory.
//
// In place, a block does all tiles of its rows, ascending, and no other block touches those rows.
// A tile's columns are all read before its first is written (the phases), and as above, with
// columns for rows, a later tile picks only columns at or beyond what was written. The vectors that
// bring its window may begin up to a vector earlier: those elements are read and never picked. ----

template <typename T>
struct ColumnShared {
  static constexpr int WINDOW = WINDOW_BYTES / sizeof(T);
  alignas(VECTOR) T window[GROUP][WINDOW];
  int32_t low[THREADS], high[THREADS];
};

struct ColumnJob {
  const char* from;
  char* to;
  int64_t from_stride, to_stride;  // bytes
  Index index;
  int64_t rows, columns;
  bool vector_in, vector_out;  // addresses and strides are multiples of a vector
  int64_t rows_a_block;
  int64_t tiles;   // of the output, along a row
  int64_t across;  // blocks beside each other along a row: one for each tile, or one for all
  int64_t blocks;
};

template <int ELEMENT>
constexpr int elements_of_vector = VECTOR / ELEMENT;

inline ColumnJob plan_columns(
    const Matrix& to, const Matrix& from, const Index& index, int element_size, bool in_place) {
  ColumnJob job{static_cast<const char*>(from.data), static_cast<char*>(to.data),
                from.row_stride * element_size, to.row_stride * element_size, index,
                from.rows, from.columns, false, false, 0, 0, 0, 0};
  if (index.count == 0 || from.rows == 0) return job;
  job.vector_in = (reinterpret_cast<uint64_t>(job.from) | job.from_stride) % VECTOR == 0;
  job.vector_out = (reinterpret_cast<uint64_t>(job.to) | job.to_stride) % VECTOR == 0;
  job.rows_a_block = in_place ? ROWS_IN_PLACE : ROWS_A_BLOCK;
  job.tiles = blocks_of(index.count, THREADS * (VECTOR / element_size));
  job.across = in_place ? 1 : job.tiles;
  job.blocks = job.across * blocks_of(from.rows, job.rows_a_block);
  return job;
}

// Where a thread's element `at` of a tile goes: neighbours of one vector, or, where vectors cannot
// be stored, neighbours of the next thread's.
template <typename T>
PRUNEKIT_BODY int64_t position_of(const ColumnJob& job, int64_t tile, int thread, int at) {
  constexpr int N = elements_of_vector<sizeof(T)>;
  return tile * THREADS * N + (job.vector_out ? thread * N + at : at * THREADS + thread);
}

// The columns that a tile's window holds: [start, end), start being a vector's first column.
struct Window {
  int32_t start, end;
  bool kept;  // in shared memory
};

template <typename T>
PRUNEKIT_BODY void read_window(
    const ColumnJob& job, const Window& window, int64_t row, int rows, int thread,
    ColumnShared<T>& shared) {
  constexpr int N = elements_of_vector<sizeof(T)>;
  const char* from = job.from + row * job.from_stride + window.start * int64_t{sizeof(T)};
  int whole = 0;  // vectors that lie within the row
  if (job.vector_in)
    whole = static_cast<int>(smaller(blocks_of(window.end - window.start, N),
                                     (job.columns - window.start) / N));
  PRUNEKIT_ROLLED
  for (int vector = thread; vector < whole; vector += 2 * THREADS) {
    Word<VECTOR> held[2][GROUP];
    PRUNEKIT_UNROLL
    for (int i = 0; i < 2 * GROUP; ++i) {
      const int at = vector + i / GROUP * THREADS;
      if (at < whole && i % GROUP < rows)
        held[i / GROUP][i % GROUP] =
            load<Word<VECTOR>>(from + i % GROUP * job.from_stride + int64_t{at} * VECTOR);
    }
    PRUNEKIT_UNROLL
    for (int i = 0; i < 2 * GROUP; ++i) {
      const int at = vector + i / GROUP * THREADS;
      if (at < whole && i % GROUP < rows)
        keep(&shared.window[i % GROUP][at * N], held[i / GROUP][i % GROUP]);
    }
  }
  PRUNEKIT_ROLLED
  for (int at = whole * N + thread; at < window.end - window.start; at += THREADS) {
    PRUNEKIT_UNROLL
    for (int i = 0; i < GROUP; ++i)
      if (i < rows)
        shared.window[i][at] =
            load<Word<sizeof(T)>>(from + i * job.from_stride + at * int64_t{sizeof(T)}).bits;
  }
}

// Fills a vector with what `read` finds at a thread's columns.
template <typename T, int N, typename Read>
PRUNEKIT_BODY void pick(const int32_t (&column)[N], Word<VECTOR>& held, const Read& read) {
  PRUNEKIT_UNROLL
  for (int i = 0; i < N; ++i) put<T>(held, i, read(column[i]));
}

template <typename T, typename Team>
PRUNEKIT_BODY void columns_block(
    Team& team, const ColumnJob& job, uint32_t block, ColumnShared<T>& shared) {
  constexpr int N = elements_of_vector<sizeof(T)>;
  constexpr int FOLD = 8;
  const uint32_t across = static_cast<uint32_t>(job.across);
  const int64_t first_row = static_cast<int64_t>(block / across) * job.rows_a_block;
  const int64_t last_row = smaller(first_row + job.rows_a_block, job.rows);
  const int64_t tiles = job.tiles / across;  // of this block: one, or all
  typename Team::template Private<int32_t[N]> column;
  typename Team::template Private<Word<VECTOR>[GROUP]> held;

  for (int64_t tile = block % across, last = tile + tiles; tile < last; ++tile) {
    team.phase([&](int thread) {
      int32_t low = INT32_MAX, high = -1;
      PRUNEKIT_UNROLL
      for (int i = 0; i < N; ++i) {
        // Beyond the end the last column is picked again, and not stored.
        const int64_t k = smaller(position_of<T>(job, tile, thread, i), job.index.count - 1);
        const int32_t at = static_cast<int32_t>(job.index.at(k));
        column[thread][i] = at;
        low = at < low ? at : low;
        high = at > high ? at : high;
      }
      shared.low[thread] = low;
      shared.high[thread] = high;
    });
    team.phase([&](int thread) {
      if (thread >= THREADS / FOLD) return;
      for (int i = thread * FOLD + 1; i < (thread + 1) * FOLD; ++i) {
        int32_t &low = shared.low[thread * FOLD], &high = shared.high[thread * FOLD];
        low = shared.low[i] < low ? shared.low[i] : low;
        high = shared.high[i] > high ? shared.high[i] : high;
      }
    });
    int32_t low = INT32_MAX, high = -1;
    for (int i = 0; i < THREADS; i += FOLD) {
      low = shared.low[i] < low ? shared.low[i] : low;
      high = shared.high[i] > high ? shared.high[i] : high;
    }
    const int32_t start = low / N * N;
    const Window window{start, high + 1, high - start < ColumnShared<T>::WINDOW};

    PRUNEKIT_ROLLED
    for (int64_t row = first_row; row < last_row; row += GROUP) {
      const int rows = static_cast<int>(smaller(GROUP, last_row - row));
      team.phase([&](int thread) {
        if (window.kept) read_window(job, window, row, rows, thread, shared);
      });
      team.phase([&](int thread) {
        PRUNEKIT_UNROLL
        for (int r = 0; r < GROUP; ++r) {
          if (r >= rows) continue;
          if (window.kept)
            pick<T>(column[thread], held[thread][r], [&](int32_t from) {
              return shared.window[r][from - window.start];
            });
          else
            pick<T>(column[thread], held[thread][r], [&](int32_t from) {
              return load<Word<sizeof(T)>>(job.from + (row + r) * job.from_stride +
                                           from * int64_t{sizeof(T)})
                  .bits;
            });
        }
      });
      team.phase([&](int thread) {
        const int64_t first = position_of<T>(job, tile, thread, 0);
        const bool whole = job.vector_out && first + N <= job.index.count;
        PRUNEKIT_UNROLL
        for (int r = 0; r < GROUP; ++r) {
          if (r >= rows) continue;
          char* to = job.to + (row + r) * job.to_stride;
          if (whole) {
            store(to + first * int64_t{sizeof(T)}, held[thread][r]);
            continue;
          }
          PRUNEKIT_UNROLL
          for (int i = 0; i < N; ++i) {
            const int64_t k = position_of<T>(job, tile, thread, i);
            if (k < job.index.count)
              store(to + k * int64_t{sizeof(T)},
                    Word<sizeof(T)>{element<T>(held[thread][r], i)});
          }
        }
      });
    }
  }
}

// ---- One layer: the columns of down first, whose blocks take longest, then the rows. ------------

struct MlpJob {
  ColumnJob down;
  RowJob gate, up;
  bool vectors;  // rows move in vectors, else in elements
};

inline MlpJob plan_mlp(
    const Matrix& gate_to, const Matrix& gate, const Matrix& up_to, const Matrix& up,
    const Matrix& down_to, const Matrix& down, const Index& index, int element_size) {
  MlpJob job{plan_columns(down_to, down, index, element_size, false),
             plan_rows(gate_to, gate, index, element_size), {}, false};
  if (up.data != nullptr) job.up = plan_rows(up_to, up, index, element_size);
  job.vectors = job.gate.word == VECTOR && (up.data == nullptr || job.up.word == VECTOR);
  if (!job.vectors) {  // one word for both, which the kernel knows when it is compiled
    for (RowJob* rows : {&job.gate, &job.up})
      if (rows->blocks != 0) share_rows(*rows, element_size);
  }
  return job;
}

template <typename T, typename Team>
PRUNEKIT_BODY void mlp_block(
    Team& team, const MlpJob& job, uint32_t block, ColumnShared<T>& shared) {
  const uint32_t down = static_cast<uint32_t>(job.down.blocks);
  const uint32_t gate = static_cast<uint32_t>(job.gate.blocks);
  if (block < down) {
    columns_block<T>(team, job.down, block, shared);
  } else if (block < down + gate) {
    if (job.vectors)
      rows_block<VECTOR>(team, job.gate, block - down);
    else
      rows_block<sizeof(T)>(team, job.gate, block - down);
  } else {
    if (job.vectors)
      rows_block<VECTOR>(team, job.up, block - down - gate);
    else
      rows_block<sizeof(T)>(team, job.up, block - down - gate);
  }
}

}  // namespace prunekit::gather
