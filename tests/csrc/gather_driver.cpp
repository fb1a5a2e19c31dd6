// Runs the bodies of the CUDA gather kernels over every block and thread, in shuffled order, and
// watches each access: gather_driver KIND [BUG [SEEN]]. Prints what went wrong, up to a problem
// that SEEN is part of; the exit status says whether anything did.
//
// A block's phases are run one after another, the threads of each in random order; blocks run in
// random order, and in place none may touch a byte that another touched.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <vector>

static void on_read(const void* address, int bytes);
static void on_write(const void* address, int bytes);
#define PRUNEKIT_READS(address, bytes) on_read(address, bytes)
#define PRUNEKIT_WRITES(address, bytes) on_write(address, bytes)
#include "../../csrc/cuda/gather_index.h"

using namespace prunekit::gather;

namespace {

std::mt19937_64 random_bits(1);
std::string current;                  // the case that runs
std::map<std::string, int> problems;  // and how often each was met

int64_t below(int64_t limit) { return static_cast<int64_t>(random_bits() % limit); }

void problem(const std::string& what) {
  if (problems[what]++ == 0) std::printf("%s: %s\n", current.c_str(), what.c_str());
}

struct Stray {};

// All memory that a kernel may know of, and what it may do and did with each byte.
struct Arena {
  std::vector<char> storage = std::vector<char>((3 << 20) + 64);
  int64_t used = 0, size = 3 << 20;
  std::vector<uint8_t> readable = std::vector<uint8_t>(size), writable = readable,
                       written = readable;
  std::vector<int32_t> owner = std::vector<int32_t>(size, -1);
  char* start = nullptr;
  int64_t read_bytes = 0, index_bytes = 0, written_bytes = 0, index_start = 0, index_end = 0;
  int64_t reads = 0, writes = 0;  // of the matrices
  int32_t block = 0;
  bool in_place = false, strips = false;

  Arena() {
    start = storage.data() + (64 - reinterpret_cast<uintptr_t>(storage.data()) % 64) % 64;
  }

  void clear() {
    for (auto* flags : {&readable, &writable, &written})
      std::fill_n(flags->begin(), used, 0);
    std::fill_n(owner.begin(), used, -1);
    used = 128;
    read_bytes = index_bytes = written_bytes = reads = writes = 0;
  }

  char* take(int64_t bytes, int64_t misalignment) {
    char* place = start + used + misalignment;
    used += (bytes + misalignment + 255) / 64 * 64;
    if (used > size) std::abort();
    return place;
  }

  void allow(std::vector<uint8_t>& flags, const void* address, int64_t bytes) {
    std::fill_n(flags.begin() + (static_cast<const char*>(address) - start), bytes, 1);
  }

  // The access as an offset; a case ends where the kernel may not make it.
  int64_t checked(const void* address, int bytes, const std::vector<uint8_t>& flags,
                  const char* what) {
    if (reinterpret_cast<uintptr_t>(address) % bytes != 0)
      problem(std::string(what) + " is not aligned");
    const int64_t at = static_cast<const char*>(address) - start;
    for (int64_t i = at; i < at + bytes; ++i)
      if (i < 0 || i >= size || !flags[i]) {
        problem(std::string(what) + " outside of the matrix");
        throw Stray{};
      }
    return at;
  }

  void own(int64_t at, int bytes) {
    for (int64_t i = at; i < at + bytes; ++i) {
      if (owner[i] >= 0 && owner[i] != block) problem("two blocks touch one byte in place");
      owner[i] = block;
    }
  }
} arena;

// The block's threads, one after another in an order of their own in each phase.
struct Team {
  static constexpr int MOST = STRIP_THREADS;
  std::vector<int> order;

  template <typename V>
  struct Private {
    std::vector<char> bytes = std::vector<char>(MOST * sizeof(V) + 64, char(0x5a));
    V& operator[](int thread) {
      char* aligned = bytes.data() + (64 - reinterpret_cast<uintptr_t>(bytes.data()) % 64) % 64;
      return reinterpret_cast<V*>(aligned)[thread];
    }
  };

  explicit Team(int threads) : order(threads) { std::iota(order.begin(), order.end(), 0); }

  template <typename Phase>
  void phase(const Phase& run) {
    std::shuffle(order.begin(), order.end(), random_bits);
    for (int thread : order) run(thread);
  }
};

struct Case {
  int64_t rows, columns, kept;
  int element, misaligned_from, misaligned_to, from_padding, to_padding;
  bool wide, ascending;
};

std::vector<int64_t> make_index(const Case& c, int64_t limit) {
  std::vector<int64_t> index(c.kept);
  if (c.ascending) {
    std::vector<int64_t> all(limit);
    std::iota(all.begin(), all.end(), 0);
    std::shuffle(all.begin(), all.end(), random_bits);
    std::copy_n(all.begin(), c.kept, index.begin());
    std::sort(index.begin(), index.end());
  } else {
    for (int64_t& i : index) i = below(limit);
  }
  return index;
}

Index place_index(const Case& c, const std::vector<int64_t>& index) {
  const int64_t bytes = index.size() * (c.wide ? 8 : 4);
  char* place = arena.take(bytes, 0);
  arena.index_start = place - arena.start;
  arena.index_end = arena.index_start + bytes;
  arena.allow(arena.readable, place, bytes);
  for (size_t k = 0; k < index.size(); ++k) {
    const int32_t narrow = static_cast<int32_t>(index[k]);
    if (c.wide)
      std::memcpy(place + 8 * k, &index[k], 8);
    else
      std::memcpy(place + 4 * k, &narrow, 4);
  }
  return Index{place, static_cast<int64_t>(index.size()), c.wide};
}

Matrix place_matrix(int64_t rows, int64_t columns, int64_t padding, int element, int misaligned) {
  const int64_t stride = columns + padding;
  return {arena.take(rows * stride * element, misaligned * element), rows, columns, stride};
}

void allow(std::vector<uint8_t>& flags, const Matrix& m, int element) {
  for (int64_t r = 0; r < m.rows; ++r)
    arena.allow(flags, static_cast<char*>(m.data) + r * m.row_stride * element,
                m.columns * element);
}

void fill(const Matrix& m, int element) {
  char* bytes = static_cast<char*>(m.data);
  for (int64_t i = 0; i < m.rows * m.row_stride * element; ++i) bytes[i] = char(random_bits());
}

std::vector<char> copy_of(const Matrix& m, int element) {
  const char* bytes = static_cast<const char*>(m.data);
  return {bytes, bytes + m.rows * m.row_stride * element};
}

// Each byte of the result was written once, and is what the definition says.
void check_result(const Matrix& to, const Matrix& from, const std::vector<char>& before,
                  const std::vector<int64_t>& index, int element, bool columns) {
  for (int64_t r = 0; r < to.rows; ++r)
    for (int64_t c = 0; c < to.columns; ++c) {
      const int64_t source = columns ? r * from.row_stride + index[c]
                                     : index[r] * from.row_stride + c;
      const char* at = static_cast<char*>(to.data) + (r * to.row_stride + c) * element;
      if (std::memcmp(at, &before[source * element], element) != 0) problem("a wrong value");
      for (int b = 0; b < element; ++b) {
        const uint8_t times = arena.written[at + b - arena.start];
        if (times != 1) problem(times ? "a byte written twice" : "a byte not written");
      }
    }
}

template <typename Body>
void each_block(int64_t blocks, int threads, const Body& body) {
  std::vector<uint32_t> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random_bits);
  for (uint32_t block : order) {
    arena.block = static_cast<int32_t>(block);
    Team team(threads);
    body(team, block);
  }
}

template <typename Job, typename Run>
void with_word(int word, const Job& job, int threads, const Run& run) {
  each_block(job.blocks, threads, [&](Team& team, uint32_t block) {
    switch (word) {
      case 1: return run(std::integral_constant<int, 1>{}, team, block);
      case 2: return run(std::integral_constant<int, 2>{}, team, block);
      case 4: return run(std::integral_constant<int, 4>{}, team, block);
      case 8: return run(std::integral_constant<int, 8>{}, team, block);
      default: return run(std::integral_constant<int, 16>{}, team, block);
    }
  });
}

template <typename Run>
void with_element(int element, const Run& run) {
  switch (element) {
    case 1: return run(uint8_t{});
    case 2: return run(uint16_t{});
    case 4: return run(uint32_t{});
    default: return run(uint64_t{});
  }
}

void run_rows(const RowJob& job) {
  with_word(job.word, job, THREADS, [&](auto word, Team& team, uint32_t block) {
    rows_block<word()>(team, job, block);
  });
}

void run_rows_in_place(const RowJob& job) {
  with_word(job.word, job, STRIP_THREADS, [&](auto word, Team& team, uint32_t block) {
    rows_in_place_block<word()>(team, job, block);
  });
}

void run_columns(const ColumnJob& job, int element) {
  with_element(element, [&](auto value) {
    using T = decltype(value);
    static ColumnShared<T> shared;
    std::memset(static_cast<void*>(&shared), 0x33, sizeof(shared));
    each_block(job.blocks, THREADS, [&](Team& team, uint32_t block) {
      columns_block<T>(team, job, block, shared);
    });
  });
}

void seed_bug(RowJob& job, const std::string& bug) {
  if (bug == "count") job.index.count += 1;
  if (bug == "width") job.words += 1;
  if (bug == "stride") job.from_stride += job.word;
  if (bug == "lanes") job.lane_bits += 1;
  if (bug == "blocks" && job.blocks > 0) job.blocks -= 1;
  if (bug == "base") job.from += job.word;
  if (bug == "word" && job.word < 8 && job.words % 2 == 0) job.word *= 2, job.words /= 2;
  if (bug == "strip" && job.word < VECTOR) job.strip += VECTOR;
  if (bug == "lead" && job.word < VECTOR) job.lead += job.word;
  if (bug == "ends" && job.blocks > 0 && job.word < VECTOR) {  // as if rows began with a vector
    const int64_t vectors = blocks_of(job.words * job.word, VECTOR);
    while (job.lane_bits > 0 && int64_t{COPIES} << (job.lane_bits - 1) >= vectors) --job.lane_bits;
    job.across = blocks_of(vectors, int64_t{COPIES} << job.lane_bits);
    job.blocks = job.across * blocks_of(job.index.count, THREADS >> job.lane_bits);
  }
}

void seed_bug(ColumnJob& job, const std::string& bug) {
  if (bug == "count") job.index.count += 1;
  if (bug == "width") job.columns += VECTOR;
  if (bug == "stride") job.from_stride += VECTOR;
  if (bug == "rows") job.rows += 1;
  if (bug == "blocks" && job.blocks > 0) job.blocks -= 1;
  if (bug == "vectors") job.vector_in = job.vector_out = true;
}

void check_gather(const Case& c, bool columns, const std::string& bug) {
  const auto index = make_index(c, columns ? c.columns : c.rows);
  const Index at = place_index(c, index);
  const Matrix from = place_matrix(c.rows, c.columns, c.from_padding, c.element, c.misaligned_from);
  const Matrix to = place_matrix(columns ? c.rows : c.kept, columns ? c.kept : c.columns,
                                 c.to_padding, c.element, c.misaligned_to);
  allow(arena.readable, from, c.element);
  allow(arena.writable, to, c.element);
  fill(from, c.element);
  const auto before = copy_of(from, c.element);
  if (columns) {
    ColumnJob job = plan_columns(to, from, at, c.element, false);
    seed_bug(job, bug);
    run_columns(job, c.element);
  } else {
    RowJob job = plan_rows(to, from, at, c.element);
    seed_bug(job, bug);
    run_rows(job);
  }
  check_result(to, from, before, index, c.element, columns);
}

void check_in_place(const Case& c, bool columns, const std::string& bug) {
  auto index = make_index(c, columns ? c.columns : c.rows);
  if (bug == "order") std::reverse(index.begin(), index.end());
  const Index at = place_index(c, index);
  const Matrix x = place_matrix(c.rows, c.columns, c.from_padding, c.element, c.misaligned_from);
  const Matrix to{x.data, columns ? x.rows : c.kept, columns ? c.kept : x.columns, x.row_stride};
  allow(arena.readable, x, c.element);
  allow(arena.writable, to, c.element);
  fill(x, c.element);
  const auto before = copy_of(x, c.element);
  arena.in_place = true;
  arena.strips = !columns;
  if (columns) {
    ColumnJob job = plan_columns(x, x, at, c.element, true);
    seed_bug(job, bug);
    if (bug == "tiles") job.across = job.tiles, job.blocks *= job.tiles;
    run_columns(job, c.element);
  } else {
    RowJob job = plan_rows_in_place(x, at, c.element);
    seed_bug(job, bug);
    run_rows_in_place(job);
  }
  arena.in_place = arena.strips = false;
  check_result(to, x, before, index, c.element, columns);
}

void check_mlp(const Case& c, const std::string& bug) {
  const auto index = make_index(c, c.rows);  // of gate [F, D], up [F, D] and down [D', F]
  const Index at = place_index(c, index);
  const int64_t outputs = c.columns + 1;
  Matrix from[3] = {}, to[3] = {};
  std::vector<char> before[3];
  const bool with_up = c.misaligned_to != 1;
  for (int i = 0; i < 3; ++i) {
    if (i == 1 && !with_up) continue;
    from[i] = place_matrix(i == 2 ? outputs : c.rows, i == 2 ? c.rows : c.columns, c.from_padding,
                           c.element, c.misaligned_from);
    to[i] = place_matrix(i == 2 ? outputs : c.kept, i == 2 ? c.kept : c.columns, c.to_padding,
                         c.element, c.misaligned_to);
    allow(arena.readable, from[i], c.element);
    allow(arena.writable, to[i], c.element);
    fill(from[i], c.element);
    before[i] = copy_of(from[i], c.element);
  }
  MlpJob job = plan_mlp(to[0], from[0], to[1], from[1], to[2], from[2], at, c.element);
  if (bug == "down") seed_bug(job.down, "blocks");
  if (bug == "gate") seed_bug(job.gate, "blocks");
  if (bug == "up") seed_bug(job.up, "width");
  with_element(c.element, [&](auto value) {
    using T = decltype(value);
    static ColumnShared<T> shared;
    each_block(job.down.blocks + job.gate.blocks + job.up.blocks, THREADS,
               [&](Team& team, uint32_t block) { mlp_block<T>(team, job, block, shared); });
  });
  for (int i = 0; i < 3; ++i)
    if (i != 1 || with_up) check_result(to[i], from[i], before[i], index, c.element, i == 2);
}

// Bytes of one load, then of one store, on average: 2-byte elements in rows of an odd number.
void print_width(const std::string& kind) {
  const bool columns = kind.find("columns") == 0, in_place = kind.find("in_place") != kind.npos;
  const Case c = columns ? Case{31, 16385, 8191, 2, 1, 3, 0, 0, true, true}
                         : Case{192, 4097, 96, 2, 1, 3, 0, 0, true, true};
  arena.clear();
  (in_place ? check_in_place : check_gather)(c, columns, "");
  std::printf("%.2f %.2f\n", double(arena.read_bytes) / arena.reads,
              double(arena.written_bytes) / arena.writes);
}

// Bytes of the matrices, then of the index, over those that cannot be avoided: half of either is
// kept, and of rows in place a whole batch.
void print_traffic(const std::string& kind) {
  const bool columns = kind.find("columns") == 0, in_place = kind.find("in_place") != kind.npos;
  const Case c = columns ? Case{32, 16384, 8192, 2, 0, 0, 0, 0, true, true}
                         : Case{2048, 256, 1024, 2, 0, 0, 0, 0, true, true};
  arena.clear();
  (in_place ? check_in_place : check_gather)(c, columns, "");
  const int64_t written = (columns ? c.rows * c.kept : c.kept * c.columns) * c.element;
  const int64_t ideal = written + (columns ? c.rows * c.columns * c.element : written);
  std::printf("%.4f %.4f\n", double(arena.read_bytes + arena.written_bytes) / ideal,
              double(arena.index_bytes) / ideal);
}

void run_case(const std::string& kind, const Case& c, const std::string& bug) {
  char text[200];
  std::snprintf(text, sizeof(text),
                "[%ld, %ld] keep %ld, %d bytes, off by %d and %d, padded %d and %d, %s, %s",
                long(c.rows), long(c.columns), long(c.kept), c.element, c.misaligned_from,
                c.misaligned_to, c.from_padding, c.to_padding, c.wide ? "int64" : "int32",
                c.ascending ? "ascending" : "any order");
  current = text;
  arena.clear();
  const bool columns = kind.find("columns") == 0;
  try {
    if (kind == "mlp")
      check_mlp(c, bug);
    else if (kind.find("in_place") != kind.npos)
      check_in_place(c, columns, bug);
    else
      check_gather(c, columns, bug);
  } catch (const Stray&) {
    arena.in_place = arena.strips = false;
  }
}

}  // namespace

static void on_read(const void* address, int bytes) {
  const int64_t at = arena.checked(address, bytes, arena.readable, "a read");
  const bool of_index = at >= arena.index_start && at < arena.index_end;
  (of_index ? arena.index_bytes : arena.read_bytes) += bytes;
  arena.reads += !of_index;
  if (!arena.in_place || of_index) return;
  arena.own(at, bytes);
  // Of rows every byte read is used; of columns, the values show whether a stale one was.
  if (arena.strips)
    for (int64_t i = at; i < at + bytes; ++i)
      if (arena.written[i]) problem("a read of what was overwritten");
}

static void on_write(const void* address, int bytes) {
  const int64_t at = arena.checked(address, bytes, arena.writable, "a write");
  for (int64_t i = at; i < at + bytes; ++i) arena.written[i] += arena.written[i] < 255;
  arena.written_bytes += bytes;
  ++arena.writes;
  if (arena.in_place) arena.own(at, bytes);
}

int main(int argc, char** argv) {
  const std::string kind = argc > 1 ? argv[1] : "", bug = argc > 2 ? argv[2] : "";
  const std::string seen = argc > 3 ? argv[3] : "";
  if (bug == "traffic") return print_traffic(kind), problems.empty() ? 0 : 1;
  if (bug == "width of accesses") return print_width(kind), problems.empty() ? 0 : 1;
  const bool in_place = kind.find("in_place") != kind.npos, columns = kind.find("columns") == 0;
  // Less than a vector, about a block's share, many; short, and longer than a batch of rows.
  const std::vector<int64_t> across = {1, 7, 64, 129, 520}, down = {1, 5, 33, 700};
  int64_t cases = 0;
  for (int element : {1, 2, 4, 8})
    for (int64_t a : across)
      for (int64_t d : down) {
        // Few rows by many columns where columns are picked, and the other way round.
        Case c{columns ? a % 35 + 1 : d * 2, columns ? d * 9 : a, 0, element,
               0, 0, 0, 0, true, true};
        const int64_t most = kind == "mlp" ? 200000 : 900000;
        while (c.rows * c.columns * element > most) c.rows /= 2;
        const int64_t limit = columns ? c.columns : c.rows;
        for (int way = 0; way < 10; ++way) {
          const int64_t keep[] = {limit / 2, limit, 1, limit * 3 / 4, limit / 9, 0,
                                  limit / 2, limit * 3 / 4, limit / 2, limit * 2 / 3};
          c.kept = keep[way];
          c.wide = below(2);
          c.ascending = in_place || below(3) > 0;
          // Aligned; rows that lie anyhow; all rows alike, and then as those they come from.
          const bool whole_strides = way < 2 || way == 6 || way == 7;
          c.misaligned_from = way < 2 ? 0 : int(below(VECTOR));
          c.misaligned_to = way < 2 ? 0 : way == 7 ? c.misaligned_from : int(below(VECTOR));
          c.from_padding = whole_strides ? int(-(uint64_t(c.columns)) % 16) : int(below(VECTOR));
          c.to_padding = whole_strides ? int(-(uint64_t(columns ? c.kept : c.columns)) % 16)
                                       : int(below(VECTOR));
          run_case(kind, c, bug);
          ++cases;
          for (const auto& [what, times] : problems)
            if (!seen.empty() && what.find(seen) != what.npos) return 1;
        }
      }
  std::printf("%ld cases, %zu kinds of problem\n", long(cases), problems.size());
  return problems.empty() ? 0 : 1;
}
