// Registers the gathers' CUDA implementations: torch's stable ABI on one side, launchers that know
// nothing of torch on the other. Built only where torch has CUDA and nvcc is found.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/shim_utils.h>

#include "../ops.h"
#include "gather.h"

namespace prunekit {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::accelerator::DeviceGuard;

// A single row's stride means nothing, and could spoil the plan's alignment.
gather::Matrix matrix_at(void* data, const Tensor& x) {
  return {data, x.size(0), x.size(1), x.size(0) > 1 ? x.stride(0) : 0};
}

gather::Matrix source(const Tensor& x) {
  return matrix_at(const_cast<void*>(x.const_data_ptr()), x);
}

gather::Matrix target(const Tensor& x) { return matrix_at(x.mutable_data_ptr(), x); }

// Entries are not checked: that would wait for the device.
gather::Index index_of(const char* name, const Tensor& ordered) {
  const bool wide = ordered.scalar_type() == ScalarType::Long;
  check(ordered.dim() == 1 && ordered.is_cuda(), name, ": index must be a vector on x's device");
  check(wide || ordered.scalar_type() == ScalarType::Int, name, ": index must be int32 or int64");
  return {ordered.const_data_ptr(), ordered.numel(), wide};
}

Tensor with_dense_rows(const char* name, const Tensor& x) {
  check(x.dim() == 2, name, ": x must be a matrix [R, C], got ", x.dim(), " dimensions");
  return x.stride(1) == 1 || x.size(1) <= 1 ? x : torch::stable::contiguous(x);
}

void check_width(const char* name, const Tensor& x) {
  check(x.size(1) <= INT32_MAX, name, ": x must have fewer than 2^31 columns, got ", x.size(1));
}

int element_size_of(const char* name, const Tensor& x) {
  const int size = static_cast<int>(x.element_size());
  check(size == 1 || size == 2 || size == 4 || size == 8, name,
        ": x must have elements of 1, 2, 4 or 8 bytes, got ", size);
  return size;
}

cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(const char* name, cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(message(name, ": the launch failed: ", cudaGetErrorString(error)));
}

void gather_rows_out_cuda(const Tensor& x, const Tensor& index, const Tensor& out) {
  const char* name = "gather_rows";
  const Tensor rows = with_dense_rows(name, x), ordered = torch::stable::contiguous(index);
  const gather::Index at = index_of(name, ordered);
  check_out(name, x, out, at.count, x.size(1));
  const DeviceGuard guard(x.get_device_index());
  check_launch(name, gather::launch_rows(target(out), source(rows), at,
                                         element_size_of(name, x), current_stream(x)));
}

void gather_cols_out_cuda(const Tensor& x, const Tensor& index, const Tensor& out) {
  const char* name = "gather_cols";
  const Tensor rows = with_dense_rows(name, x), ordered = torch::stable::contiguous(index);
  const gather::Index at = index_of(name, ordered);
  check_width(name, x);
  check_out(name, x, out, x.size(0), at.count);
  const DeviceGuard guard(x.get_device_index());
  check_launch(name, gather::launch_columns(target(out), source(rows), at,
                                            element_size_of(name, x), current_stream(x)));
}

Tensor gather_rows_cuda(const Tensor& x, const Tensor& index) {
  check(x.dim() == 2, "gather_rows: x must be a matrix [R, C], got ", x.dim(), " dimensions");
  Tensor out = torch::stable::new_empty(x, {index.numel(), x.size(1)});
  gather_rows_out_cuda(x, index, out);
  return out;
}

Tensor gather_cols_cuda(const Tensor& x, const Tensor& index) {
  check(x.dim() == 2, "gather_cols: x must be a matrix [R, C], got ", x.dim(), " dimensions");
  Tensor out = torch::stable::new_empty(x, {x.size(0), index.numel()});
  gather_cols_out_cuda(x, index, out);
  return out;
}

void compact_rows_cuda_(const Tensor& x, const Tensor& index) {
  const char* name = "compact_rows_";
  check_in_place(name, x);
  const Tensor ordered = torch::stable::contiguous(index);
  const gather::Index at = index_of(name, ordered);
  check(at.count <= x.size(0), name, ": index has ", at.count, " entries, x only ", x.size(0),
        " rows");
  const DeviceGuard guard(x.get_device_index());
  check_launch(name, gather::launch_rows_in_place(target(x), at, element_size_of(name, x),
                                                  current_stream(x)));
}

void compact_cols_cuda_(const Tensor& x, const Tensor& index) {
  const char* name = "compact_cols_";
  check_in_place(name, x);
  check_width(name, x);
  const Tensor ordered = torch::stable::contiguous(index);
  const gather::Index at = index_of(name, ordered);
  check(at.count <= x.size(1), name, ": index has ", at.count, " entries, x only ", x.size(1),
        " columns");
  const DeviceGuard guard(x.get_device_index());
  check_launch(name, gather::launch_columns_in_place(target(x), at, element_size_of(name, x),
                                                     current_stream(x)));
}

void compact_mlp_out_cuda(
    const Tensor& gate, const std::optional<Tensor>& up, const Tensor& down, const Tensor& index,
    const Tensor& gate_out, const std::optional<Tensor>& up_out, const Tensor& down_out) {
  const char* name = "compact_mlp";
  check(up.has_value() == up_out.has_value(), name, ": up and up_out go together");
  const Tensor gate_rows = with_dense_rows(name, gate), down_rows = with_dense_rows(name, down);
  const Tensor up_rows = with_dense_rows(name, up ? *up : gate);
  const Tensor ordered = torch::stable::contiguous(index);
  const gather::Index at = index_of(name, ordered);
  check_width(name, down);
  check_out(name, gate, gate_out, at.count, gate.size(1));
  if (up) check_out(name, gate, *up_out, at.count, up_rows.size(1));
  check_out(name, gate, down_out, down.size(0), at.count);
  gather::Projection up_part{};
  if (up) up_part = {target(*up_out), source(up_rows)};
  const DeviceGuard guard(gate.get_device_index());
  check_launch(name, gather::launch_mlp({target(gate_out), source(gate_rows)}, up_part,
                                        {target(down_out), source(down_rows)}, at,
                                        element_size_of(name, gate), current_stream(gate)));
}

}  // namespace
}  // namespace prunekit

STABLE_TORCH_LIBRARY_IMPL(prunekit, CUDA, m) {
  m.impl("gather_rows", TORCH_BOX(&prunekit::gather_rows_cuda));
  m.impl("gather_cols", TORCH_BOX(&prunekit::gather_cols_cuda));
  m.impl("gather_rows_out", TORCH_BOX(&prunekit::gather_rows_out_cuda));
  m.impl("gather_cols_out", TORCH_BOX(&prunekit::gather_cols_out_cuda));
  m.impl("compact_rows_", TORCH_BOX(&prunekit::compact_rows_cuda_));
  m.impl("compact_cols_", TORCH_BOX(&prunekit::compact_cols_cuda_));
  m.impl("compact_mlp_out", TORCH_BOX(&prunekit::compact_mlp_out_cuda));
}
