"""Every criterion on a second architecture: a small Qwen2, trained on the spot and then pruned.

The model learns Python from the standard library's sources and word problems from reasoning-gym,
from one seed, and is kept in a cache folder. Then it is pruned for Python by every criterion with
the repair that its authors give it, and by prunekit's default; the loss is that of files which
neither training nor calibration saw.
"""

from __future__ import annotations

import argparse
import logging
import math
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from prunekit import files
from prunekit.calibrate import calibrate
from prunekit.corpus import Corpus, from_texts
from prunekit.evaluate import evaluate_loss
from prunekit.experiment.trained import cache_folder
from prunekit.experiment.variants import Variant, run_variants
from prunekit.integrations.loading import load, load_tokenizer
from prunekit.tasks.embedded import word_problems

VOCABULARY = 512
SHAPE = {
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
STEPS = 2000
LENGTH, BATCH, RATE, WARMUP = 256, 8, 3e-3, 100
PROMPT = 600  # characters of a prompt
CALIBRATION, HELD_OUT = 192, 80
SPARSITIES = (0.2, 0.35, 0.5)
DEFAULT = "prunekit's default"
RIVALS = (  # each with the repair it was published with, but for FLAP's bias: Qwen2 has no slot
    ("wanda", "lstsq"),
    ("fluctuation", "none"),
    ("selectivity", "none"),
    ("wanda_sp", "none"),
    ("mean_abs", "none"),
    ("minitron", "none"),
    ("two_stage", "none"),
    ("puzzletron_independent", "none"),
    ("magnitude_ppm", "none"),
    ("magnitude_l2", "none"),
    ("taylor", "none"),
    ("random", "none"),
)


def python_sources() -> list[str]:
    """The standard library's modules, without its tests, in an order that names do not decide."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [p.relative_to(root) for p in root.rglob("*.py")]
    kept = [p for p in paths if not {"site-packages", "test", "tests", "idlelib"} & set(p.parts)]
    kept.sort(key=lambda p: files.digest(str(p)))
    return [(root / p).read_text(encoding="utf-8", errors="replace") for p in kept]


def split() -> tuple[list[str], list[str]]:
    """The sources to train and calibrate on, and those held out, which are other files."""
    sources = python_sources()
    held_out = len(sources) // 5
    return sources[held_out:], sources[:held_out]


def prompts(sources: list[str], count: int, name: str) -> Corpus:
    """``count`` pieces of the files, as many from each as its length gives, evenly spread."""
    pieces = [s[i : i + PROMPT] for s in sources for i in range(0, len(s) - PROMPT + 1, PROMPT)]
    return from_texts([pieces[i * len(pieces) // count] for i in range(count)], name)


def make_tokenizer(sources: list[str]) -> transformers.PreTrainedTokenizerFast:
    """Byte-pair encoding learned from the sources and the word problems."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(sources, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>"
    )


def stream(tokenizer, texts: list[str]) -> torch.Tensor:
    """All texts as one row of tokens, each ended by the end token."""
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    return torch.tensor([i for row in ids for i in (*row, tokenizer.eos_token_id)])


def train(model: torch.nn.Module, tokens: torch.Tensor, steps: int) -> None:
    """AdamW with a warm-up and a cosine, products in bf16, the batches drawn from one seed."""
    generator = torch.Generator().manual_seed(0)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), fused=True)

    def shape(step: int) -> float:
        return min((step + 1) / WARMUP, 0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    begun, total = time.process_time(), 0.0
    model.train()
    for step in range(1, steps + 1):
        starts = torch.randint(len(tokens) - LENGTH - 1, (BATCH,), generator=generator)
        batch = torch.stack([tokens[s : s + LENGTH + 1] for s in starts.tolist()])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        total += loss.item()
        if step % 50 == 0:
            seconds = time.process_time() - begun
            print(f"step {step} of {steps}: loss {total / 50:.3f}, {seconds:.0f} CPU s", flush=True)
            total = 0.0
    model.eval()


def trained(cache: Path, steps: int) -> Path:
    """The folder of the trained model; training happens where it is not in the cache."""
    sources, _ = split()
    recipe = [SHAPE, VOCABULARY, LENGTH, BATCH, RATE, WARMUP, steps, files.digest(sources)]
    folder = cache / f"qwen2-python-{files.digest(recipe)}"
    if (folder / "config.json").exists():
        return folder
    problems = [e.text for e in word_problems(2000, seed=1).examples]
    tokenizer = make_tokenizer(sources + problems)
    tokens = stream(tokenizer, sources + problems)
    print(f"training on {len(tokens):,} tokens, for the first time", flush=True)
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=1, **SHAPE
    )
    model = transformers.Qwen2ForCausalLM(config)
    train(model, tokens, steps)
    with files.replacing_folder(folder, force=True) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder


def variants(sparsities: list[float]) -> list[Variant]:
    """The rivals first, which take seconds, then prunekit's default."""
    found = [
        Variant(f"{criterion} + {repair}", s, criterion, compensate=repair)
        for criterion, repair in RIVALS
        for s in sparsities
    ]
    return found + [Variant(DEFAULT, s) for s in sparsities]


def table(rises: dict[str, dict[float, float]]) -> str:
    """Markdown: the rise by way and sparsity, the best first."""
    sparsities = sorted({s for found in rises.values() for s in found})
    lines = [
        "| criterion + repair | " + " | ".join(f"{s:.1%}" for s in sparsities) + " |",
        "|---" * (len(sparsities) + 1) + "|",
    ]
    for name, found in sorted(rises.items(), key=lambda item: item[1][sparsities[-1]]):
        lines.append(f"| {name} | " + " | ".join(f"{found[s]:.3f}" for s in sparsities) + " |")
    return "\n".join(lines) + "\n"


def beaten_by(rises: dict[str, dict[float, float]]) -> list[str]:
    """The rivals that lose no more than the default does, at whatever sparsity."""
    return [
        f"{name} at {s:.1%}"
        for name, found in rises.items()
        if name != DEFAULT
        for s, rise in found.items()
        if rise <= rises[DEFAULT][s]
    ]


def main() -> int:
    """Train where needed, prune in every way, print the table; 1 where a rival wins."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, default=cache_folder())
    parser.add_argument("--out", type=Path, default=Path("second-architecture.md"))
    parser.add_argument("--steps", type=int, default=STEPS, help="of training")
    parser.add_argument("--sparsity", nargs="+", type=float, default=list(SPARSITIES))
    options = parser.parse_args()
    logging.getLogger("prunekit").setLevel(logging.ERROR)
    folder = trained(options.cache, options.steps)
    model, tokenizer = load(str(folder), dtype="bf16"), load_tokenizer(str(folder))
    seen, unseen = split()
    target = prompts(seen, CALIBRATION, "the standard library, calibration")
    held_out = prompts(unseen, HELD_OUT, "the standard library, held out")
    problems = word_problems(CALIBRATION, seed=2)
    stats = calibrate(model, tokenizer, target, [problems], gram=True, taylor=True, quiet=True)
    dense = evaluate_loss(model, tokenizer, held_out, quiet=True)
    print(f"dense: {dense.loss:.3f} nats a token on {dense.tokens:,} tokens", flush=True)
    rises: dict[str, dict[float, float]] = {}
    for outcome in run_variants(
        model, tokenizer, stats, held_out, variants(options.sparsity), quiet=True
    ):
        rise = outcome.loss.loss - dense.loss
        rises.setdefault(outcome.variant.name, {})[outcome.sparsity] = rise
        print(f"{outcome.variant.name:32} {outcome.sparsity:6.1%} {rise:+8.4f}", flush=True)
    options.out.write_text(table(rises))
    print(table(rises))
    lost = beaten_by(rises)
    print(f"beaten by {', '.join(lost)}" if lost else "the default loses least at every sparsity")
    return bool(lost)


if __name__ == "__main__":
    raise SystemExit(main())
