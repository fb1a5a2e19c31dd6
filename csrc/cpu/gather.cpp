// gather_rows and gather_cols: exact copies of elements, whatever they mean.
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

}  // namespace

Tensor gather_rows(const Tensor& x, const Tensor& index) {
  const Tensor rows = with_dense_rows("gather_rows", x);
  const auto kept = checked_index<int64_t>("gather_rows", index, x.size(0));
  const int64_t count = static_cast<int64_t>(kept.size()), width = x.size(1);
  Tensor out = torch::stable::new_empty(x, {count, width});

  const int64_t bytes = width * static_cast<int64_t>(x.element_size());
  const int64_t stride = rows.stride(0) * static_cast<int64_t>(x.element_size());
  const char* from = static_cast<const char*>(rows.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  prefer_huge_pages(to, count * bytes);
  const int64_t grain = rows_worth_a_thread(bytes);
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      std::memcpy(to + k * bytes, from + kept[k] * stride, bytes);
  });
  return out;
}

Tensor gather_cols(const Tensor& x, const Tensor& index) {
  const Tensor rows = with_dense_rows("gather_cols", x);
  const int64_t size = static_cast<int64_t>(x.element_size());
  const int64_t height = x.size(0), width = x.size(1);
  check(width <= INT32_MAX, "gather_cols: x must have fewer than 2^31 columns, got ", width);
  const Columns columns =
      plan_columns(checked_index<int32_t>("gather_cols", index, width), width, 64 / size);
  const RowKernel kernel = PRUNEKIT_BEST(row_kernel)(size, columns);
  check(kernel != nullptr, "gather_cols: x must have elements of 1, 2, 4 or 8 bytes, got ", size);
  const int64_t count = static_cast<int64_t>(columns.index.size());
  Tensor out = torch::stable::new_empty(x, {height, count});

  const int64_t bytes = count * size, stride = rows.stride(0) * size;
  const char* from = static_cast<const char*>(rows.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  prefer_huge_pages(to, height * bytes);
  const int64_t grain = rows_worth_a_thread(bytes);
  torch::stable::parallel_for(0, height, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const char* at = from + row * stride;
      kernel(to + row * bytes, at, row + 1 < height ? at + stride : at, columns);
    }
  });
  return out;
}

}  // namespace prunekit
