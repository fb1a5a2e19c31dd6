"""Decoding through CompactMLP against transformers' own MLP, on the shapes of real models.

A stack of MLPs is cycled so that no cache serves the weights; both take turns in one process over
the same weights, after a check that they agree. GB/s counts 3·D·F·b, each weight read once; `read`
is the rate at which a loop that does nothing else, of the same threads, reads as many bytes.
"""

from __future__ import annotations

import torch
from torch import nn

from bench.start import begin, options_of
from prunekit.arch import find_mlps
from prunekit.measure.timing import interleave, summarise
from prunekit.nn import CompactMLP

SHAPES = {
    "SmolLM2-135M": (576, (1536, 1024, 768)),
    "Qwen2.5-1.5B": (1536, (8960, 7168, 4480)),
    "Qwen2.5-7B": (3584, (18944, 15104, 9472)),
}
DTYPES = ("bfloat16", "float32")
TOKENS = (1, 4, 8, 16)
WEIGHTS_BYTES = 600 << 20  # more than the caches of any machine this is likely to run on


def llama(hidden: int, width: int, dtype: torch.dtype) -> nn.Module:
    """A Llama of MLPs: as many layers as fill WEIGHTS_BYTES, next to nothing in attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=max(2, WEIGHTS_BYTES // (3 * hidden * width * dtype.itemsize)),
        num_attention_heads=1,
        head_dim=8,
        vocab_size=8,
    )
    return LlamaForCausalLM(config).to(dtype).requires_grad_(False).eval()


def measure(name: str, hidden: int, width: int, dtype: torch.dtype, rounds: int) -> None:
    views = find_mlps(llama(hidden, width, dtype))
    theirs, ours = [view.module for view in views], [CompactMLP(view) for view in views]
    moved = len(theirs) * 3 * hidden * width * dtype.itemsize

    def cycle(mlps: list[nn.Module], x: torch.Tensor):
        def run() -> None:
            with torch.inference_mode():
                for mlp in mlps:
                    mlp(x)

        return run

    plain = torch.ones(moved // 4)

    def read() -> None:
        torch.ops.prunekit.read_floats(plain)

    for tokens in TOKENS:
        x = torch.randn(tokens, hidden).to(dtype)
        got, want = ours[0](x), theirs[0](x)
        scale = want.float().std().item()  # two roundings to bf16 differ by some hundredths of it
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05 * scale)
        cases = {"theirs": cycle(theirs, x), "ours": cycle(ours, x), "read": read}
        seconds = {k: summarise(v) for k, v in interleave(cases, rounds, warmup=1).items()}
        us = {k: 1e6 * s.median / len(theirs) for k, s in seconds.items()}
        rates = {k: moved / s.median / 1e9 for k, s in seconds.items()}
        spread = 1e6 / len(theirs) * seconds["ours"].low, 1e6 / len(theirs) * seconds["ours"].high
        print(
            f"{name:13} {width:6} {str(dtype).removeprefix('torch.'):9} {tokens:3} "
            f"{us['theirs']:11.1f} {us['ours']:8.1f} {spread[0]:8.1f}-{spread[1]:<8.1f} "
            f"{us['theirs'] / us['ours']:7.2f} {rates['ours']:6.1f} "
            f"{rates['read']:6.1f}",
            flush=True,
        )


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--model", choices=SHAPES, action="append", help="all, if none is named")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="all, if none is named")
    options = begin(parser.parse_args())
    print(
        f"\n{'model':13} {'width':>6} {'dtype':9} {'T':>3} {'theirs µs':>11} {'ours µs':>8} "
        f"{'p25-p75':>17} {'speedup':>7} {'GB/s':>6} {'read':>6}"
    )
    for dtype in options.dtype or DTYPES:
        for name in options.model or SHAPES:
            hidden, widths = SHAPES[name]
            for width in widths:
                measure(name, hidden, width, getattr(torch, dtype), options.rounds)


if __name__ == "__main__":
    main()
