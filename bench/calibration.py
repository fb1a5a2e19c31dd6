"""What calibration costs beside a plain forward, on the embedded model.

Four ways over the same prompts, interleaved: the plain decoder, calibration with every statistic
but the Gram matrix, with it too, and the paper's way (arXiv 2604.27115): hooks that recompute the
gate and up products, copy each layer's means to the host, and keep every prompt, with all prompts
padded to the longest of the set.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

from prunekit.arch import find_mlps
from prunekit.batching import Tokens, batches, encode
from prunekit.calibrate import calibrate, forward_decoder
from prunekit.corpus import Corpus
from prunekit.integrations.loading import load, load_tokenizer
from prunekit.measure import interleave, provenance, summarise
from prunekit.tasks.embedded import humaneval

BATCH_TOKENS = 2048


def plain(model: nn.Module, prompts: list[Tokens]) -> None:
    """The decoder over length-sorted batches, nothing gathered."""
    for batch in batches(prompts, BATCH_TOKENS):
        forward_decoder(model, batch)


@torch.inference_mode()
def paper_way(model: nn.Module, prompts: list[Tokens], batch: int = 8) -> torch.Tensor:
    """Mean abs h of every prompt and layer, [prompts, L, F] fp32, by hooks that recompute h."""
    views = find_mlps(model, verify=False)
    longest = max(len(p.ids) for p in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros(len(prompts), longest)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt.ids)] = torch.tensor(prompt.ids)
        mask[row, : len(prompt.ids)] = 1
    kept = torch.zeros(len(prompts), len(views), views[0].width)
    rows = slice(0, 0)

    def hook_for(layer: int):
        def hook(mlp: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            x = inputs[0]
            h = (mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)).abs().float()
            weight = mask[rows, :, None]
            kept[rows, layer] = ((h * weight).sum(1) / weight.sum(1)).cpu()

        return hook

    handles = [v.module.register_forward_hook(hook_for(i)) for i, v in enumerate(views)]
    for start in range(0, len(prompts), batch):
        rows = slice(start, min(start + batch, len(prompts)))
        model.get_decoder()(input_ids=ids[rows], attention_mask=mask[rows].long(), use_cache=False)
    for handle in handles:
        handle.remove()
    return kept


def check(model: nn.Module, tokenizer, corpus: Corpus) -> None:
    """The two ways must agree on what they both know, or no time means anything."""
    few = Corpus(corpus.name, corpus.examples[:6])
    stats = calibrate(model, tokenizer, few, quiet=True)
    means = paper_way(model, encode(few, tokenizer, 1024)).double().mean(0)
    for sums, expected in zip(stats.target, means, strict=True):
        error = (sums.prompt_mean - expected).norm() / expected.norm()
        assert error < 2e-2, f"calibration and the paper's way differ by {error:.1e}"


def main() -> None:
    """Print a row a way: seconds, tokens a second, and the ratio to the plain forward."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=48, help="HumanEval problems")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    model, tokenizer = load("demo"), load_tokenizer("demo")
    halves = humaneval()
    corpus = Corpus("HumanEval", (halves[0].examples + halves[1].examples)[: options.prompts])
    prompts = encode(corpus, tokenizer, 1024)
    tokens = sum(len(p.ids) for p in prompts)
    check(model, tokenizer, corpus)

    def ours(gram: bool) -> Callable[[], object]:
        return lambda: calibrate(model, tokenizer, corpus, gram=gram, quiet=True)

    cases = {
        "plain decoder forward": lambda: plain(model, prompts),
        "calibrate, all but the Gram": ours(gram=False),
        "calibrate, with the Gram": ours(gram=True),
        "the paper's way": lambda: paper_way(model, prompts),
    }
    seconds = interleave(cases, options.rounds, warmup=1)
    base = seconds["plain decoder forward"]
    facts = provenance()
    print(f"\ncalibration of SmolLM2-135M (bf16), {len(prompts)} prompts, {tokens} tokens")
    print(f"{facts['device']}, torch {facts['versions']['torch']}, {options.rounds} rounds")
    print(f"{'':28}{'seconds':>9}{'quartiles':>18}{'tokens/s':>10}{'ratio':>8}")
    for name, mine in seconds.items():
        s = summarise(mine)
        ratio = median(a / b for a, b in zip(mine, base, strict=True))
        spread = f"{s.low:.2f} – {s.high:.2f}"
        print(f"{name:28}{s.median:9.2f}{spread:>18}{tokens / s.median:10.0f}{ratio:8.2f}")


if __name__ == "__main__":
    main()
