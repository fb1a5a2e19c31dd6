"""Where a run's time goes: MLPs, attention, output head, and the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import nn

from prunekit.arch import MLPView, find_mlps, holds_attention
from prunekit.backward import calling_instead

PARTS = ("mlp", "attention", "head", "rest")


@dataclass(frozen=True)
class Parts:
    """Seconds of one run by part; ``rest`` is what is left: norms, embedding, framework.

    Where nothing but the MLPs was told apart, attention and head are 0 and the rest holds them.
    """

    mlp: float
    attention: float
    head: float
    rest: float

    @property
    def total(self) -> float:
        return self.mlp + self.attention + self.head + self.rest


def _mlp_modules(views: list[MLPView]) -> list[nn.Module]:
    """The MLPs' modules; where one holds attention too, as in OPT, its projections instead."""
    found: dict[int, nn.Module] = {}
    for view in views:
        own = not holds_attention(view.module)
        for module in [view.module] if own else [slot.owner for slot in view.slots.values()]:
            found[id(module)] = module
    return list(found.values())


def parts_of(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Return the modules of each part but the rest; none lies within another."""
    views = find_mlps(model, verify=False)
    mlps = _mlp_modules(views)
    attention = [
        child
        for parent in model.modules()
        for name, child in parent.named_children()
        if ("attn" in name or "attention" in name)
        and any(True for _ in child.parameters())
        and "norm" not in name
    ]
    inner = {id(m) for each in attention for m in each.modules() if m is not each}
    head = model.get_output_embeddings()
    return {
        "mlp": mlps,
        "attention": [each for each in attention if id(each) not in inner],
        "head": [] if head is None else [head],
    }


class _Clock:
    """Adds up the time between begin and end: by events on a GPU, else by the wall clock."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._pairs: list[tuple] = []
        self._begun = None

    def _now(self):
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self, *_) -> None:
        self._begun = self._now()

    def end(self, *_) -> None:
        self._pairs.append((self._begun, self._now()))

    def seconds(self) -> float:
        """What was added up since the last call."""
        pairs, self._pairs = self._pairs, []
        if self._on_gpu:
            return sum(begin.elapsed_time(end) * 1e-3 for begin, end in pairs)
        return sum(end - begin for begin, end in pairs)


@contextmanager
def _clocked(model: nn.Module) -> Iterator[dict[str, _Clock]]:
    clocks, hooks = {}, []
    try:
        for part, modules in parts_of(model).items():
            clock = clocks[part] = _Clock(model.device)
            for module in modules:
                hooks.append(module.register_forward_pre_hook(clock.begin))
                hooks.append(module.register_forward_hook(clock.end))
        yield clocks
    finally:
        for hook in hooks:
            hook.remove()


def measure_parts(model: nn.Module, run: Callable[[], None], rounds: int = 3) -> Parts:
    """Time a run's parts, by hooks around their modules.

    Args:
        model: what the run calls.
        run: waits for its device; one that was timed before needs no warm-up.
        rounds: the medians of so many runs are taken.

    Cost:
        ``rounds`` runs; a hook adds about a microsecond a module.
    """
    taken: dict[str, list[float]] = {part: [] for part in PARTS}
    with _clocked(model) as clocks:
        for _ in range(rounds):
            begun = time.perf_counter()
            run()
            whole = time.perf_counter() - begun
            for part, clock in clocks.items():
                taken[part].append(clock.seconds())
                whole -= taken[part][-1]
            taken["rest"].append(max(whole, 0.0))
    return Parts(**{part: median(values) for part, values in taken.items()})


@contextmanager
def without_mlps(model: nn.Module) -> Iterator[None]:
    """Inside, the MLPs compute nothing and give zeros."""
    with ExitStack() as stack:
        for module in _mlp_modules(find_mlps(model, verify=False)):
            outputs = getattr(module, "out_features", None)
            stack.enter_context(calling_instead(module, partial(_nothing, outputs)))
        yield


def _nothing(outputs: int | None, x: torch.Tensor, *_) -> torch.Tensor:
    return x.new_zeros(*x.shape[:-1], outputs or x.shape[-1])


def parts_by_leaving_out(whole: Sequence[float], without: Sequence[float]) -> Parts:
    """A run's parts where no hook can look inside, as in a compiled one.

    Args:
        whole, without: seconds of the run with its MLPs and `without_mlps`, round by round.
    """
    rest = median(without)
    mlp = median(w - o for w, o in zip(whole, without, strict=True))
    return Parts(mlp=max(mlp, 0.0), attention=0.0, head=0.0, rest=rest)
