"""What is audited: each operation's Triton kernels, at the widths that pruning leaves.

A case runs the host function on meta tensors, so the audit sees the launches that a model would
make, and nothing here has to know a block size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch

from bench.audit.specialise import ARCHITECTURES, Specialisation, specialise
from prunekit.ops import activation_code
from prunekit.plan import kept_width
from prunekit_kernels.gated_act_stats import gated_act_stats_triton
from prunekit_kernels.gated_mlp_backward import gated_mlp_backward
from prunekit_kernels.gated_mlp_decode import gated_mlp_decode
from prunekit_kernels.gated_mlp_prefill import gated_mlp_prefill, gated_mlp_prefill_stats
from prunekit_kernels.gram_update import gram_update_triton
from prunekit_kernels.launch import recorded

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SPARSITIES = (0.0, 0.20, 0.35, 0.50)
MULTIPLE_OF = 128
PREFILL_TOKENS = 2048
SILU = activation_code("silu")

Cost = tuple[float, float]


@dataclass(frozen=True)
class Model:
    """D and the dense F of a model's MLPs."""

    name: str
    hidden_size: int
    dense_width: int

    def kept(self, sparsity: float) -> int:
        """The width that pruning leaves, rounded as plans for GPUs are."""
        return kept_width(self.dense_width, sparsity, MULTIPLE_OF)


MODELS = (
    Model("Qwen2.5-1.5B", 1536, 8960),
    Model("Qwen2.5-7B", 3584, 18944),
    Model("Llama-3-8B", 4096, 14336),
)


@dataclass(frozen=True)
class Problem:
    """One MLP, pruned, on meta tensors of its dtype."""

    model: Model
    width: int
    dtype: torch.dtype
    act: int = SILU

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    def weights(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden = self.model.hidden_size
        up = self.empty(self.width, hidden)
        return self.empty(self.width, hidden), up, self.empty(hidden, self.width)


def problems(dtype: torch.dtype) -> Iterator[Problem]:
    """Yield every model at every sparsity."""
    for model in MODELS:
        for sparsity in SPARSITIES:
            yield Problem(model, model.kept(sparsity), dtype)


@dataclass(frozen=True)
class Case:
    """An operation with its number of tokens.

    ``run`` calls the host function. ``products`` names the kernels that must use tensor cores in
    16-bit dtypes, ``narrow`` those that may load less than 128 bits a thread, and ``spilling``
    those that may spill, alone or with a dtype (``grad_x fp32``), each with its reason. ``cost``
    gives bytes and FLOPs of tokens, D and F at 2 bytes an element: the floor, not what a kernel
    does. A ``variant`` differs from the operation as it mostly runs, in ``problems`` or in
    ``run``; of its kernels, ``only`` those count.
    """

    operation: str
    tokens: int
    run: Callable[[Problem, int], object]
    cost: Callable[[int, int, int], Cost]
    products: frozenset[str] = frozenset()
    narrow: dict[str, str] = field(default_factory=dict)
    spilling: dict[str, str] = field(default_factory=dict)
    variant: str = ""
    problems: Callable[[torch.dtype], Iterable[Problem]] = problems
    only: frozenset[str] = frozenset()
    architectures: tuple[str, ...] = ARCHITECTURES
    dtypes: tuple[str, ...] = tuple(DTYPES)

    @property
    def name(self) -> str:
        tokens = "" if self.tokens == PREFILL_TOKENS else f"@{self.tokens}"
        return self.operation + tokens + (f":{self.variant}" if self.variant else "")


def _spans(tokens: int, prompts: int = 16) -> torch.Tensor:
    edges = torch.linspace(0, tokens, prompts + 1).long()
    return torch.stack([edges[:-1], edges[1:]], dim=1)


def _gated_act_stats(problem: Problem, tokens: int) -> None:
    gate = problem.empty(tokens, problem.width)
    gated_act_stats_triton(gate, torch.empty_like(gate), _spans(tokens), problem.act)


def _prefill(problem: Problem, tokens: int) -> None:
    x = problem.empty(tokens, problem.model.hidden_size)
    gated_mlp_prefill(x, *problem.weights(), None, None, None, problem.act)


def _prefill_stats(problem: Problem, tokens: int) -> None:
    x = problem.empty(tokens, problem.model.hidden_size)
    gated_mlp_prefill_stats(x, *problem.weights(), None, None, None, _spans(tokens), problem.act)


def _decode(problem: Problem, tokens: int) -> None:
    x = problem.empty(tokens, problem.model.hidden_size)
    gated_mlp_decode(x, *problem.weights(), None, None, None, problem.act)


def _indexed(problem: Problem, tokens: int) -> None:
    x = problem.empty(tokens, problem.model.hidden_size)
    weights = replace(problem, width=problem.model.dense_width).weights()
    index = problem.empty(problem.width, dtype=torch.int32)
    gated_mlp_decode(x, *weights, None, None, None, problem.act, index)


def _gram_update(problem: Problem, tokens: int) -> None:
    gram = problem.empty(problem.width, problem.width, dtype=torch.float32)
    gram_update_triton(gram, problem.empty(tokens, problem.width))


def _backward(problem: Problem, tokens: int) -> None:
    x = problem.empty(tokens, problem.model.hidden_size)
    grad_y = torch.empty_like(x)
    gated_mlp_backward(grad_y, x, *problem.weights(), None, None, problem.act, (True,) * 7)


def _mlp_cost(t: int, d: int, f: int) -> Cost:
    return 2 * (3 * d * f + 2 * t * d), 6 * t * d * f


def _prefill_cost(t: int, d: int, f: int) -> Cost:
    moved, flops = _mlp_cost(t, d, f)
    return moved + 2 * (2 * t * f), flops  # h, written by one product and read by the other


_DUAL = frozenset({"dual_product", "down_product"})
_DECODE = frozenset({"decode_hidden", "decode_down"})
_BACKWARD = frozenset({"backward_hidden", "grad_x", "grad_weight"})
_SMALL = "its fp32 tiles have two elements a lane on AMD, which are whole sectors still"
_NARROW = {"decode_combine": "64 bits a lane are whole sectors of a workspace beside the weights"}

CASES = (
    Case(
        "gated_act_stats",
        PREFILL_TOKENS,
        _gated_act_stats,
        cost=lambda t, d, f: (2 * 3 * t * f, 0),
    ),
    Case("gated_mlp_prefill", PREFILL_TOKENS, _prefill, _prefill_cost, _DUAL),
    Case("gated_mlp_prefill_stats", PREFILL_TOKENS, _prefill_stats, _prefill_cost, _DUAL),
    # A single token is no matrix: sums in fp32, without tensor cores.
    Case("gated_mlp_decode", 1, _decode, _mlp_cost, narrow=_NARROW),
    Case("gated_mlp_decode", 8, _decode, _mlp_cost, _DECODE, _NARROW),
    Case("gated_mlp_indexed", 1, _indexed, _mlp_cost, narrow=_NARROW),
    Case("gated_mlp_indexed", 8, _indexed, _mlp_cost, _DECODE, _NARROW),
    Case(
        "gram_update",
        PREFILL_TOKENS,
        _gram_update,
        cost=lambda t, d, f: (2 * t * f + 4 * f * f, t * f * f),
        products=frozenset({"gram_update"}),
    ),
    Case(
        "gated_mlp_backward",
        PREFILL_TOKENS,
        _backward,
        # Weights and their gradients; grad_y, x and its gradient; dg, du and h written and read.
        cost=lambda t, d, f: (2 * (6 * d * f + 3 * t * d + 6 * t * f), 18 * t * d * f),
        products=_BACKWARD,
        narrow={f"{kernel} fp32": _SMALL for kernel in sorted(_BACKWARD)},
    ),
)


@dataclass(frozen=True)
class Found:
    """One specialisation, and the case, model, sparsity and dtype that lead to it."""

    case: Case
    specialisation: Specialisation
    dtype: str

    @property
    def key(self) -> str:
        """What budgets and tables call it: case, kernel, architecture, dtype."""
        name = self.specialisation.name
        what = self.case.name if name == self.case.operation else f"{self.case.name}/{name}"
        return f"{what} {self.specialisation.arch} {self.dtype}"


def find(cases: Iterable[Case]) -> list[Found]:
    """Return every different specialisation of the matrix, in its order."""
    found: dict[tuple[str, str], Found] = {}
    for case, arch, dtype in (
        (c, arch, dtype) for c in cases for arch in c.architectures for dtype in c.dtypes
    ):
        for problem in case.problems(DTYPES[dtype]):
            with recorded(arch) as launches:
                case.run(problem, case.tokens)
            for launch in launches:
                if not case.only or launch.name in case.only:
                    one = Found(case, specialise(launch, arch), dtype)
                    found.setdefault((one.key, one.specialisation.key), one)
    return list(found.values())
