"""The activations as device functions, one integer code each, in fp32.

The codes are those of the operator schemas. Only exp and exp2 are used of the math library,
which every target has.
"""

import triton
import triton.language as tl

SILU = tl.constexpr(0)
GELU = tl.constexpr(1)
GELU_TANH = tl.constexpr(2)
RELU = tl.constexpr(3)
RELU2 = tl.constexpr(4)


@triton.jit
def normal_cdf(x):
    """Return Φ(x) = (1 + erf(x/√2))/2 of an fp32 tensor, within 1e-7; NaN stays NaN.

    Source: log2(2·Φ(-a)) fitted on [0, 6] by a polynomial without a constant, least in the largest
    error of Φ. The math library's erf has two polynomials to choose from, and in a kernel that
    keeps sums it takes the registers that let more programs run.
    """
    a = tl.abs(x)
    p = -3.7520735e-08 * a + 1.05514357e-06
    p = p * a - 1.27613757e-05
    p = p * a + 8.49960488e-05
    p = p * a - 0.000302427594
    p = p * a + 3.41017476e-05
    p = p * a + 0.00691961125
    p = p * a - 0.0524311177
    p = p * a - 0.459221959
    p = p * a - 1.15110421
    tail = tl.exp2(p * a - 1.0)  # the leading sign makes it 0 beyond the fit
    return tl.where(x < 0.0, tail, 1.0 - tail)


@triton.jit
def activate(x, CODE: tl.constexpr):
    """Apply the activation with this code to an fp32 tensor, elementwise; NaN stays NaN."""
    if CODE == SILU:
        y = x / (1.0 + tl.exp(-x))
    elif CODE == GELU:
        y = x * normal_cdf(x)
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


@triton.jit
def activate_grad(x, CODE: tl.constexpr):
    """Return the derivative of `activate` for an fp32 tensor, at 0 as torch; NaN stays NaN."""
    if CODE == SILU:
        s = 1.0 / (1.0 + tl.exp(-x))
        slope = s * (1.0 + x * (1.0 - s))
    elif CODE == GELU:
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        slope = normal_cdf(x) + x * density
    elif CODE == GELU_TANH:
        u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        s = 1.0 / (1.0 + tl.exp(-2.0 * u))
        # s·(1 - s) is 0 long before x² reaches the bound, which keeps 0·inf out.
        square = tl.minimum(x * x, 1e4)
        slope = s + x * s * (1.0 - s) * (1.5957691216057308 + 0.21406444881780076 * square)
    elif CODE == RELU:
        slope = tl.where(x > 0.0, 1.0, tl.where(x <= 0.0, 0.0, x))
    else:
        tl.static_assert(CODE == RELU2, "unknown activation code")
        slope = 2.0 * tl.where(x < 0.0, 0.0, x)
    return slope
