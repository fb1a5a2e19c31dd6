"""gated_act_stats in Triton: its numbers in the interpreter, its machine code ahead of time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from prunekit.ops.activations import NAMES
from prunekit.ops.gated_act_stats import gated_act_stats_ref
from prunekit_kernels.gated_act_stats import gated_act_stats_triton, split_count
from tests.kernels.device import DEVICE, DTYPES, INTERPRETED, slack

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(),
        reason="needs TRITON_INTERPRET=1 or a GPU",
    ),
    # exp(-x) of a very negative x is infinite, and x over it the right zero; numpy remarks on it.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]


SPANS = {
    "none": lambda tokens: [],
    "all": lambda tokens: [(0, tokens)],
    "empty": lambda tokens: [(0, 0), (0, tokens), (tokens, tokens)],
    "padded": lambda tokens: [
        (tokens // 8, tokens // 3),  # rows before the first span, and a gap behind it
        (tokens // 2, tokens // 2),
        (tokens // 2, tokens - tokens // 6),  # rows after the last
    ],
}


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    """Fill what new_empty returns with NaN, so that an element nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random_inputs(tokens, width, dtype, *, with_up=True):
    generator = torch.Generator().manual_seed(tokens * 1000 + width)
    gate, up = torch.randn(2, tokens, width, generator=generator).mul(3).to(DEVICE, dtype)
    return gate, up if with_up else None


def as_spans(pairs):
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


def check(gate, up, spans, act):
    """Hold h against the formula in fp64, and the statistics against exact sums of that same h."""
    h, prompt_stats, token_stats = gated_act_stats_triton(gate, up, spans, act)

    exact = gated_act_stats_ref(gate.double(), None if up is None else up.double(), spans, act)[0]
    torch_h = gated_act_stats_ref(gate, up, spans, act)[0]
    assert h.dtype == gate.dtype
    assert h.is_contiguous()
    assert h.shape == gate.shape
    if h.numel():
        torch_error = (torch_h.double() - exact).abs().max()
        allowed = 2 * torch_error + max(slack(exact, h.dtype), 1e-7)
        assert (h.double() - exact).abs().max() <= allowed

    prompts = [h[start:end].double() for start, end in spans.tolist()]
    counted = torch.cat([h[:0].double(), *prompts])
    open_gates = torch.cat([gate[:0], *(gate[start:end] for start, end in spans.tolist())]) > 0
    abs_sums, square_sums = prompt_stats.double()
    assert prompt_stats.dtype == token_stats.dtype == torch.float32
    assert len(abs_sums) == len(square_sums) == len(prompts)
    for p, rows in enumerate(prompts):
        torch.testing.assert_close(abs_sums[p], rows.abs().sum(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(square_sums[p], rows.square().sum(0), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(token_stats[0].double(), counted.sum(0), rtol=1e-5, atol=1e-4)
    largest = torch.cat([counted.abs(), counted.new_zeros(1, h.shape[1])]).amax(0)
    assert torch.equal(token_stats[1].double(), largest)
    assert torch.equal(token_stats[2], open_gates.sum(0).float())


SHAPES = [
    (0, 37),
    (1, 1),
    (1, 130),
    (7, 37),
    (33, 1),  # more than two programs share a prompt
    (33, 130),
    (33, 600),  # more than one block of columns
]


@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_act_stats_triton(dtype, tokens, width, spans):
    gate, up = random_inputs(tokens, width, dtype)
    check(gate, up, as_spans(spans(tokens)), NAMES.index("silu"))


@pytest.mark.parametrize("with_up", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("act", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(dtype, act, with_up):
    gate, up = random_inputs(65, 130, dtype, with_up=with_up)
    gate[0, :4] = torch.tensor([0.0, -30.0, 30.0, -1e-3])
    check(gate, up, as_spans(SPANS["padded"](65)), NAMES.index(act))


def test_slices_of_a_fused_projection():
    fused = torch.cat(random_inputs(33, 130, torch.float32), dim=1)
    gate, up = fused.chunk(2, dim=1)
    assert not gate.is_contiguous()
    check(gate, up, as_spans(SPANS["padded"](33)), NAMES.index("silu"))


def test_no_columns():
    gate, up = random_inputs(5, 0, torch.float16)
    results = gated_act_stats_triton(gate, up, as_spans([(0, 5)]), 0)
    assert [tuple(t.shape) for t in results] == [(5, 0), (2, 1, 0), (3, 0)]


def test_same_bits_every_run():
    gate, up = random_inputs(257, 70, torch.float32)
    spans = as_spans(SPANS["padded"](257))
    runs = [gated_act_stats_triton(gate, up, spans, 0) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_nan_reaches_every_statistic_of_its_column():
    gate, up = random_inputs(33, 37, torch.float16)
    gate[20, 5] = float("nan")
    h, prompt_stats, token_stats = gated_act_stats_triton(
        gate, up, as_spans([(0, 10), (10, 33)]), 0
    )
    assert h.isnan().nonzero().tolist() == [[20, 5]]
    assert prompt_stats.isnan().nonzero().tolist() == [[0, 1, 5], [1, 1, 5]]
    assert token_stats.isnan().nonzero().tolist() == [[0, 5], [1, 5]]


def test_padding_counts_in_no_statistic():
    gate, up = random_inputs(33, 37, torch.float32)
    spans = as_spans([(4, 9), (12, 30)])
    before = gated_act_stats_triton(gate, up, spans, 0)
    for row in (*range(4), *range(9, 12), *range(30, 33)):
        gate[row] = 1e3
    after = gated_act_stats_triton(gate, up, spans, 0)
    assert torch.equal(before[1], after[1])
    assert torch.equal(before[2], after[2])


def test_unsupported_dtype():
    gate, up = random_inputs(3, 4, torch.float64)
    with pytest.raises(ValueError, match=r"takes bfloat16, float16 or float32, got torch\.float64"):
        gated_act_stats_triton(gate, up, as_spans([(0, 3)]), 0)


@pytest.mark.parametrize("prompts", [1, 3, 800])
@pytest.mark.parametrize("tokens", [0, 1, 4096, 80_000, 3_000_000])
def test_counts_fit_the_half_register_they_share(tokens, prompts):
    splits = split_count(tokens, prompts, 18)
    assert splits >= 1
    assert -(-tokens // splits) <= 65535  # one prompt may own every row


def compiled(targets, dtypes, activations):
    """Compile in a process of its own: in this one, Triton interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = "tests.kernels.aot_gated_act_stats"
    run = subprocess.run(
        [sys.executable, "-m", script, targets, dtypes, activations],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def wide(moves):
    return sum(count for name, count in moves.items() if name.endswith(".128"))


def check_machine_code(kernels):
    """Hold against a plain kernel what the audit, which has no such kernel, does not."""
    for kernel in kernels:
        assert kernel["spills"] == 0, kernel
        rows_in_flight = 3
        assert wide(kernel["loads"]) == rows_in_flight * (1 + kernel["with_up"]), kernel
        assert wide(kernel["stores"]) > 0, kernel
        # Streaming needs bytes in flight: half of what runs without sums must fit with them.
        assert 2 * kernel["blocks"] >= kernel["plain_blocks"], kernel


def test_machine_code():
    kernels = compiled("sm_80,sm_100,gfx942", "bfloat16", "1")  # gelu takes the most registers
    assert len(kernels) == 3 * 2
    check_machine_code(kernels)


@pytest.mark.slow
def test_machine_code_everywhere():
    dtypes = "bfloat16,float16,float32"
    kernels = compiled("sm_80,sm_90,sm_100,gfx90a,gfx942", dtypes, "0,1,2,3,4")
    assert len(kernels) == 5 * 3 * 5 * 2
    check_machine_code(kernels)
