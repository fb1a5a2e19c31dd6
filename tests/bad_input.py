"""What people get wrong, each thing tried once: a folder of broken files, and commands for them.

`python -m tests.bad_input` tries every case and writes docs/bad-input.md; the tests hold the page
against what prunekit says now.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PAGE = Path(__file__).parents[1] / "docs" / "bad-input.md"
MARKERS = "bad-input"
STATS = "calibrate model --target task.jsonl"
PRUNE = "prune model --target task.jsonl"

# What comes after is Python's, torch's or transformers' own.
FOREIGN = (
    "is not JSON",
    "is no YAML",
    "is not UTF-8",
    "cannot be loaded",
    "cannot be read",
    "no tokenizer",
    "invalid choice",
    "invalid float",
    "unrecognized arguments",
)

# (what is wrong, the command); its files are made by `folder`.
CASES = (
    # a model
    ("no such model", "inspect nowhere"),
    ("a folder without a model", "prune empty --target task.jsonl --sparsity 0.5 -o out"),
    ("weights cut short", "prune cut --target task.jsonl --sparsity 0.5 -o out"),
    (
        "a shard that the index names is missing",
        f"{'prune lost'} --target task.jsonl --sparsity 0.5 -o out",
    ),
    ("an index that names a file outside", "eval outside --data task.jsonl"),
    ("config.json is no JSON", "eval noconfig --data task.jsonl"),
    ("a model that brings its own code", "eval code --data task.jsonl"),
    ("an architecture that transformers does not know", "eval strange --data task.jsonl"),
    ("NaN in the weights", "calibrate nan --target task.jsonl -o s"),
    ("a .gguf of a few bytes", "eval short.gguf --data task.jsonl"),
    ("a .gguf that counts more tensors than it has", "inspect many.gguf"),
    # a corpus
    ("no such corpus", "calibrate model --target none.jsonl -o s"),
    ("an empty corpus", "calibrate model --target empty.jsonl -o s"),
    ("a line that is no JSON", "calibrate model --target broken.jsonl -o s"),
    ("JSON nested a hundred thousand deep", "calibrate model --target deep.jsonl -o s"),
    ("rows of none of the known shapes", "calibrate model --target shapeless.jsonl -o s"),
    ("a text that is a number", "calibrate model --target number.jsonl -o s"),
    ("bytes that are no UTF-8", "calibrate model --target latin.jsonl -o s"),
    ("a CSV without a known column", "calibrate model --target columns.csv -o s"),
    ("a folder for a corpus", "calibrate model --target empty -o s"),
    ("a chat that is no list of messages", "calibrate model --target chat.jsonl -o s"),
    # what to do
    ("a verb that there is not", "shrink model"),
    ("an option that there is not", "prune model --sparsty 0.5"),
    ("no goal", f"{PRUNE} -o out"),
    ("two goals", f"{PRUNE} --sparsity 0.5 --target-bytes 1MB -o out"),
    ("a sparsity that is none", f"{PRUNE} --sparsity 2 -o out"),
    ("a sparsity that is no number", f"{PRUNE} --sparsity half -o out"),
    ("a criterion that there is not", f"{PRUNE} --sparsity 0.5 --criterion best -o out"),
    ("widths of no multiple", f"{PRUNE} --sparsity 0.5 --multiple-of 0 -o out"),
    ("--offload of a .gguf", "calibrate short.gguf --target task.jsonl --offload disk -o s"),
    ("--offload with --resume", f"{STATS} --offload disk --resume -o s"),
    (
        "--offload with a repair that runs the model",
        f"{PRUNE} --sparsity 0.5 --offload disk --compensate sequential -o out",
    ),
    (
        "--offload with a goal that runs the model",
        f"{PRUNE} --target-speedup 1.2 --offload disk -o out",
    ),
    (
        "a multiple wider than the MLP",
        "prune model --strategy random --sparsity 0.5 --multiple-of 4096 -o out",
    ),
    ("bytes that no model can have", f"{PRUNE} --target-bytes 1KB -o out"),
    ("bytes that are no number", f"{PRUNE} --target-bytes lots -o out"),
    ("a speed-up below 1", f"{PRUNE} --target-speedup 0.5 -o out"),
    (
        "no minutes for distillation",
        f"{PRUNE} --sparsity 0.5 --compensate distill --minutes 0 -o out",
    ),
    ("a contrast without a distractor", f"{PRUNE} --sparsity 0.5 --criterion selectivity -o out"),
    ("--keep-off-task without a distractor", f"{PRUNE} --sparsity 0.5 --keep-off-task 0.5 -o out"),
    ("a batch of no tokens", f"{STATS} --batch-tokens 0 -o s"),
    ("--resume in the processes of torchrun", "WORLD_SIZE=2 " + STATS + " --resume -o s"),
    ("a verb that shares no work under torchrun", "WORLD_SIZE=2 inspect model"),
    # statistics, plans, records
    ("statistics of another model", "prune other --stats task.stats --sparsity 0.5 -o out"),
    (
        "statistics without what the repair needs",
        "prune model --stats task.stats --sparsity 0.5 --compensate lstsq -o out",
    ),
    ("statistics cut short", "prune model --stats cut.stats --sparsity 0.5 -o out"),
    ("a model for statistics", "prune model --stats model/model.safetensors --sparsity 0.5 -o out"),
    (
        "statistics whose tensors do not fit",
        "prune model --stats unfit.stats --sparsity 0.5 -o out",
    ),
    ("a pickle for statistics", "prune model --stats pickle.stats --sparsity 0.5 -o out"),
    ("a plan of another model", "prune other --plan small/plan.safetensors -o out"),
    ("pruned already", "prune small --plan small/plan.safetensors -o out"),
    ("a record that is no JSON", "inspect norecord"),
    ("what another calibration left unfinished", STATS + " --resume -o stopped"),
    # where to write
    ("no output named", f"{PRUNE} --sparsity 0.5"),
    ("an output that is there", f"{PRUNE} --sparsity 0.5 -o small"),
    ("--force over a folder that is no model", f"{PRUNE} --sparsity 0.5 --force -o data"),
    ("a file for an output folder", f"{PRUNE} --sparsity 0.5 -o task.jsonl"),
    ("a folder for an output file", f"{STATS} -o empty"),
    ("a folder that a file stands for", f"{STATS} -o task.jsonl/s"),
    # measuring and studies
    ("nothing to measure", "eval model"),
    ("a task that there is not", "eval model --task chess"),
    ("a task that runs code, not allowed", "eval model --task humaneval"),
    ("a baseline that is none", "bench model --check task.jsonl"),
    ("no such baseline", "bench model --check none.json"),
    ("a dtype that there is not", "bench model --dtype fp8"),
    ("CUDA graphs without a GPU", "bench model --cuda-graph"),
    ("more neurons than there are", "bench model --neurons 100000"),
    ("no such protocol", "sweep nowhere"),
    ("--workers without --ray", "sweep mini-math --workers 2 --out new"),
    ("a protocol that is no YAML", "sweep broken.yaml"),
    ("a protocol with an unknown key", "sweep unknown.yaml"),
    ("a folder that is no run", "sweep mini-math --out small"),
    ("a run that is there, without --resume", "sweep mini-math --out run"),
    ("a report of no run", "report empty"),
    ("nothing to learn from", "recover small -o out"),
    ("nested: no criterion's statistics", "export model --format nested -o out"),
    ("a difference between a plan and nothing", "diff small nowhere"),
)


def _tiny(path: Path, **options) -> Path:
    import prunekit as pk
    from tests.models import tiny_model
    from tests.vocabularies import byte_level

    return pk.save(tiny_model("llama", vocab_size=400, **options), byte_level("qwen2", 400), path)


def _edited(source: Path, path: Path, edit) -> None:
    """A copy of a model's folder whose config.json was changed."""
    shutil.copytree(source, path)
    config = json.loads((path / "config.json").read_text())
    edit(config)
    (path / "config.json").write_text(json.dumps(config))


def _rows(path: Path, *rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def fill(folder: Path) -> None:
    """Make every file that the cases name."""
    import prunekit as pk
    from prunekit.integrations.loading import load_tokenizer

    model = _tiny(folder / "model")
    _tiny(folder / "other", intermediate_size=64)
    texts = [f"w{i} and w{i + 1} make w{2 * i + 1}" for i in range(40)]
    _rows(folder / "task.jsonl", *({"text": text} for text in texts))

    _models(folder, model)
    _corpora(folder)
    _statistics(folder, texts, load_tokenizer(str(model)), pk)
    (folder / "broken.yaml").write_text("name: [\n")
    (folder / "unknown.yaml").write_text("name: n\nmodel: demo\ncolour: red\n")
    (folder / "run").mkdir()
    (folder / "run" / "results.jsonl").write_text("{}\n")
    (folder / "data").mkdir()
    (folder / "data" / "precious.txt").write_text("mine")


def _models(folder: Path, model: Path) -> None:
    (folder / "empty").mkdir()
    shutil.copytree(model, folder / "cut")
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for name, file in (("lost", "lost.safetensors"), ("outside", "../model/model.safetensors")):
        shutil.copytree(model, folder / name)
        names = load_file(folder / name / "model.safetensors")
        (folder / name / "model.safetensors").unlink()
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, file)}
        (folder / name / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copytree(model, folder / "noconfig")
    (folder / "noconfig" / "config.json").write_text("{")
    _edited(model, folder / "strange", lambda c: c.update(model_type="strange"))
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    _edited(model, folder / "code", lambda c: c.update(model_type="own", auto_map=own))
    (folder / "code" / "own.py").write_text("raise SystemExit('ran')\n")
    shutil.copytree(model, folder / "nan")
    tensors = load_file(folder / "nan" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 3] = float("nan")
    save_file(tensors, folder / "nan" / "model.safetensors", {"format": "pt"})
    (folder / "short.gguf").write_bytes(b"GGUF\3\0\0\0")
    (folder / "many.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0))


def _corpora(folder: Path) -> None:
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (folder / "deep.jsonl").write_text("[" * 100_000 + "\n")
    (folder / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    (folder / "columns.csv").write_text("a,b\n1,2\n")
    _rows(folder / "shapeless.jsonl", {"question": "?"})
    _rows(folder / "number.jsonl", {"text": 5})
    _rows(folder / "chat.jsonl", {"messages": "hello"})


def _statistics(folder: Path, texts: list[str], tokenizer, pk) -> None:
    from prunekit.integrations.loading import load

    model = load(str(folder / "model"))
    stats = pk.calibrate(model, tokenizer, texts, quiet=True)
    stats.save(folder / "task.stats")
    stats.provenance["unfinished"] = {"key": "another", "class": "target", "done": 1}
    stats.save(folder / "stopped.unfinished", finished=False)
    (folder / "cut.stats").write_bytes((folder / "task.stats").read_bytes()[:-100])
    stats.target[0].token_sum = torch.zeros(3, dtype=torch.float64)
    stats.save(folder / "unfit.stats")
    torch.save({"a": 1}, folder / "pickle.stats")
    scores = pk.score(None, model, "random")
    plan = pk.plan(scores, 0.5, strategy="random", multiple_of=16)
    pk.save(pk.prune(model, plan, compensate="none"), tokenizer, folder / "small")
    shutil.copytree(folder / "small", folder / "norecord")
    (folder / "norecord" / "prunekit.json").write_text("{")


def own(line: str) -> str:
    """What prunekit itself says in a line: other libraries' words follow, and change as they do."""
    for phrase in FOREIGN:
        line = line.partition(phrase)[0]
    return line


def tried(command: str) -> tuple[int, str]:
    """A command's exit status and what it says, in the folder we are in."""
    from prunekit.cli import main

    words = command.split()
    setting = dict(word.split("=", 1) for word in words if "=" in word and word[0].isupper())
    said, before = io.StringIO(), dict(os.environ)
    os.environ.update(setting)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            try:
                status = main(words[len(setting) :])
            except SystemExit as stop:
                status = stop.code
    finally:
        os.environ.clear()
        os.environ.update(before)
    return status, said.getvalue().replace(f"{Path.cwd()}/", "")


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A folder with every file, gone afterwards; we are in it."""
    with tempfile.TemporaryDirectory() as name:
        fill(Path(name))
        before = Path.cwd()
        os.chdir(name)
        try:
            yield Path(name)
        finally:
            os.chdir(before)


def table(said: dict[str, str]) -> str:
    """Markdown: what is wrong, the command, and the line it gives."""
    lines = ["| wrong | command | what it says |", "|---|---|---|"]
    for what, command in CASES:
        line = said[command].strip().replace("|", "\\|")
        lines.append(f"| {what} | `{command}` | `{line}` |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Try every case, write the page, and name those that are not one line and status 2."""
    from bench.markers import rewrite

    said = {}
    with folder():
        for what, command in CASES:
            status, said[command] = tried(command)
            if status != 2 or said[command].count("\n") != 1:
                print(f"{what}: `{command}`: status {status}\n{said[command][-2000:]}")
    rewrite(PAGE, MARKERS, table(said))


if __name__ == "__main__":
    main()
