"""`prunekit recover`: train a model, pruned or dense, and save it as any checkpoint."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import torch
from torch import nn

from prunekit.checkpoint import save
from prunekit.cli.output import Output, count
from prunekit.cli.sources import corpora, joined
from prunekit.config import RecoverConfig
from prunekit.corpus import Corpus
from prunekit.errors import InputError
from prunekit.files import check_output_folder
from prunekit.integrations.loading import load, load_tokenizer
from prunekit.recover import Settings, is_first_process, recover, resolve
from prunekit.tasks.arithmetic import arithmetic_corpus, held_out_corpus

CONFIG = RecoverConfig
EXAMPLES = """  prunekit recover small --data task.jsonl -o recovered
  prunekit recover small --data gsm8k.jsonl --preset paper-math -o recovered
  prunekit recover small --data task.jsonl --method distill --teacher DENSE -o recovered
  prunekit recover demo --task arithmetic --method full -o mini
  accelerate launch -m prunekit recover small --data task.jsonl -o recovered"""

_ROWS = 8  # of the curve that is printed; all of it is in loss.jsonl
_HELD_OUT = 200  # problems of a task
_SETTINGS = [field.name for field in dataclasses.fields(Settings)]


def run(config: RecoverConfig, output: Output) -> int:
    """Check, load, train, save, and print the curve; of several processes only the first speaks."""
    given = {name: getattr(config, name) for name in _SETTINGS}
    given |= {name: given[name] or None for name in ("method", "dtype")}
    preset = config.preset or config.task
    chosen = resolve(preset, **given)
    _check(config, chosen)
    first = is_first_process()
    work = Path(f"{config.output}.training")
    if config.force and not config.resume and first:
        shutil.rmtree(work, ignore_errors=True)
    tokenizer = load_tokenizer(config.model)
    data, held_out = _data(config, tokenizer)
    teacher = _teacher(config, tokenizer)
    model = load(config.model, device=_device())
    base = model.config._name_or_path
    beside = work / "beside"
    recover(
        model,
        tokenizer,
        data,
        teacher=teacher,
        preset=preset,
        **given,
        held_out=held_out,
        folder=work,
        save_every=config.save_every,
        resume=config.resume,
        keep_adapter=beside / "adapter" if config.keep_adapter else None,
        quiet=config.quiet,
    )
    if not first:
        return 0
    facts = model.prunekit["recovery"] = {"base": base, **model.prunekit["recovery"]}
    curve = model.prunekit["curve"]
    beside.mkdir(exist_ok=True)
    (beside / "loss.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curve))
    folder = save(model, tokenizer, config.output, beside=beside, force=config.force)
    shutil.rmtree(work)
    _print(facts, curve, output)
    output.line(f"saved {folder}: loads with transformers' AutoModelForCausalLM.from_pretrained")
    output.json({"output": str(folder), **facts, "curve": curve})
    return 0


def _check(config: RecoverConfig, chosen: Settings) -> None:
    if not config.output or bool(config.data) == bool(config.task):
        raise InputError(
            "needs --data FILE or --task NAME, and -o OUT; see `prunekit recover --help`"
        )
    check_output_folder(config.output, force=config.force)
    if config.task and config.examples < 1:
        raise InputError(f"--examples: got {config.examples}; expected at least 1")
    if chosen.method == "distill" and not config.teacher:
        raise InputError("--method distill: needs --teacher DENSE")
    if config.teacher and chosen.method != "distill":
        raise InputError(f"--teacher: method {chosen.method} takes none; use --method distill")


def _data(config: RecoverConfig, tokenizer) -> tuple[Corpus, Corpus | None]:
    held_out = joined(corpora(config.held_out, tokenizer, 0)) if config.held_out else None
    if config.task:
        return arithmetic_corpus(config.examples), held_out or held_out_corpus(_HELD_OUT)
    return joined(corpora(config.data, tokenizer, 0)), held_out


def _teacher(config: RecoverConfig, tokenizer) -> nn.Module | None:
    if not config.teacher:
        return None
    if load_tokenizer(config.teacher).get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"--teacher {config.teacher}: its vocabulary is not that of {config.model}; take the "
            "dense model that it was pruned from"
        )
    return load(config.teacher, device=_device())


def _device() -> str | None:
    """Where to load to: of several processes each has its own GPU."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if rank and torch.cuda.is_available() else None


def _print(facts: dict, curve: list[dict], output: Output) -> None:
    rows = []
    for i in range(min(_ROWS, len(curve))):
        start, end = (len(curve) * n // min(_ROWS, len(curve)) for n in (i, i + 1))
        part = curve[start:end]
        loss = sum(row["loss"] for row in part) / len(part)
        last = part[-1]
        steps = f"{part[0]['step']} – {last['step']}" if len(part) > 1 else last["step"]
        rows.append((steps, f"{last['epoch']:.2f}", f"{loss:.4f}", f"{last['learning_rate']:.2e}"))
    data, loss = facts["data"], facts["loss"]
    title = (
        f"{facts['settings']['method']}: {count(data['examples'])} examples, "
        f"{count(data['tokens'])} tokens, {facts['seconds']:.0f} s"
    )
    output.table(title, ("steps", "epoch", "training loss", "learning rate"), rows)
    kind = "held out" if loss["held_out"] else "of the training data"
    output.line(
        f"loss on {loss['corpus']} ({kind}): {loss['before']:.4f} -> {loss['after']:.4f} "
        f"± {loss['stderr']:.4f} nats/token"
    )
