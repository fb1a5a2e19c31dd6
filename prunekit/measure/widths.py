"""How an MLP's time depends on its width on this machine: which widths cost more than they save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import torch
import torch.nn.functional as F

from prunekit import ops
from prunekit.arch import MLPView
from prunekit.errors import InputError
from prunekit.measure.timing import confidence, interleave

GRID = 256  # neurons between two widths that nothing cuts: every vector and tile divides them
ANCHORS = 4  # of these, from a third of the dense width up
TOLERATED = 0.05  # of the time: a width that takes less more than its neurons is no cliff
_POOL = {"cpu": 96 << 20, "cuda": 256 << 20}  # bytes of weights read in turn, beyond all caches


@dataclass(frozen=True)
class Alignment:
    """Widths that are multiples of a power of two and of no higher one, up to the grid's.

    Attributes:
        multiple: that power.
        widths: those measured.
        excess: by tokens at once, the time beyond that of widths on the grid, as a share: the
            median over widths and rounds; interval is its 95 % interval.
    """

    multiple: int
    widths: tuple[int, ...]
    excess: dict[int, float]
    interval: dict[int, tuple[float, float]]

    @property
    def cliffs(self) -> dict[int, float]:
        """The excess where it is more than ``TOLERATED`` and no noise, by tokens at once."""
        return {
            count: share
            for count, share in self.excess.items()
            if share > TOLERATED and self.interval[count][0] > 0
        }


@dataclass(frozen=True)
class Widths:
    """An MLP's times by width.

    Attributes:
        seconds: by tokens at once and width, the median.
        alignments: what falls off the grid costs, the least aligned first.
    """

    seconds: dict[int, dict[int, float]]
    alignments: tuple[Alignment, ...]

    @property
    def advice(self) -> int:
        """The least power of two of which no multiple is a cliff."""
        found = GRID
        for each in reversed(self.alignments):
            if each.cliffs:
                break
            found = each.multiple
        return found


def anchors_of(width: int) -> list[int]:
    """Widths on the grid, from a third of a dense width to all of it, ascending.

    Raises:
        InputError: there are not two.
    """
    most = width // GRID
    least = max(1, most // 3)
    count = min(ANCHORS, most - least + 1)
    if count < 2:
        raise InputError(f"widths: got an MLP of {width} neurons; expected at least {2 * GRID}")
    return [GRID * round(least + (most - least) * i / (count - 1)) for i in range(count)]


def measure_widths(
    view: MLPView,
    *,
    tokens: Sequence[int] = (1, 256),
    rounds: int = 15,
    compact: bool = False,
    device: str | torch.device = "cpu",
) -> Widths:
    """Time one MLP on and beside a grid of widths, interleaved.

    A width beside the grid is the one below it by a power of two, and what it should take lies on
    the line between its neighbours on the grid. Weights are random, and as many that no cache
    keeps them from one MLP to the next.

    Args:
        view: of an MLP, whose shapes, activation and dtype count; it may be on the meta device.
        tokens: how many go through at once: 1 as in decoding, 256 as in a prefill.
        rounds: how often each width is timed, after one that is not.
        compact: as `CompactMLP` computes it, and not by torch's products.
        device: where to measure.

    Raises:
        InputError: the MLP is one of experts, or too narrow.

    Cost:
        rounds + 1 passes a width over 96 MB of weights (256 MB on a GPU), and one product of the
        larger number of tokens; about ANCHORS·9 widths.
    """
    if view.kind == "experts":
        raise InputError(f"widths: {view.name} is of experts, whose tokens come apart")
    anchors = anchors_of(view.width)
    beside = [(anchor, 1 << bit) for anchor in anchors[1:] for bit in range(GRID.bit_length() - 1)]
    pool = _pool(view, torch.device(device))
    cases = {
        (count, width): _case(view, pool, width, count, compact)
        for count in tokens
        for width in [*anchors, *(anchor - step for anchor, step in beside)]
    }
    taken = interleave(cases, rounds, warmup=1)
    alignments = []
    for step in sorted({step for _, step in beside}):
        widths = tuple(anchor - step for anchor in anchors[1:])
        ratios = {c: _ratios(taken, c, anchors, widths) for c in tokens}
        alignments.append(
            Alignment(
                step,
                widths,
                {c: median(r) - 1 for c, r in ratios.items()},
                {c: tuple(end - 1 for end in confidence(r)) for c, r in ratios.items()},
            )
        )
    seconds = {c: {w: median(taken[c, w]) for w in sorted({w for _, w in cases})} for c in tokens}
    return Widths(seconds, tuple(alignments))


def _ratios(taken, count: int, anchors: list[int], widths: tuple[int, ...]) -> list[float]:
    """Measured over expected times of some widths, round by round."""
    found = []
    for width, (low, high) in zip(widths, pairwise(anchors), strict=True):
        share = (width - low) / (high - low)
        rows = zip(taken[count, width], taken[count, low], taken[count, high], strict=True)
        found += [time / (a + (b - a) * share) for time, a, b in rows]
    return found


def _pool(view: MLPView, device: torch.device) -> torch.Tensor:
    """Weights for at least one MLP of the dense width, small enough to add up."""
    whole = _numbers(view, view.width)
    size = max(whole, _POOL.get(device.type, _POOL["cpu"]) // view.gate.element_size())
    pool = torch.empty(size, dtype=view.gate.dtype, device=device)
    return pool.uniform_(-0.05, 0.05, generator=torch.Generator(device).manual_seed(0))


def _numbers(view: MLPView, width: int) -> int:
    return (2 if view.kind == "plain" else 3) * width * view.down.shape[0]


def _case(
    view: MLPView, pool: torch.Tensor, width: int, count: int, compact: bool
) -> Callable[[], None]:
    """A function that puts ``count`` tokens through MLPs of a width that lie one after another."""
    hidden, size = view.down.shape[0], _numbers(view, width)
    copies = pool.numel() // size if count == 1 else 1
    parts = [_weights(view, pool[i * size : (i + 1) * size], width) for i in range(copies)]
    x = torch.ones(count, hidden, dtype=pool.dtype, device=pool.device)
    run = _compact if compact else _plain

    @torch.inference_mode()
    def case() -> None:
        for gate, up, down in parts:
            run(x, gate, up, down, view)
        if pool.is_cuda:
            torch.cuda.synchronize()

    return case


def _weights(view: MLPView, part: torch.Tensor, width: int):
    """gate [F', D], up likewise or None, and down [D, F']; fused, gate has both: [2·F', D]."""
    hidden = view.down.shape[0]
    rows, down = part.split([part.numel() - width * hidden, width * hidden])
    rows, up = rows.view(-1, hidden), None
    if view.kind == "gated":
        rows, up = rows.chunk(2)
    return rows, up, down.view(hidden, width)


def _plain(x, gate, up, down, view: MLPView) -> torch.Tensor:
    """As transformers computes it: of fused rows in one product."""
    if view.kind == "fused":
        one, other = F.linear(x, gate).chunk(2, dim=-1)
        return F.linear(ops.ACTIVATIONS[view.act](one) * other, down)
    biases = None, None, None
    return ops.gated_mlp_ref(x, gate, up, down, *biases, ops.activation_code(view.act))


def _compact(x, gate, up, down, view: MLPView) -> torch.Tensor:
    if view.kind == "fused":
        gate, up = gate.chunk(2)
    return ops.gated_mlp(x, gate, up, down, act=view.act)
