"""The activations as device functions, one integer code each, in fp32.

The codes are those of the operator schemas. Only exp and erf are used of the math library, which
every target has.
"""

import triton
import triton.language as tl

SILU = tl.constexpr(0)
GELU = tl.constexpr(1)
GELU_TANH = tl.constexpr(2)
RELU = tl.constexpr(3)
RELU2 = tl.constexpr(4)


@triton.jit
def activate(x, CODE: tl.constexpr):
    """Apply the activation with this code to an fp32 tensor, elementwise; NaN stays NaN."""
    if CODE == SILU:
        y = x / (1.0 + tl.exp(-x))
    elif CODE == GELU:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif CODE == GELU_TANH:
        # 1 + tanh(u) = 2 / (1 + exp(-2u)): no tanh, and no cancellation where x is negative.
        u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        y = x / (1.0 + tl.exp(-2.0 * u))
    elif CODE == RELU:
        y = tl.where(x < 0.0, 0.0, x)
    else:
        tl.static_assert(CODE == RELU2, "unknown activation code")
        positive = tl.where(x < 0.0, 0.0, x)
        y = positive * positive
    return y
