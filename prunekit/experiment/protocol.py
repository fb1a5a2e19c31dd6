"""Protocols: what a study removes, how, and what it measures; read from YAML."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from prunekit.compensate import METHODS
from prunekit.criteria import CRITERIA
from prunekit.errors import InputError
from prunekit.experiment.typed import read, value
from prunekit.plan import STRATEGIES
from prunekit.recover.settings import Settings, resolve

BUILT_IN = Path(__file__).parents[1] / "protocols"
ORDERS = ("listed", "worst-first")
# distill is bounded by minutes, which no two runs share; `recovery` has it by steps.
REPAIRS = tuple(method for method in METHODS if method != "distill")


@dataclass(frozen=True)
class Source:
    """A corpus.

    Attributes:
        source: a FILE, ``hf:NAME[:split]``, or one that is made: ``arithmetic``,
            ``word-problems``, ``humaneval`` (with its solutions).
        rows: how many of its rows are read; 0: all (of one that is made: 200).
        seed: of one that is made.
        prompt, completion: the columns of a file that hold them, where they are named otherwise.
    """

    source: str
    rows: int = value(0, least=0)
    seed: int = value(0, least=0)
    prompt: str = ""
    completion: str = ""


@dataclass(frozen=True)
class TaskOf:
    """A task to be solved: a spec of `prunekit.tasks.read_task`, and how much of it.

    Attributes:
        problems: how many; 0: all.
        seed: of the choice of them.
        max_new_tokens: of an answer; 0: as the task says.
    """

    spec: str
    problems: int = value(200, least=0)
    seed: int = value(0, least=0)
    max_new_tokens: int = value(0, least=0)


@dataclass(frozen=True)
class Grid:
    """Cells: every combination of these lists, those that would be the same only once.

    Attributes:
        seeds: only what is drawn (strategy random, criterion random) has one cell a seed.
        criteria: strategy random does without.
        recover_at: the sparsities, of those listed, that are also trained afterwards.
    """

    sparsities: tuple[float, ...] = value(above=0, below=1)
    strategies: tuple[str, ...] = value(("selective",), one_of=STRATEGIES)
    criteria: tuple[str, ...] = value(("auto",), one_of=tuple(sorted(CRITERIA)))
    compensations: tuple[str, ...] = value(("sequential",), one_of=REPAIRS)
    seeds: tuple[int, ...] = value((0,), least=0)
    recover_at: tuple[float, ...] = value((), above=0, below=1)


@dataclass(frozen=True)
class Training:
    """Fine-tuning, of the dense model (`make`) or of pruned ones (`recovery`).

    Attributes:
        method, preset: of `prunekit.recover`; "": the preset's method, and no preset.
        corpus: what is trained on; by default the part of the target that calibrates.
        epochs, steps, learning_rate, batch, accumulation: instead of the preset's, or of the
            method's defaults, where they are not 0.
    """

    method: str = ""
    preset: str = ""
    corpus: Source | None = None
    epochs: float = value(0.0, least=0)
    steps: int = value(0, least=0)
    learning_rate: float = value(0.0, least=0)
    batch: int = value(0, least=0)
    accumulation: int = value(0, least=0)
    seed: int = value(0, least=0)

    def settings(self) -> Settings:
        """What `prunekit.recover` makes of this.

        Raises:
            InputError: there is no such method or preset.
        """
        given = {name: getattr(self, name) or None for name in _OF_SETTINGS}
        return resolve(self.preset or None, seed=self.seed, **given)


_OF_SETTINGS = ("method", "epochs", "steps", "learning_rate", "batch", "accumulation")


@dataclass(frozen=True)
class Measure:
    """Whether, and how, speed and memory are measured: once a width, in turn with the dense model.

    Attributes:
        prompt, generate, rounds: as in `prunekit bench`, at batch 1.
    """

    speed: bool = True
    memory: bool = True
    prompt: int = value(512, least=1)
    generate: int = value(64, least=1)
    rounds: int = value(3, least=1)


@dataclass(frozen=True)
class Protocol:
    """A study: one model, one calibration, many cells.

    Attributes:
        name, about: for people.
        model: as MODEL of every verb.
        target: the corpus of the task to keep.
        grids: the cells.
        tasks: what is solved in each cell.
        distractors: corpora that the target is contrasted with.
        off_task: more corpora whose loss is measured.
        held_out: the share of the target and of each distractor that calibrates nothing, and on
            which the losses are measured.
        make: how the model is trained first; the result is kept in the user's cache.
        recovery: how pruned models are trained.
        order: ``listed``, or ``worst-first``: what is expected to lose most, and to take longest,
            begins.
    """

    name: str
    model: str
    target: Source
    grids: tuple[Grid, ...]
    about: str = ""
    dtype: str = value("auto", one_of=("auto", "bf16", "fp16", "fp32"))
    distractors: tuple[Source, ...] = ()
    off_task: tuple[Source, ...] = ()
    held_out: float = value(0.2, above=0, below=1)
    tasks: tuple[TaskOf, ...] = ()
    make: Training | None = None
    recovery: Training | None = None
    order: str = value("listed", one_of=ORDERS)
    multiple_of: int = value(64, least=1)
    max_length: int = value(1024, least=1)
    batch_tokens: int = value(2048, least=1)
    batch_size: int = value(16, least=1)
    measure: Measure = Measure()

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def protocol_of(given: Any) -> Protocol:
    """A protocol of plain values.

    Raises:
        InputError: one line that names the key: unknown, missing, of a wrong type, out of range,
            or at odds with another.
    """
    found = read(Protocol, given)
    if not found.grids or any(not grid.sparsities for grid in found.grids):
        raise InputError("grids: got no cell; expected at least one grid with a sparsity")
    for i, grid in enumerate(found.grids):
        strange = [s for s in grid.recover_at if s not in grid.sparsities]
        if strange:
            raise InputError(
                f"grids[{i}].recover_at: got {strange[0]:g}, which is none of its sparsities"
            )
        if grid.recover_at and found.recovery is None:
            raise InputError(f"grids[{i}].recover_at: needs `recovery`, which says how")
        if not found.distractors:
            lacking = [c for c in grid.criteria if "distractor" in CRITERIA[c].needs]
            if lacking and set(grid.strategies) != {"random"}:
                raise InputError(f"grids[{i}].criteria: {lacking[0]} needs `distractors`")
    for name in ("make", "recovery"):
        try:
            _ = (training := getattr(found, name)) and training.settings()
        except InputError as error:
            raise InputError(f"{name}.{error}") from None
    return found


def built_in() -> list[str]:
    """The names of the protocols that come with prunekit."""
    return sorted(path.stem for path in BUILT_IN.glob("*.yaml"))


def read_protocol(source: str | Path, *, model: str = "") -> Protocol:
    """Read a protocol.

    Args:
        source: a YAML file, or the name of a protocol that comes with prunekit.
        model: takes the place of the protocol's.

    Raises:
        InputError: there is none, it is no YAML, or `protocol_of` refuses it.
    """
    import yaml

    path = Path(source)
    if not path.is_file() and (BUILT_IN / f"{source}.yaml").is_file():
        path = BUILT_IN / f"{source}.yaml"
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(built_in())
        raise InputError(f"{source}: no such file; prunekit's protocols are {known}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{source}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        line = " ".join(str(error).split())
        raise InputError(f"{source}: is no YAML: {line}") from None
    try:
        found = protocol_of(given)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return replace(found, model=model) if model else found
