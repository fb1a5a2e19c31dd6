"""Operations: each has a schema, a plain torch reference, a fake kernel, and faster backends."""

from prunekit.ops.activations import ACTIVATIONS, activation_code
from prunekit.ops.gated_act_stats import gated_act_stats, gated_act_stats_ref
from prunekit.ops.gated_mlp import gated_mlp, gated_mlp_ref
from prunekit.ops.gated_mlp_backward import gated_mlp_backward_ref
from prunekit.ops.gated_mlp_indexed import gated_mlp_indexed, gated_mlp_indexed_ref
from prunekit.ops.gated_mlp_stats import gated_mlp_stats, gated_mlp_stats_ref
from prunekit.ops.gather import (
    compact_cols_,
    compact_mlp,
    compact_rows_,
    gather_cols,
    gather_cols_ref,
    gather_rows,
    gather_rows_ref,
)
from prunekit.ops.gram import gram_update, gram_update_ref, symmetrize_
from prunekit.ops.registry import BackendError, force_backend, forced_backend

from prunekit.ops import backends  # isort: skip  (attaches the backends to what is defined above)

__all__ = [
    "ACTIVATIONS",
    "BackendError",
    "activation_code",
    "backends",
    "compact_cols_",
    "compact_mlp",
    "compact_rows_",
    "force_backend",
    "forced_backend",
    "gated_act_stats",
    "gated_act_stats_ref",
    "gated_mlp",
    "gated_mlp_backward_ref",
    "gated_mlp_indexed",
    "gated_mlp_indexed_ref",
    "gated_mlp_ref",
    "gated_mlp_stats",
    "gated_mlp_stats_ref",
    "gather_cols",
    "gather_cols_ref",
    "gather_rows",
    "gather_rows_ref",
    "gram_update",
    "gram_update_ref",
    "symmetrize_",
]
