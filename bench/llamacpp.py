"""Dense and pruned models in llama.cpp: do they continue as in transformers, and how fast are they.

Every model is exported as GGUF. llama.cpp continues three prompts greedily, 32 tokens each, and so
does transformers in fp32 over the values of the same file; where they part, the gap is given: by
how many nats transformers likes its own token better. Then all take turns at decoding and prefill
in one process. A token that is decoded reads every weight once, so its speed is held against the
bytes. Needs llama-cpp-python.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import llama_cpp
import numpy as np
import torch

import prunekit as pk
from bench.agreement import shortfalls
from prunekit.arch import find_mlps
from prunekit.checkpoint.gguf_read import read_gguf
from prunekit.corpus import Corpus
from prunekit.integrations.llamacpp import LlamaCpp
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


def read_by_a_token(path: Path) -> int:
    """Bytes that decoding reads; one row of embeddings that the output does not share."""
    tensors = read_gguf(path).tensors
    apart = "output.weight" in tensors
    return sum(t.size for n, t in tensors.items() if n != "token_embd.weight" or not apart)


def check(name: str, path: Path, engine: llama_cpp.Llama) -> bool:
    """Print how the continuations of three prompts compare, and return whether they agree."""
    reference, tokenizer = pk.load(path, dtype="fp32"), load_tokenizer(str(path))
    chat = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    fine = True
    for text in (*TEXTS, chat):
        ids = tokenizer(text).input_ids
        if engine.tokenize(text.encode(), special=True) != ids:
            print(f"{name}: {text!r} becomes other tokens")
            return False
        ours = greedy(engine, ids)
        apart = [(i, gap) for i, gap in enumerate(shortfalls(reference, ids, ours)) if gap > 0]
        told = "equal" if not apart else ", ".join(f"token {i}: {gap:.4f} nats" for i, gap in apart)
        print(f"{name:12} {told:34} {tokenizer.decode(ours)[:60]!r}", flush=True)
        fine &= all(gap < NEAR_TIE for _, gap in apart)
    return fine


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


def speed(llama: LlamaCpp, rounds: int, generate: int, prompt: int) -> bool:
    """Print tokens a second of all models in turn; return whether they gain what bytes promise."""
    fine, cases = True, llama.cases(prompt, generate, [1])
    taken = interleave({key: run for key, (run, _) in cases.items()}, rounds, warmup=1)
    bytes_ = {name: read_by_a_token(path) for name, path in llama.files.items()}
    base = next(iter(bytes_))
    for (name, test, size), (_, count) in cases.items():
        mine, first = taken[name, test, size], taken[base, test, size]
        s = summarise([count / t for t in mine])
        ratio = median(b / t for b, t in zip(first, mine, strict=True))
        promised = bytes_[base] / bytes_[name]
        told = f"{bytes_[name] / 1e6:8.1f} MB {s.median:8.1f} ({s.low:.1f} – {s.high:.1f})"
        print(f"{name:12} {test:6} {told:38} {ratio:6.3f} ×", end="")
        if test.startswith("tg"):
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
    longest = options.prompt + options.generate
    torch.set_num_threads(options.threads)  # llama.cpp takes as many
    facts = provenance()
    print(
        f"{facts['device'].rpartition(',')[0]}, {options.threads} threads, {options.outtype}, "
        f"llama-cpp-python {llama_cpp.__version__}, torch {facts['versions']['torch']}, "
        f"transformers {facts['versions']['transformers']}, {options.rounds} rounds",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as place:
        given = {Path(p).name: p for p in options.pruned or ()} or prune_demo(Path(place))
        sources = {"dense": options.dense, **given}
        models = {name: (pk.load(at), load_tokenizer(at)) for name, at in sources.items()}
        llama = LlamaCpp(models, Path(place), options.outtype, max(1024, longest))
        del models
        torch.set_num_threads(1)  # no pool of torch's own at work beside llama.cpp's
        agreed = [check(n, path, llama.engines[n]) for n, path in llama.files.items()]
        if not all(agreed):
            raise SystemExit("llama.cpp and transformers part by more than a near-tie")
        if options.check_only:
            return
        if not speed(llama, options.rounds, options.generate, options.prompt):
            raise SystemExit(f"decoding gains less than {FLOOR} of what its bytes promise")


if __name__ == "__main__":
    main()
