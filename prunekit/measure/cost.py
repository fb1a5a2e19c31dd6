"""What pruning will cost on this machine: time and memory by phase, from shapes alone.

With L layers, hidden size D, width F (F' kept), P the decoder layers' weights, V·D the
head's, T tokens in prompts of S, T' of them in completions, b bytes a weight. FLOP of products:

    forward      2·T·P                        every statistic
    Gram         T·F² an MLP                  one triangle, in fp32
    gradients    2·T·P + 4·T'·V·D             backwards; 2·T·P more where activations do not fit
                 + T·D²                       an MLP
    score        5/3·F³ + D·F² + 10·D³        an MLP, in fp64: inverse, elimination, root
    repair       4·T·P - 2·T·D·F              in fp32 that multiplies as the weights' dtype
                 - 2·T·D·(F - F')             for the gate and for the up projection
                 + T·F'² + 6·T·D·F'           an MLP
                 + 6·(F'³/3 + 2·D·F'²)        an MLP, in fp64: five ridges and the best once more
    rehearsal    as the repair                each of two, for budget
    teacher      2·T·V·D                      what distillation imitates
    distill      6·1024·(P' + V·D) a step     or the minutes it is given
    settle       5/8·T·(P' + V·D)             five ways along, on a sixteenth of the prompts

An expert sees the share of the tokens that is routed to it. Attention's own products, 2·T·S·D a
layer, run at a fraction of a large product's rate; what is computed element by element moves
`_PASSES` times D and F a token and layer, and ten times V·4 bytes where the loss is taken.
Everything else (Python, reading and writing files) is left out or a constant of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from prunekit.arch import MLPView, decoder_layers, find_mlps, text_config
from prunekit.backward import HEAD_BYTES, KEPT_BYTES, kept_bytes
from prunekit.gradients import BATCH_TOKENS
from prunekit.layerwise import disk_bytes
from prunekit.measure.memory import parameter_count
from prunekit.ops.gram import bf16_products
from prunekit.ops.linear import linear

# Fitted to one run of SmolLM2-135M in bf16 on an AVX512-BF16 processor, 2 threads.
_ATTENTION = 12  # times as long as a large product's FLOP take attention's
_PASSES = {"D": 80, "F": 30}  # reads and writes a token and layer: of D in fp32, of F in the dtype
_STEP = 1e-4  # seconds to eliminate one neuron beside its FLOP: small operations, one by one
_PROCESS = 500e6  # bytes of a Python with torch and transformers
_SLACK = 1.3  # by which an allocator's pieces exceed what they hold
_DISK = 5e8  # bytes a second that a checkpoint is written at


@dataclass(frozen=True)
class Rates:
    """What this machine does: FLOP/s of products in the model's dtype, in fp32 that multiplies as
    the dtype does, and of a Cholesky factor in fp64; bytes/s read and written by a copy."""

    products: float
    wide: float
    fp64: float
    copy: float


@dataclass(frozen=True)
class Shape:
    """What of a model its cost depends on.

    Attributes:
        mlps: (F, share of the tokens that it sees) of each.
        matrices: of an MLP: 3 with a gate, else 2.
        layers, hidden: L, D.
        decoder: P, each expert counted by its share; head: V·D; total: all parameters, tied ones
            once.
        itemsize: b.
        kept: bytes that a backward keeps of a token.
    """

    mlps: tuple[tuple[int, float], ...]
    matrices: int
    layers: int
    hidden: int
    decoder: float
    head: int
    vocabulary: int
    total: int
    itemsize: int
    kept: int

    @classmethod
    def of(cls, model: nn.Module) -> Shape:
        """The shape of a model, which may lie on the meta device."""
        views = find_mlps(model, verify=False)
        share = {True: _routed(model, views), False: 1.0}
        mlps = tuple((v.width, share[v.kind == "experts"]) for v in views)
        hidden, matrices = views[0].down.shape[0], 2 + (views[0].up is not None)
        head = model.get_output_embeddings().weight
        inside = {p for layer in decoder_layers(model, views) for p in layer.parameters()}
        idle = sum(matrices * hidden * width * (1 - part) for width, part in mlps)
        return cls(
            mlps=mlps,
            matrices=matrices,
            layers=len({view.layer for view in views}),
            hidden=hidden,
            decoder=sum(p.numel() for p in inside) - idle,
            head=head.numel(),
            vocabulary=head.shape[0],
            total=parameter_count(model),
            itemsize=head.element_size(),
            kept=kept_bytes(views),
        )

    def pruned_bytes(self, widths: Sequence[int]) -> int:
        """Bytes of the checkpoint with these widths."""
        gone = sum(width - kept for (width, _), kept in zip(self.mlps, widths, strict=True))
        return (self.total - self.matrices * self.hidden * gone) * self.itemsize


@dataclass(frozen=True)
class Phase:
    """A part of the work: its products' FLOP, seconds, and the bytes that are held meanwhile."""

    name: str
    flops: float
    seconds: float
    bytes: float


@dataclass(frozen=True)
class Work:
    """What a run does: T tokens in prompts of S on average, what is gathered, and how it ends.

    ``calibrates`` is False where statistics are at hand; ``eliminates`` where the criterion is one
    of reconstruction; ``others`` counts the distractors' tokens, which only run forwards,
    ``scored`` those of T that the loss is taken of; ``minutes`` or, where they are given, ``steps``
    bound a distillation; ``rehearsals`` are repairs that only show what a plan is worth;
    ``offloaded`` where one layer is in memory at a time.
    """

    tokens: int
    prompts: int
    gram: bool
    gradients: bool
    eliminates: bool
    method: str
    calibrates: bool = True
    others: int = 0
    scored: int = 0
    minutes: float = 0.0
    steps: int = 0
    rehearsals: int = 0
    offloaded: bool = False


def _routed(model: nn.Module, views: list[MLPView]) -> float:
    """The share of the tokens that an expert sees."""
    experts = max((view.expert or 0 for view in views), default=0) + 1
    return getattr(text_config(model), "num_experts_per_tok", experts) / experts


def _rate(work: float, run: Callable[[], object], device: torch.device) -> float:
    """Work a second: the median of runs for a third of a second, one before them not counted."""
    seconds: list[float] = []
    for _ in range(2):
        run()
    while len(seconds) < 3 or sum(seconds) < 0.3:
        begun = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return work / sorted(seconds)[len(seconds) // 2]


@torch.inference_mode()
def measure_rates(shape: Shape, dtype: torch.dtype, device: torch.device | str = "cpu") -> Rates:
    """Measure in a second or two what the prediction needs: two products, a factor and a copy."""
    device = torch.device(device)
    hidden, width = min(shape.hidden, 4096), min(shape.mlps[0][0], 8192)
    x = torch.randn(1024, hidden, device=device)
    w = torch.randn(width, hidden, device=device)
    flops = 2.0 * x.shape[0] * hidden * width
    low = x.to(dtype), w.to(dtype)
    products = _rate(flops, lambda: linear(*low), device)
    wide = products
    if dtype == torch.bfloat16:
        with bf16_products():
            wide = _rate(flops, lambda: F.linear(x, w), device)
    size = 1024
    spd = torch.eye(size, dtype=torch.float64, device=device) * size + 1
    factor = _rate(size**3 / 3, lambda: torch.linalg.cholesky(spd), device)
    source = torch.ones(1 << 24, device=device)  # 64 MB: beyond the caches
    target = torch.empty_like(source)
    copy = _rate(2.0 * source.nbytes, lambda: target.copy_(source), device)
    return Rates(products, wide, factor, copy)


def predict(shape: Shape, rates: Rates, work: Work, widths: Sequence[int]) -> list[Phase]:
    """Predict every phase of a run.

    Args:
        shape: of the dense model.
        rates: of the machine.
        work: what is to be done.
        widths: F' of each MLP.

    Returns:
        One a phase, in order; the run takes the sum of the seconds and the maximum of the bytes.
    """
    base = _PROCESS + (_one_layer(shape, work) if work.offloaded else _whole(shape, work))
    phases = []
    if work.calibrates:
        phases.append(_forward(shape, rates, work, base))
        if work.gradients:
            phases.append(_gradients(shape, rates, work, base))
    if work.eliminates:
        phases.append(_score(shape, rates, base))
    if work.method in ("sequential", "distill"):
        repair = _sequential(shape, rates, work, widths, base)
        if work.rehearsals:
            twice = work.rehearsals * repair.flops, work.rehearsals * repair.seconds
            phases.append(Phase("rehearsal", *twice, repair.bytes))
        phases.append(repair)
    elif work.method == "lstsq":
        phases.append(_lstsq(shape, rates, work, widths, base))
    if work.method == "distill":
        phases.append(_teacher(shape, rates, work, base))
        phases += _distill(shape, rates, work, widths, base)
    written = shape.pruned_bytes(widths)
    held = 0 if work.offloaded else written
    phases.append(Phase("save", 0.0, written / _DISK, base + held))
    return phases


def spilled_bytes(shape: Shape, work: Work) -> int:
    """What lies on disk while the work runs, where one layer is in memory at a time."""
    if not work.offloaded:
        return 0
    widths = [width for width, _ in shape.mlps]
    sizes = shape.hidden, shape.layers, shape.itemsize
    return disk_bytes(widths, *sizes, work.tokens, gram=work.gram, backwards=work.gradients)


def _whole(shape: Shape, work: Work) -> float:
    """Bytes of the weights and of the statistics' matrices."""
    grams = sum(width**2 for width, _ in shape.mlps) if work.gram else 0
    metrics = len(shape.mlps) * shape.hidden**2 if work.gradients else 0
    return shape.total * shape.itemsize + 4 * (grams + metrics)


def _one_layer(shape: Shape, work: Work) -> float:
    """Bytes of a layer's weights or of those in none, and of an MLP's matrices as they close."""
    weights = max(shape.total - shape.decoder, shape.decoder / shape.layers)
    largest = max(width for width, _ in shape.mlps) if work.gram else 0
    return weights * shape.itemsize + 12 * largest**2


def _around(shape: Shape, rates: Rates, work: Work, rate: float, itemsize: int) -> float:
    """Seconds of a forward beside its products: attention, and what goes element by element."""
    attention = 2 * work.tokens / max(work.prompts, 1) * shape.hidden * shape.layers
    width = sum(width * part for width, part in shape.mlps)
    moved = 4 * _PASSES["D"] * shape.hidden * shape.layers + itemsize * _PASSES["F"] * width
    return work.tokens * (_ATTENTION * attention / rate + moved / rates.copy)


def _forward(shape: Shape, rates: Rates, work: Work, base: float) -> Phase:
    products = 2 * (work.tokens + work.others) * shape.decoder
    gram = sum(work.tokens * part * width**2 for width, part in shape.mlps) if work.gram else 0
    seconds = products / rates.products + gram / rates.wide
    seconds += _around(shape, rates, work, rates.products, shape.itemsize)
    batch = 2048 * (max(width for width, _ in shape.mlps) * 6 + shape.hidden * 10)
    return Phase("calibrate", products + gram, seconds, base + _SLACK * shape.itemsize * batch)


def _gradients(shape: Shape, rates: Rates, work: Work, base: float) -> Phase:
    held = BATCH_TOKENS * shape.kept
    again = work.offloaded or held > KEPT_BYTES
    products = work.tokens * (4 if again else 2) * shape.decoder + 4 * work.scored * shape.head
    grams = work.tokens * sum(part for _, part in shape.mlps) * shape.hidden**2
    around = _around(shape, rates, work, rates.products, shape.itemsize) * (3 if again else 2)
    loss = 40 * work.scored * shape.vocabulary / rates.copy
    seconds = products / rates.products + grams / rates.wide + around + loss
    if again:
        held /= shape.layers
    if again and not work.offloaded:
        held += BATCH_TOKENS * shape.layers * 2 * shape.hidden
    return Phase("gradients", products + grams, seconds, base + _SLACK * held + 3 * HEAD_BYTES)


def _score(shape: Shape, rates: Rates, base: float) -> Phase:
    d = shape.hidden
    flops = sum(5 / 3 * f**3 + d * f**2 + 10 * d**3 for f, _ in shape.mlps)
    steps = sum(f for f, _ in shape.mlps) * _STEP
    largest = max(f for f, _ in shape.mlps)
    held = 16 * largest**2 + 16 * d * largest
    return Phase("score", flops, flops / rates.fp64 + steps, base + _SLACK * held)


def _solve(shape: Shape, kept: int, fits: int) -> float:
    return fits * (kept**3 / 3 + 2 * shape.hidden * kept**2)


def _sequential(shape, rates, work: Work, widths: Sequence[int], base: float) -> Phase:
    d, tokens = shape.hidden, work.tokens
    into = (shape.matrices - 1) * d  # of the gate and up projections a neuron
    products = 4 * tokens * shape.decoder
    products += sum(
        part * tokens * (kept**2 + 6 * d * kept - 2 * d * width - 2 * into * (width - kept))
        for (width, part), kept in zip(shape.mlps, widths, strict=True)
    )
    solves = sum(_solve(shape, kept, 6) for kept in widths)
    around = 2 * _around(shape, rates, work, rates.wide, 4)
    seconds = products / rates.wide + around + solves / rates.fp64
    largest, layer = max(widths), shape.decoder / shape.layers
    held = 8 * tokens * d + shape.itemsize * tokens * largest + 40 * largest**2 + 4 * layer
    downs = shape.itemsize * d * sum(width for width, _ in shape.mlps)  # put back at the end
    repairs = 8 * d * sum(widths)
    return Phase("repair", products + solves, seconds, base + _SLACK * held + downs + repairs)


def _teacher(shape, rates, work: Work, base: float) -> Phase:
    products = 2 * work.tokens * shape.head
    seconds = products / rates.products + 10 * work.tokens * shape.vocabulary / rates.copy
    hidden = 4 * work.tokens * shape.hidden
    logits = 10 * BATCH_TOKENS * shape.vocabulary
    return Phase("teacher", products, seconds, base + hidden + _SLACK * logits)


def _distill(shape, rates, work: Work, widths: Sequence[int], base: float) -> list[Phase]:
    gone = shape.total - shape.pruned_bytes(widths) / shape.itemsize
    weights = shape.decoder - gone
    step = 6 * BATCH_TOKENS * (weights + shape.head)
    steps = work.steps or 60 * work.minutes * rates.products / step
    held = 20 * weights + BATCH_TOKENS * (shape.kept + 16 * shape.vocabulary)
    flops, settling = steps * step, 5 / 8 * work.tokens * (weights + shape.head)
    return [
        Phase("distill", flops, flops / rates.products, base + _SLACK * held),
        Phase("settle", settling, settling / rates.products, base + 28 * weights),
    ]


def _lstsq(shape, rates, work: Work, widths: Sequence[int], base: float) -> Phase:
    flops = sum(_solve(shape, kept, 1) for kept in widths)
    largest = max(width for width, _ in shape.mlps)
    repairs = max(widths) if work.offloaded else sum(widths)
    held = 16 * largest**2 + 8 * shape.hidden * repairs
    return Phase("repair", flops, flops / rates.fp64, base + _SLACK * held)
