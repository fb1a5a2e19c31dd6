"""Every option of prunekit, defined once: the command line and its help are made from these."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def option(default: Any, help: str, *, short: str = "", metavar: str = "", choices=()) -> Any:
    """A field that becomes a flag ``--name``; a tuple default may be given many times."""
    metadata = {"help": help, "short": short, "metavar": metavar, "choices": choices}
    return field(default=default, metadata=metadata)


def argument(help: str, *, metavar: str) -> Any:
    """A field that becomes a positional argument."""
    return field(metadata={"help": help, "metavar": metavar, "positional": True})


_MODEL = "a folder, a hub id, a .gguf file, or `demo` (SmolLM2-135M-Instruct)"
_CORPUS = (
    "JSONL with `text`, `prompt` + `completion` or `messages`; CSV with those columns; "
    "hf:NAME[:split]"
)
_MULTIPLE = (
    "round kept widths to a multiple of this; auto: to the least that runs well here, as "
    "`prunekit bench --widths` measures"
)
ROW_FORMATS = "md", "csv", "jsonl"
DTYPES = "auto", "bf16", "fp16", "fp32"
OFFLOADS = "none", "disk"
_DTYPE = "bf16, fp16, fp32, or auto: as saved"


@dataclass(frozen=True)
class CalibrateConfig:
    """Run a model over a corpus and save the statistics every criterion is computed from."""

    model: str = argument(_MODEL, metavar="MODEL")
    target: tuple[str, ...] = option((), f"corpus of the task to keep: {_CORPUS}", metavar="FILE")
    distractor: tuple[str, ...] = option((), "corpus to contrast it with", metavar="FILE")
    output: str = option("", "file to write the statistics to", short="-o", metavar="STATS")
    gram: bool = option(False, "also gather Gram matrices, which all repairs but bias need")
    gradients: bool = option(
        False, "also run the target backwards, which the criterion reconstruction_fisher needs"
    )
    taylor: bool = option(False, "with the weights' gradients too, for the criterion taylor")
    off_task: bool = option(
        False, "gather all this of the distractor too, which prune's --keep-off-task needs"
    )
    max_length: int = option(1024, "tokens of a prompt that are read")
    batch_tokens: int = option(2048, "tokens of a batch, padding included")
    limit: int = option(0, "read at most so many rows of each corpus; 0: all")
    dtype: str = option("auto", _DTYPE, choices=DTYPES)
    offload: str = option(
        "none",
        "disk: have one decoder layer in memory at a time, and hidden states and matrices on disk "
        "beside STATS; a folder of safetensors",
        choices=OFFLOADS,
    )
    resume: bool = option(False, "go on from STATS.unfinished, where a calibration was stopped")
    quiet: bool = option(False, "no progress bar")


@dataclass(frozen=True)
class PruneConfig:
    """Remove the neurons a task does not need, repair the rest, and save a smaller model."""

    model: str = argument(_MODEL, metavar="MODEL")
    output: str = option("", "folder to write the model to", short="-o", metavar="OUT")
    sparsity: float = option(0.0, "fraction of the MLP neurons to remove, between 0 and 1")
    target_bytes: str = option(
        "", "instead of --sparsity: what the weights may take on disk, such as 200MB", metavar="N"
    )
    target_speedup: float = option(
        0.0,
        "instead of --sparsity: how much faster decoding is to be, as measured here by width",
        metavar="X",
    )
    max_loss_rise: float = option(
        0.0, "instead of --sparsity: nats a token, as `prunekit search` does", metavar="R"
    )
    target: tuple[str, ...] = option((), f"corpus of the task to keep: {_CORPUS}", metavar="FILE")
    distractor: tuple[str, ...] = option((), "corpus to contrast it with", metavar="FILE")
    keep_off_task: float = option(
        0.0,
        "weight, from 0 to 1, of the distractor's tokens in what is kept and repaired, a target "
        "token's being 1: 0 spends what only the distractor needs, 1 treats both alike",
    )
    stats: str = option("", "statistics from `prunekit calibrate`, instead of --target")
    plan: str = option("", "a plan.safetensors to follow, instead of choosing neurons")
    strategy: str = option(
        "selective",
        "selective removes the lowest scores, reverse the highest, random draws",
        choices=("selective", "reverse", "random"),
    )
    criterion: str = option(
        "auto",
        "what scores a neuron: auto takes reconstruction_fisher where the repair needs the Gram "
        "matrix anyway, else wanda; `prunekit env` lists all",
    )
    allocation: str = option(
        "uniform",
        "how many neurons each layer keeps: uniform, or budget: as many in all, shared out by what "
        "they cost the loss, where a rehearsal of the repair says that this is worth more",
        choices=("uniform", "budget"),
    )
    compensate: str = option(
        "",
        "repair: none, bias, lstsq (each MLP for itself), sequential (layer by layer), distill "
        "(then trained to imitate the dense model); by default sequential where there are "
        "statistics for it, else none",
        metavar="{none,bias,lstsq,sequential,distill}",
    )
    minutes: float = option(4.0, "how long --compensate distill trains")
    steps: int = option(0, "how many steps it trains instead; 0: as many as the minutes allow")
    multiple_of: int | str = option(64, _MULTIPLE)
    seed: int = option(0, "for --strategy random and --criterion random")
    max_length: int = option(1024, "tokens of a prompt that are read")
    batch_tokens: int = option(2048, "tokens of a batch, padding included")
    limit: int = option(0, "read at most so many rows of each corpus; 0: all")
    dtype: str = option("auto", _DTYPE, choices=DTYPES)
    dry_run: bool = option(
        False,
        "say what would be kept, predict time, memory and disk, and write nothing; unless --stats, "
        "--plan or budget ask for more, a config.json is enough",
    )
    offload: str = option(
        "none",
        "disk: calibrate with one decoder layer in memory at a time, and hidden states and "
        "matrices on disk beside OUT; then as --no-load",
        choices=OFFLOADS,
    )
    no_load: bool = option(
        False,
        "prune the checkpoint on disk, tensor by tensor, without loading the model: needs --stats, "
        "or --strategy random; repairs are lstsq, bias and none (taken of itself where the weights "
        "are larger than half of the free memory)",
    )
    force: bool = option(False, "replace OUT if it exists")
    quiet: bool = option(False, "no progress bar")


@dataclass(frozen=True)
class SearchConfig:
    """Find the smallest model whose held-out loss rises by no more than a bound, and save it."""

    model: str = argument(_MODEL, metavar="MODEL")
    target: tuple[str, ...] = option(
        (), f"corpus of the task to keep, every fifth row held out: {_CORPUS}", metavar="FILE"
    )
    max_loss_rise: float = option(
        0.0, "nats a token over the dense model, on the rows held out", metavar="R"
    )
    output: str = option("", "folder to write the model to", short="-o", metavar="OUT")
    criterion: str = option("auto", "what scores a neuron, as in `prunekit prune`")
    multiple_of: int | str = option(64, _MULTIPLE)
    max_length: int = option(1024, "tokens of a prompt that are read")
    batch_tokens: int = option(2048, "tokens of a batch, padding included")
    limit: int = option(0, "read at most so many rows of each corpus; 0: all")
    dtype: str = option("auto", _DTYPE, choices=DTYPES)
    force: bool = option(False, "replace OUT if it exists")
    quiet: bool = option(False, "no progress bar")


@dataclass(frozen=True)
class RecoverConfig:
    """Train a model, pruned or dense: bring back what pruning lost, or teach it a task."""

    model: str = argument(_MODEL, metavar="MODEL")
    data: tuple[str, ...] = option(
        (), f"what to train on, its completions where it has them: {_CORPUS}", metavar="FILE"
    )
    task: str = option(
        "",
        "instead of --data: examples made on the spot, trained on with the preset of that name",
        choices=("arithmetic",),
    )
    examples: int = option(3000, "how many examples --task makes", metavar="N")
    held_out: tuple[str, ...] = option(
        (),
        "measure the loss on this corpus, not on the first 100 training examples",
        metavar="FILE",
    )
    output: str = option("", "folder to write the model to", short="-o", metavar="OUT")
    method: str = option(
        "",
        "lora: adapters beside every linear layer, merged at the end (the default); full: every "
        "weight; distill: the layers' matrices, to imitate the dense model on the data",
        choices=("lora", "full", "distill"),
    )
    teacher: str = option("", "the dense model, for distill", metavar="DENSE")
    preset: str = option(
        "",
        "paper-math, paper-code: the hyperparameters of arXiv 2604.27115; what is given beside it "
        "wins",
        metavar="NAME",
    )
    epochs: float | None = option(None, "passes over the data (1)")
    steps: int | None = option(None, "optimiser steps, instead of epochs")
    learning_rate: float | None = option(
        None, "peak, before a cosine to zero (lora 2e-4, full 1e-4, distill 3e-4)", metavar="LR"
    )
    batch: int | None = option(None, "examples of a forward and backward, a process (8)")
    accumulation: int | None = option(None, "batches of an optimiser step (1)", metavar="N")
    warmup: float | None = option(None, "share of the steps before the peak (0.03)")
    max_length: int | None = option(None, "tokens of an example that are read (1024)")
    limit: int | None = option(None, "read at most so many examples; 0: all")
    rank: int | None = option(None, "of lora (16)")
    alpha: float | None = option(None, "of lora: its output is scaled by alpha / rank (32)")
    dropout: float | None = option(None, "of lora's input (0)")
    logits_weight: float | None = option(
        None,
        "of distill: of KL(dense ‖ model), nats a token (1)",
        metavar="W",
    )
    hidden_weight: float | None = option(
        None,
        "of distill: of the layers' mean squared error, relative to the dense square (1)",
        metavar="W",
    )
    dtype: str = option(
        "",
        "what products are computed in, the weights that train being fp32 (auto: bf16 where the "
        "hardware has it)",
        choices=("auto", "bf16", "fp32"),
    )
    seed: int | None = option(None, "orders the examples and draws LoRA's first weights (0)")
    save_every: int = option(100, "steps between checkpoints, in OUT.training", metavar="N")
    resume: bool = option(False, "go on from OUT.training, where a run was stopped")
    keep_adapter: bool = option(False, "keep LoRA's adapter too, in OUT/adapter")
    force: bool = option(False, "replace OUT if it exists, and begin anew")
    quiet: bool = option(False, "no progress bar")


@dataclass(frozen=True)
class EvalConfig:
    """Measure a model's mean loss on held-out corpora, its accuracy on tasks, and let it speak."""

    model: str = argument(_MODEL, metavar="MODEL")
    data: tuple[str, ...] = option((), f"held-out corpus: {_CORPUS}", metavar="FILE")
    task: tuple[str, ...] = option(
        (),
        "task to solve: gsm8k:FILE, humaneval, arithmetic, reasoning-gym:NAME, jsonl:FILE "
        "(`prompt`, `answer` and `match`: exact, number or contains), lm-eval:NAME",
        metavar="TASK",
    )
    allow_code_execution: bool = option(
        False, "let tasks run, in a sandbox, programs that the model writes"
    )
    baseline: str = option("", "the dense model, to say what was lost on each", metavar="DENSE")
    limit: int = option(0, "read at most so many rows of each corpus and task; 0: all")
    samples: int = option(0, "print so many greedy generations of each task, or of the corpus")
    batch_size: int = option(16, "problems of a task that are generated together")
    max_new_tokens: int = option(0, "limit of a generation; 0: as the task has it")
    generations: str = option(
        "",
        "folder to keep the tasks' generations in; a run that was killed goes on from there",
        metavar="DIR",
    )
    max_length: int = option(1024, "tokens of a prompt that are read")
    batch_tokens: int = option(1024, "tokens of a batch, padding included")
    dtype: str = option("auto", _DTYPE, choices=DTYPES)
    quiet: bool = option(False, "no progress bar")


@dataclass(frozen=True)
class BenchConfig:
    """Measure prefill and decode throughput and memory, interleaved with the dense model."""

    model: str = argument(_MODEL, metavar="MODEL")
    baseline: str = option("", "the dense model to compare with", metavar="DENSE")
    prompt: int = option(512, "tokens of the prefill (pp)")
    generate: int = option(128, "tokens of the decode (tg)")
    batch: str = option("1", "batch sizes, separated by commas")
    sparsity: str = option(
        "",
        "prune MODEL, which is then the dense one, on the spot to these, separated by commas",
        metavar="S,S",
    )
    neurons: str = option(
        "", "as --sparsity, by how many neurons of an MLP stay: 1024,1021, say", metavar="N,N"
    )
    multiple_of: int = option(64, "with --sparsity: round kept widths to a multiple of this")
    rounds: int = option(7, "how often each test is timed")
    compact: bool = option(False, "run the MLPs through prunekit's CompactMLP")
    compile: bool = option(False, "run every model through torch.compile, which takes its time")
    cuda_graph: bool = option(
        False, "record what a step makes the GPU do, and play it again; with --compile, its own way"
    )
    llamacpp: str = option(
        "",
        "llama.cpp takes part in the rounds, with matrices of this type; needs llama-cpp-python",
        choices=("f32", "f16", "bf16", "q8_0"),
    )
    report: str = option(
        "", "also write a page with the table, plots and provenance", metavar="PAGE.html"
    )
    widths: bool = option(
        False, "instead: time one of MODEL's MLPs by width, and say what to round widths to"
    )
    save: str = option(
        "", "write a baseline for --check, and nothing else", metavar="BASELINE.json"
    )
    check: str = option(
        "", "exit with 1 where a test is slower than this baseline", metavar="BASELINE.json"
    )
    max_regression: float = option(0.05, "with --check: how much slower a test may be")
    time_limit: float = option(300.0, "with --check: begin no more rounds after so many seconds")
    format: str = option(
        "table", "a table for people, or md, csv or jsonl rows", choices=("table", *ROW_FORMATS)
    )
    dtype: str = option("auto", f"{_DTYPE}; several are separated by commas")


@dataclass(frozen=True)
class ExportConfig:
    """Write a model in another form: for every sparsity, for one width, or for llama.cpp."""

    model: str = argument(_MODEL, metavar="MODEL")
    format: str = option(
        "nested",
        "nested: neurons in the order of their scores, so that prunekit.load(OUT, sparsity=S) "
        "reads what S keeps; padded: MLPs of several widths filled up with zeros to one; gguf: one "
        "file for llama.cpp, of a Llama, Mistral, Qwen2 or Qwen3",
        choices=("nested", "padded", "gguf"),
    )
    output: str = option(
        "", "folder to write to; gguf: file, whose name ends in .gguf", short="-o", metavar="OUT"
    )
    outtype: str = option(
        "auto",
        "gguf: what its matrices are; auto: f16 for fp16 models, else bf16",
        choices=("auto", "f32", "f16", "bf16", "q8_0"),
    )
    stats: str = option("", "nested: statistics from `prunekit calibrate`, which order neurons")
    criterion: str = option("auto", "nested: what scores a neuron, as in `prunekit prune`")
    anchor: tuple[float, ...] = option(
        (), "nested: sparsities for which the repair is kept too", metavar="S"
    )
    compensate: str = option(
        "",
        "nested: the anchors' repair; by default the best that the statistics suffice for",
        metavar="{none,lstsq,sequential}",
    )
    multiple_of: int = option(64, "nested: kept widths are rounded to a multiple of this")
    dtype: str = option("auto", _DTYPE, choices=DTYPES)
    force: bool = option(False, "replace OUT if it exists")
    quiet: bool = option(False, "no progress bar")


@dataclass(frozen=True)
class SweepConfig:
    """Run a study: every cell of a protocol from one calibration, resumable."""

    protocol: str = argument(
        "a YAML file, or the name of one that comes with prunekit, such as mini-math",
        metavar="PROTOCOL",
    )
    out: str = option("", "folder of the run (default: the protocol's name)", metavar="RUN")
    model: str = option("", f"instead of the protocol's: {_MODEL}", metavar="MODEL")
    resume: bool = option(False, "go on with a run that is there")
    dry_run: bool = option(
        False,
        "list the cells and widths, predict time, memory and disk, and run nothing; a config.json "
        "is enough",
    )
    allow_code_execution: bool = option(
        False, "let tasks run the code that the model writes, in a process of its own"
    )
    ray: str = option(
        "",
        "share the cells out over a Ray cluster, whose machines must see the same files: its "
        "address, auto for the one that this machine is in, or local for processes here",
        metavar="ADDRESS",
    )
    workers: int = option(
        0, "with --ray: processes (default: one a GPU; without GPUs one a machine)", metavar="N"
    )
    quiet: bool = option(False, "no progress bars, and no line a cell")


@dataclass(frozen=True)
class ReportConfig:
    """Write a sweep's results as one HTML page, with CSV, JSON and Markdown beside it."""

    run: str = argument("the folder of a sweep", metavar="RUN_DIR")
    output: str = option("", "the page (default: RUN_DIR/report.html)", short="-o", metavar="HTML")


@dataclass(frozen=True)
class InspectConfig:
    """Say what is in a file or folder: statistics, a plan, or a model."""

    path: str = argument(
        "statistics, a plan, a model folder, a nested checkpoint, or a .gguf file", metavar="PATH"
    )
    verify: bool = option(
        False,
        "hold every tensor and header of a folder against its hash: exit status 1 if one differs, "
        "2 if a file is missing, cut short or names what is not there",
    )


@dataclass(frozen=True)
class DiffConfig:
    """Say how two plans or two models differ: neurons, recipes, size, and weights."""

    a: str = argument(f"a plan, or a model: {_MODEL}", metavar="A")
    b: str = argument("the same, of the same dense model", metavar="B")
    sparsity: float | None = option(
        None, "of a nested checkpoint: at which to compare it; by default at the other's widths"
    )
    limit: int = option(10, "list so many of the tensors that differ most; 0: all")
    quiet: bool = option(False, "no progress bar")


@dataclass(frozen=True)
class EnvConfig:
    """Say which versions and backends are here, and what is missing and how to get it."""


@dataclass(frozen=True)
class DemoConfig:
    """Tell the whole story on the embedded model: calibrate, prune, repair, measure, report."""

    out: str = option("demo-out", "folder for the pruned model and report.html", metavar="DIR")
    quiet: bool = option(False, "no progress")
