"""Dense and pruned models in llama.cpp: do they continue as in transformers, and how fast are they.

Every model is exported as GGUF. llama.cpp continues three prompts greedily, 32 tokens each, and so
does transformers in fp32 over the values of the same file; where they part, the gap is given: by
how many nats transformers likes its own token better. Then all take turns at decoding and prefill
in one process. A token that is decoded reads every weight once, so its speed is held against the
bytes. Needs llama-cpp-python.
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import llama_cpp
import numpy as np
import torch

import prunekit as pk
from bench.agreement import shortfalls
from prunekit.arch import find_mlps
from prunekit.checkpoint.gguf import save_gguf
from prunekit.checkpoint.gguf_read import read_gguf
from prunekit.corpus import Corpus
from prunekit.integrations.loading import load_tokenizer
from prunekit.measure import interleave, provenance, summarise
from prunekit.plan import PrunePlan
from prunekit.tasks.embedded import humaneval

TOKENS, PROMPTS = 32, 32  # that are generated, and that calibrate
NEAR_TIE = 0.05  # nats; llama.cpp rounds what meets an f16 matrix to f16, transformers in fp32 none
FLOOR = 0.9  # of the bytes' ratio, that the speeds' ratio is to reach
TEXTS = (
    'def is_prime(n: int) -> bool:\n    """Whether n is a prime number."""\n',
    "Shopping list:\n  1  loaf of bread\n 12  eggs\n  3 ",
)
QUESTION = [{"role": "user", "content": "Which planet is closest to the sun?"}]


@llama_cpp.llama_log_callback
def _silent(level, text, data) -> None:
    pass


@dataclass
class Model:
    """A model as a file of llama.cpp's, opened."""

    name: str
    path: Path
    engine: llama_cpp.Llama

    @property
    def bytes(self) -> int:
        """What decoding a token reads; one row of embeddings that the output does not share."""
        tensors = read_gguf(self.path).tensors
        apart = "output.weight" in tensors
        return sum(t.size for n, t in tensors.items() if n != "token_embd.weight" or not apart)


def greedy(engine: llama_cpp.Llama, ids: Sequence[int]) -> list[int]:
    """The likeliest tokens after a prompt, one after the other."""
    engine.reset()
    engine.eval(ids)
    found: list[int] = []
    while len(found) < TOKENS:
        if found:
            engine.eval(found[-1:])
        logits = llama_cpp.llama_get_logits(engine.ctx)
        found.append(int(np.argmax(np.ctypeslib.as_array(logits, (engine.n_vocab(),)))))
    return found


def check(model: Model) -> bool:
    """Print how the continuations of three prompts compare, and return whether they agree."""
    reference, tokenizer = pk.load(model.path, dtype="fp32"), load_tokenizer(str(model.path))
    chat = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    fine = True
    for text in (*TEXTS, chat):
        ids = tokenizer(text).input_ids
        if model.engine.tokenize(text.encode(), special=True) != ids:
            print(f"{model.name}: {text!r} becomes other tokens")
            return False
        ours = greedy(model.engine, ids)
        apart = [(i, gap) for i, gap in enumerate(shortfalls(reference, ids, ours)) if gap > 0]
        told = "equal" if not apart else ", ".join(f"token {i}: {gap:.4f} nats" for i, gap in apart)
        print(f"{model.name:12} {told:34} {tokenizer.decode(ours)[:60]!r}", flush=True)
        fine &= all(gap < NEAR_TIE for _, gap in apart)
    return fine


def decode(engine: llama_cpp.Llama, count: int):
    """Decodes tokens one by one, as llama-bench does; which ones matters not for the time."""
    token = (llama_cpp.llama_token * 1)()

    def run() -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(engine.ctx), True)
        for token[0] in range(100, 100 + count):
            if llama_cpp.llama_decode(engine.ctx, llama_cpp.llama_batch_get_one(token, 1)):
                raise RuntimeError("llama_decode failed")
        llama_cpp.llama_synchronize(engine.ctx)

    return run


def prefill(engine: llama_cpp.Llama, count: int):
    """Reads a prompt."""

    def run() -> None:
        engine.reset()
        engine.eval(range(100, 100 + count))

    return run


@contextmanager
def opened(sources: dict[str, str], outtype: str, threads: int) -> Iterator[list[Model]]:
    """Every model, exported and in llama.cpp."""
    with tempfile.TemporaryDirectory() as place:
        found = []
        for name, source in sources.items():
            path = Path(place) / f"{name}.gguf"
            save_gguf(pk.load(source), load_tokenizer(source), path, outtype)
            options = {"n_ctx": 1024, "n_threads": threads, "n_threads_batch": threads}
            options["flash_attn"] = True  # llama.cpp's own tools choose it by themselves
            engine = llama_cpp.Llama(str(path), verbose=False, **options)
            found.append(Model(name, path, engine))
        yield found


def prune_demo(place: Path) -> dict[str, str]:
    """The embedded model with half of its neurons, in layers of one width and of two.

    In fp32, the faster dtype on most processors; which neurons stay is of no matter here.
    """
    tokenizer = load_tokenizer("demo")
    model = pk.load("demo", dtype="fp32")
    few = Corpus("HumanEval", humaneval()[0].examples[:PROMPTS])
    stats = pk.calibrate(model, tokenizer, few, gram=True, quiet=True)
    scores = pk.score(stats, model, criterion="wanda")
    dense = tuple(view.width for view in find_mlps(model, verify=False))
    found = {}
    for name, widths in {"half": (768, 768), "uneven": (640, 896)}.items():
        kept = [s.topk(widths[i % 2]).indices.sort().values.int() for i, s in enumerate(scores)]
        pruned = pk.load("demo", dtype="fp32")
        pk.prune(pruned, PrunePlan(tuple(kept), dense), stats=stats, compensate="lstsq")
        pk.save(pruned, tokenizer, place / name)
        found[name] = str(place / name)
    return found


def speed(models: list[Model], rounds: int, generate: int, prompt: int) -> bool:
    """Print tokens a second of all models in turn; return whether they gain what bytes promise."""
    fine = True
    for what, work, count in (("tg", decode, generate), ("pp", prefill, prompt)):
        seconds = interleave({m.name: work(m.engine, count) for m in models}, rounds, warmup=1)
        base = seconds[models[0].name]
        for model in models:
            mine = seconds[model.name]
            s = summarise([count / t for t in mine])
            ratio = median(b / t for b, t in zip(base, mine, strict=True))
            promised = models[0].bytes / model.bytes
            told = f"{model.bytes / 1e6:8.1f} MB {s.median:8.1f} ({s.low:.1f} – {s.high:.1f})"
            print(f"{model.name:12} {what}{count:<4} {told:38} {ratio:6.3f} ×", end="")
            if what == "tg":
                print(f"  bytes {promised:.3f} ×, share {ratio / promised:.3f}", end="")
                fine &= ratio >= FLOOR * promised
            print(flush=True)
    return fine


def main() -> None:
    """Check, then measure; exit status 1 where they part, or a model is slower than its bytes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dense", default="demo", help="a folder, or demo")
    parser.add_argument("--pruned", nargs="+", help="folders; by default the demo's, made here")
    parser.add_argument("--outtype", default="f16", choices=("f32", "f16", "bf16", "q8_0"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--generate", type=int, default=64, help="tokens decoded")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of prefill")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--check-only", action="store_true", help="measure no speed")
    options = parser.parse_args()
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
    facts = provenance()
    print(
        f"{facts['device'].rpartition(',')[0]}, {options.threads} threads, {options.outtype}, "
        f"llama-cpp-python {llama_cpp.__version__}, torch {facts['versions']['torch']}, "
        f"transformers {facts['versions']['transformers']}, {options.rounds} rounds",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as place:
        given = {Path(p).name: p for p in options.pruned or ()} or prune_demo(Path(place))
        torch.set_num_threads(1)  # no pool of torch's own at work beside llama.cpp's
        with opened({"dense": options.dense, **given}, options.outtype, options.threads) as models:
            agreed = [check(model) for model in models]
            if not all(agreed):
                raise SystemExit("llama.cpp and transformers part by more than a near-tie")
            if options.check_only:
                return
            if not speed(models, options.rounds, options.generate, options.prompt):
                raise SystemExit(f"decoding gains less than {FLOOR} of what its bytes promise")


if __name__ == "__main__":
    main()
