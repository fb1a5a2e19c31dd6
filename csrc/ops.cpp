// Registers the CPU implementations; the schemas are defined in prunekit/ops.
#include "ops.h"

#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"

namespace prunekit {
namespace {

int64_t cpu_isa_level() { return static_cast<int64_t>(cpu_isa()); }

}  // namespace
}  // namespace prunekit

STABLE_TORCH_LIBRARY_FRAGMENT(prunekit, m) {
  m.def("cpu_isa() -> int");
  m.def("read_floats(Tensor x) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(prunekit, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&prunekit::cpu_isa_level));
}

STABLE_TORCH_LIBRARY_IMPL(prunekit, CPU, m) {
  m.impl("gather_rows", TORCH_BOX(&prunekit::gather_rows));
  m.impl("gather_cols", TORCH_BOX(&prunekit::gather_cols));
  m.impl("gather_rows_out", TORCH_BOX(&prunekit::gather_rows_out));
  m.impl("gather_cols_out", TORCH_BOX(&prunekit::gather_cols_out));
  m.impl("compact_rows_", TORCH_BOX(&prunekit::compact_rows_));
  m.impl("compact_cols_", TORCH_BOX(&prunekit::compact_cols_));
  m.impl("compact_mlp_out", TORCH_BOX(&prunekit::compact_mlp_out));
  m.impl("gated_act_stats", TORCH_BOX(&prunekit::gated_act_stats));
  m.impl("read_floats", TORCH_BOX(&prunekit::read_floats));
  m.impl("gated_mlp_decode", TORCH_BOX(&prunekit::gated_mlp_decode));
}
