// The operators' CPU implementations, and the errors that they raise in Python.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>

namespace prunekit {

using torch::stable::Tensor;

Tensor gather_rows(const Tensor& x, const Tensor& index);
Tensor gather_cols(const Tensor& x, const Tensor& index);
void gather_rows_out(const Tensor& x, const Tensor& index, const Tensor& out);
void gather_cols_out(const Tensor& x, const Tensor& index, const Tensor& out);
void compact_rows_(const Tensor& x, const Tensor& index);
void compact_cols_(const Tensor& x, const Tensor& index);
void compact_mlp_out(
    const Tensor& gate, const std::optional<Tensor>& up, const Tensor& down, const Tensor& index,
    const Tensor& gate_out, const std::optional<Tensor>& up_out, const Tensor& down_out);
std::tuple<Tensor, Tensor, Tensor> gated_act_stats(
    const Tensor& gate, const std::optional<Tensor>& up, const Tensor& spans, int64_t act);

Tensor gated_mlp_decode(
    const Tensor& x, const Tensor& gate, const std::optional<Tensor>& up, const Tensor& down,
    const std::optional<Tensor>& gate_bias, const std::optional<Tensor>& up_bias,
    const std::optional<Tensor>& down_bias, int64_t act);

double read_floats(const Tensor& x);

template <typename... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// std::invalid_argument arrives in Python as ValueError, std::out_of_range as IndexError.
template <typename... Parts>
void check(bool holds, const Parts&... parts) {
  if (!holds) throw std::invalid_argument(message(parts...));
}

// An output that is given, and a matrix that is compacted where it lies.
inline void check_out(
    const char* name, const Tensor& x, const Tensor& out, int64_t rows, int64_t columns) {
  check(out.dim() == 2 && out.size(0) == rows && out.size(1) == columns, name,
        ": out must be a matrix [", rows, ", ", columns, "]");
  check(out.scalar_type() == x.scalar_type() && out.device() == x.device(), name,
        ": out must have x's dtype and device");
  check(out.stride(1) == 1 || columns <= 1, name,
        ": the elements of out's rows must be neighbours, got stride ", out.stride(1));
}

inline void check_in_place(const char* name, const Tensor& x) {
  check(x.dim() == 2, name, ": x must be a matrix [R, C], got ", x.dim(), " dimensions");
  check(x.stride(1) == 1 || x.size(1) <= 1, name,
        ": the elements of x's rows must be neighbours, got stride ", x.stride(1),
        "; a transposed matrix is compacted along its other dimension");
  check(x.stride(0) >= x.size(1) || x.size(0) <= 1, name, ": the rows of x must not overlap");
}

}  // namespace prunekit
