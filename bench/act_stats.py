"""gated_act_stats against the activation in plain torch, without and with its statistics.

Both take turns in one process, after a check that they agree. `torch` is two operations,
act(gate)·up, and gathers nothing; `reference` computes the statistics too. GB/s counts 3·T·F·b
bytes, what one pass over gate, up and h moves.
"""

from __future__ import annotations

import torch

from bench.start import start
from prunekit.measure.timing import interleave, summarise
from prunekit.ops import ACTIVATIONS, activation_code, gated_act_stats, gated_act_stats_ref

CASES = (
    (2048, 1536, torch.bfloat16, "silu"),
    (2048, 1536, torch.bfloat16, "gelu"),
    (2048, 1536, torch.bfloat16, "gelu_tanh"),
    (2048, 1536, torch.float16, "silu"),
    (2048, 1536, torch.float32, "silu"),
    (2048, 8960, torch.bfloat16, "silu"),
    (2048, 18944, torch.bfloat16, "silu"),
)
PROMPTS = 16


def check(gate, up, spans, act: str) -> None:
    """All three outputs within a last place of the dtype, of the largest value."""
    wanted = gated_act_stats_ref(gate, up, spans, activation_code(act))
    tolerance = max(torch.finfo(gate.dtype).eps, 1e-5)
    for got, want in zip(gated_act_stats(gate, up, spans, act), wanted, strict=True):
        if (got.double() - want.double()).abs().max() > tolerance * want.double().abs().max():
            raise SystemExit(f"gated_act_stats does not agree with its reference for {act}")


def measure(tokens: int, width: int, dtype: torch.dtype, act: str, rounds: int) -> None:
    gate, up = torch.randn(2, tokens, width).to(dtype).unbind()
    edges = torch.linspace(0, tokens, PROMPTS + 1).long()
    spans = torch.stack([edges[:-1], edges[1:]], dim=1)
    check(gate, up, spans, act)

    activation, code = ACTIVATIONS[act], activation_code(act)
    cases = {
        "torch": lambda: activation(gate) * up,
        "gated_act_stats": lambda: gated_act_stats(gate, up, spans, act),
    }
    seconds = interleave(cases, rounds)
    # Apart from the others: its many temporaries would empty the caches for whoever comes next.
    reference = {"reference": lambda: gated_act_stats_ref(gate, up, spans, code)}
    seconds |= interleave(reference, 1 + rounds // 8, warmup=1)
    plain = summarise(seconds["torch"]).median
    moved = 3 * tokens * width * dtype.itemsize

    print(f"\n[{tokens}, {width}] {str(dtype).removeprefix('torch.')}, {act}")
    print(f"{'':16} {'median ms':>9} {'p25-p75':>15} {'GB/s':>6} {'of torch':>8}")
    for name, values in seconds.items():
        s = summarise(values)
        spread = f"{s.low * 1e3:.2f}-{s.high * 1e3:.2f}"
        print(
            f"{name:16} {s.median * 1e3:9.2f} {spread:>15} {moved / s.median / 1e9:6.1f} "
            f"{s.median / plain:8.2f}"
        )


def main() -> None:
    rounds = start(__doc__)
    for case in CASES:
        measure(*case, rounds)


if __name__ == "__main__":
    main()
