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
std::tuple<Tensor, Tensor, Tensor> gated_act_stats(
    const Tensor& gate, const std::optional<Tensor>& up, const Tensor& spans, int64_t act);

Tensor gated_mlp_decode(
    const Tensor& x, const Tensor& gate, const std::optional<Tensor>& up, const Tensor& down,
    const std::optional<Tensor>& gate_bias, const std::optional<Tensor>& up_bias,
    const std::optional<Tensor>& down_bias, int64_t act);

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

}  // namespace prunekit
