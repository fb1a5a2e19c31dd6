"""Where the kernels run: in the interpreter, or on the GPU that is here."""

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter computes bf16 as integers, so it has to be left to a GPU.
DTYPES = [torch.float16, torch.float32] + ([] if INTERPRETED else [torch.bfloat16])


def slack(exact: torch.Tensor, dtype: torch.dtype) -> float:
    """Return the error allowed beside twice torch's own, which may happen to be exact.

    In fp32 a GPU adds in an order of its own, and its exponentials are a few units off.
    """
    units = 8 if dtype == torch.float32 and not INTERPRETED else 0.25
    return units * torch.finfo(dtype).eps * exact.abs().max().item()
