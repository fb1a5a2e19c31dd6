"""What a sweep will take, from the shape of its model and the numbers of its protocol alone.

Nothing it names is read: rows that are not counted are taken to be `_ROWS` of `_LENGTH` tokens, and
every generated answer to reach its limit, so the time of evaluation is the most it can be. Beside
what `prunekit.measure.cost` counts, with P' the decoder's weights that stay, V·D the head's and N a
training's tokens, FLOP of products:

    losses       2·T·(P' + V·D)
    answers      2·(P' + V·D) a token; a step of a batch takes no less than reading the weights once
    LoRA         4·N·(P' + V·D)      the frozen weights need no gradient
    full         6·N·(P' + V·D)
    distill      6·N·(P' + V·D) + 2·N·(P + V·D)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from prunekit.experiment.cells import Cell, cells_of
from prunekit.experiment.material import MADE, MAKERS
from prunekit.experiment.needs import gathered, solves
from prunekit.experiment.protocol import Protocol, Source, Training
from prunekit.measure.cost import Phase, Rates, Shape, Work, predict
from prunekit.plan import kept_width

_ROWS, _LENGTH = 1000, 180  # of a corpus that says no more of itself
_LENGTHS = {"arithmetic": 24}
_PROMPT = 128  # tokens of a problem
_ANSWER = 256  # and of an answer, where only the task knows its limit
_ADAPTED = 0.03  # LoRA's weights beside the model's, with their optimiser's state
_STEP = 1.3e-3  # seconds a layer of a decoding step beside its weights, on one CPU: Python, mostly
_ELIMINATE = ("auto", "reconstruction", "reconstruction_fisher")


@dataclass(frozen=True)
class CellForecast:
    """One cell: its widths and bytes, and the most seconds of its parts."""

    cell: Cell
    sparsity: float
    widths: tuple[int, ...]
    bytes: int
    prune: float
    losses: float
    answers: float
    recover: float

    @property
    def seconds(self) -> float:
        """Of the whole cell."""
        return self.prune + self.losses + self.answers + self.recover


@dataclass(frozen=True)
class SweepForecast:
    """A sweep: what comes before the cells, the cells, and what it holds and writes at most."""

    before: tuple[Phase, ...]
    cells: tuple[CellForecast, ...]
    measuring: float
    peak_bytes: float
    disk_bytes: float

    @property
    def seconds(self) -> float:
        """Of the whole sweep."""
        cells = sum(cell.seconds for cell in self.cells)
        return sum(phase.seconds for phase in self.before) + cells + self.measuring


def predict_sweep(protocol: Protocol, shape: Shape, rates: Rates) -> SweepForecast:
    """Predict every cell of a protocol.

    Args:
        protocol: what to do.
        shape: of its model.
        rates: of the machine.
    """
    wanted = gathered(protocol)
    work = _work(protocol, wanted)
    before = _before(protocol, shape, rates, work)
    cells, peaks, done, scored = [], [phase.bytes for phase in before], set(), set()
    for cell in cells_of(protocol):
        mine = replace(work, calibrates=False, method=cell.compensate)
        if cell.criterion in _ELIMINATE and solves(cell) and cell.criterion not in scored:
            scored.add(cell.criterion)  # scores serve every cell that asks for them
            mine = replace(mine, eliminates=True)
        fresh = cell.sparsity > 0 and cell.pruned not in done
        found, held = _cell(protocol, shape, rates, mine if fresh else None, cell)
        done.add(cell.pruned)
        cells.append(found)
        peaks.append(held)
    measuring, disk = _measuring(protocol, shape, rates, cells)
    if wanted:
        disk += _statistics(shape, wanted)
    return SweepForecast(tuple(before), tuple(cells), measuring, max(peaks), disk)


def _rows(source: Source) -> tuple[int, int]:
    """How many rows a corpus has, and how many tokens a row."""
    rows = source.rows or (MADE if source.source in MAKERS else _ROWS)
    return rows, _LENGTHS.get(source.source, _LENGTH)


def _tokens(sources: Sequence[Source], share: float = 1.0) -> int:
    return round(sum(rows * length * share for rows, length in map(_rows, sources)))


def _work(protocol: Protocol, wanted: dict[str, bool] | None) -> Work:
    share = 1 - protocol.held_out
    tokens = _tokens([protocol.target], share)
    return Work(
        tokens=tokens,
        prompts=round(_rows(protocol.target)[0] * share),
        gram=bool(wanted and wanted["gram"]),
        gradients=bool(wanted and (wanted["gradients"] or wanted["taylor"])),
        eliminates=False,
        method="none",
        calibrates=wanted is not None,
        others=_tokens(protocol.distractors, share),
        scored=tokens,
    )


def _before(protocol: Protocol, shape: Shape, rates: Rates, work: Work) -> list[Phase]:
    phases = predict(shape, rates, work, [width for width, _ in shape.mlps])[:-1]
    if protocol.make is not None:
        tokens = _trained(protocol.make, protocol)
        seconds, held = _training(
            protocol.make.settings().method, tokens, shape, rates, shape.decoder
        )
        flops = seconds * rates.products
        phases.insert(0, Phase("make", flops, seconds, held + shape.total * shape.itemsize))
    return phases


def _cell(
    protocol: Protocol, shape: Shape, rates: Rates, work: Work | None, cell: Cell
) -> tuple[CellForecast, float]:
    """The forecast of a cell and the bytes it holds; without work, it is pruned already."""
    widths = tuple(_width(width, cell, protocol.multiple_of) for width, _ in shape.mlps)
    dense = sum(width for width, _ in shape.mlps)
    size = shape.pruned_bytes(widths)
    weights = shape.decoder - shape.total + size / shape.itemsize
    prune, held = 0.0, size + shape.total * shape.itemsize
    if work is not None:
        phases = predict(shape, rates, work, widths)[:-1]
        prune = sum(phase.seconds for phase in phases)
        held = max([held, *(phase.bytes + size for phase in phases)])
    recover = 0.0
    if cell.recovery and protocol.recovery:
        tokens = _trained(protocol.recovery, protocol)
        recover, more = _training(cell.recovery, tokens, shape, rates, weights)
        held = max(held, 2 * size + shape.total * shape.itemsize + more)
    found = CellForecast(
        cell,
        1 - sum(widths) / dense,
        widths,
        size,
        prune,
        _losses(protocol, shape, rates, weights),
        _answers(protocol, shape, rates, weights, size),
        recover,
    )
    return found, held


def _width(width: int, cell: Cell, multiple_of: int) -> int:
    return kept_width(width, cell.sparsity, multiple_of) if cell.sparsity else width


def _losses(protocol: Protocol, shape: Shape, rates: Rates, weights: float) -> float:
    tokens = _tokens([protocol.target, *protocol.distractors], protocol.held_out)
    tokens += _tokens(protocol.off_task)
    return 2 * tokens * (weights + shape.head) / rates.products


def _answers(protocol: Protocol, shape: Shape, rates: Rates, weights: float, size: int) -> float:
    seconds = 0.0
    for task in protocol.tasks:
        problems, tokens = task.problems or MADE, task.max_new_tokens or _ANSWER
        batches = -(-problems // protocol.batch_size)
        products = 2 * protocol.batch_size * (weights + shape.head) / rates.products
        # A copy reads and writes what decoding only reads.
        step = max(products, 2 * size / rates.copy) + _STEP * shape.layers
        seconds += batches * (tokens * step + _PROMPT * products)
    return seconds


def _trained(training: Training, protocol: Protocol) -> int:
    """The tokens that a training reads."""
    settings = training.settings()
    rows, length = _rows(training.corpus or protocol.target)
    if not training.corpus:
        rows = round(rows * (1 - protocol.held_out))
    rows = min(rows, settings.limit or rows)
    steps = settings.steps or settings.epochs * rows / (settings.batch * settings.accumulation)
    return round(steps * settings.batch * settings.accumulation * length)


def _training(
    method: str, tokens: int, shape: Shape, rates: Rates, weights: float
) -> tuple[float, float]:
    """Seconds of a training, and the bytes that it holds beside the model."""
    times = 4 if method == "lora" else 6
    flops = times * tokens * (weights + shape.head)
    if method == "distill":
        flops += 2 * tokens * (shape.decoder + shape.head)
    state = _ADAPTED if method == "lora" else 16 / shape.itemsize
    return flops / rates.products, state * shape.total * shape.itemsize


def _measuring(
    protocol: Protocol, shape: Shape, rates: Rates, cells: Sequence[CellForecast]
) -> tuple[float, float]:
    """Seconds that speed and memory take, and the bytes that are on disk meanwhile."""
    m, by_width = protocol.measure, {cell.widths: cell for cell in cells}
    seconds, largest = 0.0, max(cell.bytes for cell in cells)
    for cell in by_width.values():
        weights = shape.decoder - shape.total + cell.bytes / shape.itemsize + shape.head
        step = 2 * cell.bytes / rates.copy + _STEP * shape.layers
        once = 2 * m.prompt * weights / rates.products + m.generate * step
        seconds += (m.rounds + 1) * once if m.speed else 0
        seconds += 10 + once if m.memory else 0
    return seconds, float(largest) if m.memory else 0.0


def _statistics(shape: Shape, wanted: dict[str, bool]) -> float:
    grams = sum(width**2 for width, _ in shape.mlps) if wanted["gram"] else 0
    metrics = len(shape.mlps) * shape.hidden**2 if wanted["gradients"] else 0
    return 4.0 * (grams + metrics) + 8 * 7 * 2 * sum(width for width, _ in shape.mlps)
