// The gathers, anew and in place: exact copies of elements, whatever they mean.
//
// Stores that bypass the cache were measured and do not pay: what is gathered is read again soon.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#include "../ops.h"
#include "isa.h"
#include "pages.h"

#if PRUNEKIT_X86_KERNELS
#include <immintrin.h>
#endif

namespace prunekit {
namespace {

using torch::headeronly::ScalarType;

// One vector of a row: where it starts, which of its lanes stay, and where the first of them goes.
struct Block {
  uint64_t mask;
  int32_t column, position;
};

// The columns to keep. Ascending ones without repeats are also given as blocks, as far as a whole
// vector can be read from the row and written to the output without leaving either.
struct Columns {
  std::vector<int32_t> index;
  std::vector<Block> blocks;
  size_t rest;  // the first position that no block serves
};

using RowKernel = void (*)(void* to, const void* from, const void* next, const Columns&);

}  // namespace
}  // namespace prunekit

#define PRUNEKIT_KERNELS "gather.inl"
#include "foreach_isa.h"

namespace prunekit {
namespace {

constexpr int64_t BYTES_WORTH_A_THREAD = 64 << 10;
constexpr int64_t BYTES_OF_A_STRIP = 512;  // a row's share: some lines, so that threads share few

int64_t rows_worth_a_thread(int64_t bytes_a_row) {
  return 1 + BYTES_WORTH_A_THREAD / (bytes_a_row + 1);
}

// Reads an index of either integer type, each entry checked before anything is read through it.
template <typename To>
std::vector<To> checked_index(const char* name, const Tensor& index, int64_t limit) {
  check(index.dim() == 1 && index.is_cpu(), name, ": index must be a vector on the CPU");
  const Tensor ordered = torch::stable::contiguous(index);
  std::vector<To> checked(ordered.numel());
  const auto read = [&](const auto* entries) {
    for (size_t k = 0; k < checked.size(); ++k) {
      if (entries[k] < 0 || entries[k] >= limit)
        throw std::out_of_range(message(name, ": index ", entries[k], " at position ", k,
                                        " is outside [0, ", limit, ")"));
      checked[k] = static_cast<To>(entries[k]);
    }
  };
  if (index.scalar_type() == ScalarType::Int) {
    read(ordered.const_data_ptr<int32_t>());
  } else {
    check(index.scalar_type() == ScalarType::Long, name, ": index must be int32 or int64");
    read(ordered.const_data_ptr<int64_t>());
  }
  return checked;
}

// Rows may lie anywhere; the elements of one must be neighbours.
Tensor with_dense_rows(const char* name, const Tensor& x) {
  check(x.dim() == 2, name, ": x must be a matrix [R, C], got ", x.dim(), " dimensions");
  return x.stride(1) == 1 || x.size(1) <= 1 ? x : torch::stable::contiguous(x);
}

Columns plan_columns(std::vector<int32_t> index, int64_t width, int64_t lanes) {
  const size_t count = index.size();
  const bool ascending =
      std::adjacent_find(index.begin(), index.end(), std::greater_equal<>()) == index.end();
  Columns columns{std::move(index), {}, 0};
  if (!ascending) return columns;
  size_t k = 0;
  while (k + lanes <= count) {
    const int64_t column = columns.index[k] / lanes * lanes;
    if (column + lanes > width) break;
    Block block{0, static_cast<int32_t>(column), static_cast<int32_t>(k)};
    for (; k < count && columns.index[k] < column + lanes; ++k)
      block.mask |= uint64_t{1} << (columns.index[k] - column);
    columns.blocks.push_back(block);
  }
  columns.rest = k;
  return columns;
}

int64_t checked_width(const char* name, const Tensor& x) {
  check(x.dim() == 2, name, ": x must be a matrix [R, C], got ", x.dim(), " dimensions");
  check(x.size(1) <= INT32_MAX, name, ": x must have fewer than 2^31 columns, got ", x.size(1));
  return x.size(1);
}

template <typename Entry>
void check_ascending(const char* name, const std::vector<Entry>& index) {
  const auto at = std::adjacent_find(index.begin(), index.end(), std::greater_equal<>());
  if (at != index.end())
    check(false, name, ": index must ascend without repeats, got ", at[0], " before ", at[1],
          " at position ", at - index.begin(), "; sort it");
}

// Column kept[k] of from becomes column k of to, which may be from where the index ascends.
void pick_columns(
    const char* name, const Tensor& from, const Tensor& to, std::vector<int32_t> kept) {
  const int64_t size = static_cast<int64_t>(from.element_size()), height = from.size(0);
  const Columns columns = plan_columns(std::move(kept), from.size(1), 64 / size);
  const RowKernel kernel = PRUNEKIT_BEST(row_kernel)(size, columns);
  check(kernel != nullptr, name, ": x must have elements of 1, 2, 4 or 8 bytes, got ", size);
  const int64_t stride = from.stride(0) * size, to_stride = to.stride(0) * size;
  char* out = static_cast<char*>(to.mutable_data_ptr());
  const char* in = static_cast<const char*>(from.const_data_ptr());
  const int64_t grain = rows_worth_a_thread(static_cast<int64_t>(columns.index.size()) * size);
  torch::stable::parallel_for(0, height, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const char* at = in + row * stride;
      kernel(out + row * to_stride, at, row + 1 < height ? at + stride : at, columns);
    }
  });
}

}  // namespace

void gather_rows_out(const Tensor& x, const Tensor& index, const Tensor& out) {
  const Tensor rows = with_dense_rows("gather_rows", x);
  const auto kept = checked_index<int64_t>("gather_rows", index, x.size(0));
  const int64_t count = static_cast<int64_t>(kept.size()), width = x.size(1);
  check_out("gather_rows", x, out, count, width);
  if (count == 0 || width == 0) return;  // such a tensor may be at no address

  const int64_t size = static_cast<int64_t>(x.element_size()), bytes = width * size;
  const int64_t stride = rows.stride(0) * size, out_stride = out.stride(0) * size;
  const char* from = static_cast<const char*>(rows.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t grain = rows_worth_a_thread(bytes);
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      std::memcpy(to + k * out_stride, from + kept[k] * stride, bytes);
  });
}

void gather_cols_out(const Tensor& x, const Tensor& index, const Tensor& out) {
  const Tensor rows = with_dense_rows("gather_cols", x);
  const auto kept = checked_index<int32_t>("gather_cols", index, checked_width("gather_cols", x));
  check_out("gather_cols", x, out, x.size(0), static_cast<int64_t>(kept.size()));
  pick_columns("gather_cols", rows, out, kept);
}

Tensor gather_rows(const Tensor& x, const Tensor& index) {
  check(x.dim() == 2, "gather_rows: x must be a matrix [R, C], got ", x.dim(), " dimensions");
  Tensor out = torch::stable::new_empty(x, {index.numel(), x.size(1)});
  prefer_huge_pages(out.mutable_data_ptr(), out.numel() * x.element_size());
  gather_rows_out(x, index, out);
  return out;
}

Tensor gather_cols(const Tensor& x, const Tensor& index) {
  check(x.dim() == 2, "gather_cols: x must be a matrix [R, C], got ", x.dim(), " dimensions");
  Tensor out = torch::stable::new_empty(x, {x.size(0), index.numel()});
  prefer_huge_pages(out.mutable_data_ptr(), out.numel() * x.element_size());
  gather_cols_out(x, index, out);
  return out;
}

// Each thread moves a strip of its own of every row, in ascending order: index[k] >= k, and what
// was written lies below every row that is still to be read.
void compact_rows_(const Tensor& x, const Tensor& index) {
  check_in_place("compact_rows_", x);
  const auto kept = checked_index<int64_t>("compact_rows_", index, x.size(0));
  check_ascending("compact_rows_", kept);
  const int64_t size = static_cast<int64_t>(x.element_size());
  const int64_t stride = x.stride(0) * size, bytes = x.size(1) * size;
  const int64_t count = static_cast<int64_t>(kept.size());
  char* data = static_cast<char*>(x.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(BYTES_OF_A_STRIP, BYTES_WORTH_A_THREAD / (count + 1));
  torch::stable::parallel_for(0, bytes, grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = 0; k < count; ++k)
      if (kept[k] != k)
        std::memcpy(data + k * stride + begin, data + kept[k] * stride + begin, end - begin);
  });
}

// A row kernel reads every vector, and every later one, before it writes there: the first of a
// vector's columns is at or beyond the position that it goes to.
void compact_cols_(const Tensor& x, const Tensor& index) {
  check_in_place("compact_cols_", x);
  const auto kept =
      checked_index<int32_t>("compact_cols_", index, checked_width("compact_cols_", x));
  check_ascending("compact_cols_", kept);
  pick_columns("compact_cols_", x, x, kept);
}

void compact_mlp_out(
    const Tensor& gate, const std::optional<Tensor>& up, const Tensor& down, const Tensor& index,
    const Tensor& gate_out, const std::optional<Tensor>& up_out, const Tensor& down_out) {
  check(up.has_value() == up_out.has_value(), "compact_mlp: up and up_out go together");
  gather_rows_out(gate, index, gate_out);
  if (up) gather_rows_out(*up, index, *up_out);
  gather_cols_out(down, index, down_out);
}

}  // namespace prunekit
