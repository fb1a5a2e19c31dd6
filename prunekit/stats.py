"""What calibration remembers of a model: sums per neuron, per class of corpus, and their counts.

Memory is O(L·F) whatever the number of prompts, O(L·F²) with the Gram matrix and O(L·D²) with that
of the loss gradient. Sums are folded in fp64, so splitting or merging corpora changes no statistic
beyond fp64 rounding (the Gram matrices: fp32).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from prunekit import files, ops, ranks
from prunekit.arch import MLPView, fingerprint
from prunekit.batching import Tokens
from prunekit.errors import InputError
from prunekit.ops.gated_act_stats import (
    PROMPT_ABS_SUM,
    PROMPT_SQUARE_SUM,
    TOKEN_ACTIVE,
    TOKEN_MAX_ABS,
    TOKEN_SUM,
)
from prunekit.tensors import Entry, OnDisk
from prunekit.values import conform

_KIND = "neuron-stats"
_UNFINISHED = "unfinished neuron-stats"
_SUMS = (
    "prompt_sum",
    "prompt_square_sum",
    "token_sum",
    "token_abs_sum",
    "token_square_sum",
    "active",
)
# What a calibration need not gather; None where it did not.
_OPTIONAL = ("prompt_norm_sum", "gram", "taylor", "gradient_gram")
_MATRICES = ("gram", "gradient_gram")
_ON_DISK = tuple(f".{name}" for name in _MATRICES)
_CORPUS = {"class": str, "name": str, "hash": str, "prompts": int, "tokens": int}
_HEADER = {
    "names": [str],
    "counts": {str: [[float]]},
    "fingerprint": str,
    "provenance": {"model?": str, "corpora?": [_CORPUS]},
}
# Who lacks one of these is told how to get it.
REMEDIES = {
    "prompt_norm_sum": "these were written before prunekit kept it; calibrate again",
    "gram": "calibrate with --gram",
    "taylor": "calibrate with --taylor",
    "gradient_gram": "calibrate with --gradients",
}


@dataclass
class NeuronSums:
    """The statistics of one MLP over one class of prompts; every vector is [F].

    Attributes:
        prompts: how many prompts reached this MLP (for an expert: sent it a token).
        tokens: how many tokens did; both are whole numbers unless `scaled`.
        prompt_sum, prompt_square_sum: fp64, over prompts, of a = mean over its tokens of abs h.
        token_sum, token_abs_sum, token_square_sum: fp64, over tokens, of h, abs h, h².
        active: fp64, tokens whose gate was open (gate > 0).
        max_abs: fp32, the largest abs h.
        prompt_norm_sum: fp64, over prompts, of the L2 norm over its tokens of h; None in files
            written before it was kept.
        gram: fp32 [F, F], HᵀH, or None; symmetric. Its batches' sums are rounded as they are
            added: after 10⁹ tokens a varying neuron's is within 10⁻³, one that gave the same in
            every batch at worst within 2⁻⁶.
        taylor: fp64, over prompts, of the sum over the neuron's weights of abs(w·∂loss/∂w), the
            loss summed over the completion's tokens; or None.
        gradient_gram: fp32 [D, D], Σ g gᵀ over tokens, g the gradient of that loss with respect to
            this MLP's output; or None; symmetric.

    The matrices of statistics from a file stay there, and are read whenever they are asked for.
    """

    prompts: float
    tokens: float
    prompt_sum: torch.Tensor
    prompt_square_sum: torch.Tensor
    token_sum: torch.Tensor
    token_abs_sum: torch.Tensor
    token_square_sum: torch.Tensor
    active: torch.Tensor
    max_abs: torch.Tensor
    prompt_norm_sum: torch.Tensor | None = None
    gram: torch.Tensor | None = OnDisk()  # noqa: RUF009 (a descriptor)
    taylor: torch.Tensor | None = None
    gradient_gram: torch.Tensor | None = OnDisk()  # noqa: RUF009 (a descriptor)

    @classmethod
    def zeros(cls, width: int, device: torch.device | str, *, gram: bool = False) -> NeuronSums:
        names = (*_SUMS, "prompt_norm_sum")
        sums = {name: torch.zeros(width, dtype=torch.float64, device=device) for name in names}
        largest = torch.zeros(width, device=device)
        matrix = torch.zeros(width, width, device=device) if gram else None
        return cls(prompts=0, tokens=0, **sums, max_abs=largest, gram=matrix)

    def add(
        self,
        prompt_stats: torch.Tensor,
        token_stats: torch.Tensor,
        lengths: list[int],
    ) -> None:
        """Fold in one batch.

        Args:
            prompt_stats, token_stats: as `ops.gated_act_stats` returns them.
            lengths: tokens a prompt; those without any count nothing.
        """
        seen = [p for p, length in enumerate(lengths) if length]
        if not seen:
            return
        wide = prompt_stats.double()
        abs_sums, square_sums = wide[PROMPT_ABS_SUM], wide[PROMPT_SQUARE_SUM]
        counts = torch.tensor(lengths, dtype=torch.float64, device=wide.device).clamp_min(1)
        means = abs_sums / counts[:, None]
        self.prompts += len(seen)
        self.tokens += sum(lengths)
        self.prompt_sum += means.sum(0)
        self.prompt_square_sum += means.square().sum(0)
        self.prompt_norm_sum += square_sums.sqrt().sum(0)
        self.token_abs_sum += abs_sums.sum(0)
        self.token_square_sum += square_sums.sum(0)
        self.token_sum += token_stats[TOKEN_SUM]
        self.active += token_stats[TOKEN_ACTIVE]
        torch.maximum(self.max_abs, token_stats[TOKEN_MAX_ABS], out=self.max_abs)

    def add_up_ranks(self) -> None:
        """Make these the statistics of what all processes of the run saw, in place."""
        counts = torch.tensor([self.prompts, self.tokens], dtype=torch.float64)
        ranks.add_up_([counts, *(getattr(self, name) for name in (*_SUMS, *_OPTIONAL))])
        ranks.largest_(self.max_abs)
        self.prompts, self.tokens = (int(count) for count in counts)

    def merge(self, other: NeuronSums) -> NeuronSums:
        """The statistics of both sets of prompts together; what one of them lacks is None."""
        optional = {}
        for name in _OPTIONAL:
            mine, theirs = getattr(self, name), getattr(other, name)
            optional[name] = None if mine is None or theirs is None else mine + theirs
        return NeuronSums(
            prompts=self.prompts + other.prompts,
            tokens=self.tokens + other.tokens,
            **{name: getattr(self, name) + getattr(other, name) for name in _SUMS},
            max_abs=torch.maximum(self.max_abs, other.max_abs),
            **optional,
        )

    def scaled(self, weight: float) -> NeuronSums:
        """The statistics of the same prompts, each of them counted ``weight`` times."""
        optional = {name: getattr(self, name) for name in _OPTIONAL}
        return NeuronSums(
            prompts=weight * self.prompts,
            tokens=weight * self.tokens,
            **{name: weight * getattr(self, name) for name in _SUMS},
            max_abs=self.max_abs,
            **{n: None if value is None else weight * value for n, value in optional.items()},
        )

    def held(self, name: str) -> torch.Tensor | Entry | None:
        """One of the statistics, or where it lies on disk, without reading it."""
        return vars(type(self))[name].held(self) if name in _MATRICES else getattr(self, name)

    def tensors(self) -> dict[str, torch.Tensor | Entry]:
        """All that is there, by name, without reading what lies on disk."""
        found = {name: self.held(name) for name in (*_SUMS, "max_abs", *_OPTIONAL)}
        return {name: value for name, value in found.items() if value is not None}

    def to(self, device: torch.device | str) -> NeuronSums:
        """Move to a device, in place; what lies on disk is read, so that it can be added to."""
        for name in self.tensors():
            setattr(self, name, getattr(self, name).to(device))
        return self

    def finish(self) -> NeuronSums:
        """Move to the CPU and mirror the Gram matrices, in place: the end of a calibration.

        What lies on disk is finished already.
        """
        for name, value in self.tensors().items():
            if isinstance(value, torch.Tensor):
                value = value.cpu()
                setattr(self, name, ops.symmetrize_(value) if name in _MATRICES else value)
        return self

    def put_away(self, stem: Path) -> None:
        """Write the matrices that are in memory to files that begin so, and leave them there."""
        for name in _MATRICES:
            value = self.held(name)
            if isinstance(value, torch.Tensor):
                path = stem.with_name(f"{stem.name}.{name}")
                files.write_tensors(path, {name: value}, name, {})
                setattr(self, name, files.find_tensors(path, name)[0][name])

    def check_shapes(self) -> None:
        """Raise ValueError where the tensors are not what `NeuronSums` says that they are."""
        width = (self.token_sum.numel(),)
        for name, value in self.tensors().items():
            wanted = value.shape[:1] * 2 if name == "gradient_gram" else width
            wanted = 2 * wanted if name == "gram" else tuple(wanted)
            narrow = name in (*_MATRICES, "max_abs")
            dtypes = (torch.float32, "F32") if narrow else (torch.float64, "F64")
            if tuple(value.shape) != wanted or value.dtype not in dtypes:
                raise ValueError(f"{name}: is {value.dtype} {list(value.shape)}")

    @property
    def prompt_mean(self) -> torch.Tensor:
        """Mean over prompts of a, fp64 [F]; 0 where no prompt came."""
        return self.prompt_sum / max(self.prompts, 1)

    @property
    def token_mean(self) -> torch.Tensor:
        """Mean over tokens of h, fp64 [F]."""
        return self.token_sum / max(self.tokens, 1)

    @property
    def rms(self) -> torch.Tensor:
        """Root mean square over tokens of h, fp64 [F]."""
        return (self.token_square_sum / max(self.tokens, 1)).sqrt()

    @property
    def mean_abs(self) -> torch.Tensor:
        """Mean over tokens of abs h, fp64 [F]."""
        return self.token_abs_sum / max(self.tokens, 1)

    def second_moment(
        self, *, centred: bool = False, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Mean over tokens of h·hᵀ, fp64 [F, F], needs `gram`; centred, h less its mean."""
        moment = self.gram.to(device, torch.float64, copy=True).div_(self.tokens)
        if centred:
            mean = self.token_mean.to(device)
            moment -= torch.outer(mean, mean)
        return moment


@dataclass
class NeuronStats:
    """The statistics of a whole model: one `NeuronSums` an MLP, for each class of corpus.

    Attributes:
        names: the MLPs' names, in the model's order.
        classes: "target", and "distractor" where there is one.
        fingerprint: of the model's MLPs (`arch.fingerprint`).
        provenance: model, corpora (file, hash, prompts, tokens), dtype, token limit.
        prompts: the target's prompts as token ids, for repairs that run the model again; or None.
        gradient_squares: for each MLP ‖g‖² of every token of the prompts, in their order, g as in
            `gradient_gram`: fp32 [T], None for an expert. None where no gradients were gathered.
        distractor_prompts, distractor_squares: the same of the distractor, where it is to weigh in
            (`contrast`).
    """

    names: list[str]
    classes: dict[str, list[NeuronSums]]
    fingerprint: str
    provenance: dict[str, Any] = field(default_factory=dict)
    prompts: list[Tokens] | None = None
    gradient_squares: list[torch.Tensor | None] | None = None
    distractor_prompts: list[Tokens] | None = None
    distractor_squares: list[torch.Tensor | None] | None = None

    @property
    def target(self) -> list[NeuronSums]:
        """The target's sums, one an MLP."""
        if "target" not in self.classes:
            raise InputError(f"statistics: have {', '.join(self.classes)}, but no target")
        return self.classes["target"]

    @property
    def hash(self) -> str:
        """A hash of what was measured: provenance, counts, and the token sums."""
        sums = [
            (name, s.prompts, s.tokens, s.token_abs_sum.sum().item())
            for name, many in self.classes.items()
            for s in many
        ]
        return files.digest([self.fingerprint, self.provenance, sums])

    def check_model(self, views: list[MLPView], what: str = "model") -> None:
        """Raise InputError unless the statistics were taken on a model with these MLPs."""
        if fingerprint(views) != self.fingerprint:
            mine = [many.token_sum.numel() for many in self.target]
            raise InputError(
                f"statistics: taken on another model ({len(mine)} MLPs of {mine[0]} neurons) than "
                f"this {what} ({len(views)} of {views[0].width}); calibrate this model"
            )

    def merge(self, other: NeuronStats) -> NeuronStats:
        """The statistics of both calibrations of one model together."""
        if other.fingerprint != self.fingerprint:
            raise InputError("statistics: cannot merge those of two different models")
        classes = dict(self.classes)
        for name, many in other.classes.items():
            mine = classes.get(name)
            classes[name] = (
                many if mine is None else [a.merge(b) for a, b in zip(mine, many, strict=True)]
            )
        both = {"merged": [self.provenance, other.provenance]}
        return NeuronStats(
            self.names,
            classes,
            self.fingerprint,
            both,
            join_prompts(self.prompts, other.prompts),
            join_squares(self.gradient_squares, other.gradient_squares),
            join_prompts(self.distractor_prompts, other.distractor_prompts),
            join_squares(self.distractor_squares, other.distractor_squares),
        )

    def save(self, path: str | Path, *, finished: bool = True) -> None:
        """Write safetensors with a JSON header; a calibration under way is of another kind."""
        tensors: dict[str, torch.Tensor | Entry] = {}
        counts: dict[str, list[tuple[int, int]]] = {}
        for name, many in self.classes.items():
            counts[name] = [(s.prompts, s.tokens) for s in many]
            for i, s in enumerate(many):
                tensors |= {f"{name}.{i}.{key}": value for key, value in s.tensors().items()}
        tensors |= _prompt_tensors("prompts", self.prompts, self.gradient_squares)
        tensors |= _prompt_tensors(
            "distractor_prompts", self.distractor_prompts, self.distractor_squares
        )
        header = {
            "names": self.names,
            "counts": counts,
            "fingerprint": self.fingerprint,
            "provenance": self.provenance,
        }
        files.write_tensors(path, tensors, _KIND if finished else _UNFINISHED, header)

    @classmethod
    def load(cls, path: str | Path, *, finished: bool = True) -> NeuronStats:
        """Read what `save` wrote, of this kind; its matrices stay on disk (`NeuronSums`).

        Raises:
            InputError: the file is missing, cut short, or of another kind.
        """
        found, header = files.find_tensors(path, _KIND if finished else _UNFINISHED)
        tensors = {
            name: entry if name.endswith(_ON_DISK) else entry.read()
            for name, entry in found.items()
        }
        classes: dict[str, list[NeuronSums]] = {}
        try:
            conform(header, _HEADER, "header")
            for name, counts in header["counts"].items():
                classes[name] = [
                    NeuronSums(
                        prompts=prompts,
                        tokens=tokens,
                        **{key: tensors[f"{name}.{i}.{key}"] for key in (*_SUMS, "max_abs")},
                        **{key: tensors.get(f"{name}.{i}.{key}") for key in _OPTIONAL},
                    )
                    for i, (prompts, tokens) in enumerate(counts)
                ]
                if len(counts) != len(header["names"]) or not counts:
                    raise ValueError(f"{name}: has sums of {len(counts)} MLPs")
                for sums in classes[name]:
                    sums.check_shapes()
            return cls(
                header["names"],
                classes,
                header["fingerprint"],
                header["provenance"],
                *_read_prompts("prompts", tensors, len(header["names"])),
                *_read_prompts("distractor_prompts", tensors, len(header["names"])),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: its header and tensors do not fit together") from error


def join_prompts(first: list[Tokens] | None, second: list[Tokens] | None) -> list[Tokens] | None:
    """The prompts of both, where both are there."""
    return None if first is None or second is None else first + second


def join_squares(
    first: list[torch.Tensor | None] | None, second: list[torch.Tensor | None] | None
) -> list[torch.Tensor | None] | None:
    """The gradients' squares of both sets of prompts, where both are there."""
    if first is None or second is None:
        return None
    pairs = zip(first, second, strict=True)
    return [None if a is None or b is None else torch.cat([a, b]) for a, b in pairs]


def _prompt_tensors(
    name: str, prompts: list[Tokens] | None, squares: list[torch.Tensor | None] | None
) -> dict[str, torch.Tensor]:
    if prompts is None:
        return {}
    found = {
        f"{name}.ids": torch.cat([torch.tensor(p.ids, dtype=torch.int32) for p in prompts]),
        f"{name}.spans": torch.tensor([(len(p.ids), p.scored) for p in prompts], dtype=torch.int32),
    }
    for i, mine in enumerate(squares or ()):
        if mine is not None:
            found[f"{name}.{i}.gradient_squares"] = mine
    return found


def _read_prompts(
    name: str, tensors: dict[str, torch.Tensor], mlps: int
) -> tuple[list[Tokens] | None, list[torch.Tensor | None] | None]:
    """Prompts and their gradients' squares, as `_prompt_tensors` laid them down."""
    if f"{name}.ids" not in tensors:
        return None, None
    spans, ids = tensors[f"{name}.spans"], tensors[f"{name}.ids"]
    whole = ids.dtype == spans.dtype == torch.int32 and (ids.dim(), spans.dim()) == (1, 2)
    if not whole or spans.shape[1] != 2 or (spans < 0).any() or spans[:, 0].sum() != ids.numel():
        raise ValueError(f"{name}: their spans are none of their ids")
    rows = ids.split(spans[:, 0].tolist())
    prompts = [
        Tokens(tuple(row.tolist()), scored)
        for row, scored in zip(rows, spans[:, 1].tolist(), strict=True)
    ]
    squares = [tensors.get(f"{name}.{i}.gradient_squares") for i in range(mlps)]
    return prompts, None if all(mine is None for mine in squares) else squares
