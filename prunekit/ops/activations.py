"""The activations a transformer MLP may use, under one name and one integer code each.

The codes travel through operator schemas and into compiled kernels, so they never change meaning.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


def _relu2(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "relu2": _relu2,
}
NAMES: tuple[str, ...] = tuple(ACTIVATIONS)


def activation_code(name: str) -> int:
    """Return the integer that stands for an activation in operator schemas.

    Raises:
        ValueError: the name is none of ``NAMES``.
    """
    try:
        return NAMES.index(name)
    except ValueError:
        raise ValueError(f"activation: got {name!r}; expected one of {', '.join(NAMES)}") from None


def activate(x: torch.Tensor, code: int) -> torch.Tensor:
    """Apply the activation with this code, elementwise, in x's dtype."""
    return ACTIVATIONS[NAMES[code]](x)


def activate_backward(grad: torch.Tensor, x: torch.Tensor, code: int) -> torch.Tensor:
    """Multiply grad by the activation's derivative at x, elementwise, in x's dtype."""
    name = NAMES[code]
    if name == "silu":
        return torch.ops.aten.silu_backward(grad, x)
    if name == "relu":
        return torch.ops.aten.threshold_backward(grad, x, 0)
    if name == "relu2":
        return grad * 2 * F.relu(x)
    approximate = "tanh" if name == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(grad, x, approximate=approximate)
