"""The gated MLP's prefill in Triton: its numbers in the interpreter, what it would launch."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from prunekit.ops.activations import NAMES, activate
from prunekit.ops.gated_act_stats import gated_act_stats_ref
from prunekit.ops.gated_mlp import gated_mlp_ref
from prunekit_kernels import launch
from prunekit_kernels.gated_mlp_prefill import (
    CANDIDATES,
    gated_mlp_prefill,
    gated_mlp_prefill_stats,
)
from prunekit_kernels.segment_stats import segments
from prunekit_kernels.tuning import trying
from tests.kernels.device import DEVICE, DTYPES, INTERPRETED, slack

pytestmark = [
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(),
        reason="needs TRITON_INTERPRET=1 or a GPU",
    ),
    # exp(-x) of a very negative x is infinite, and x over it the right zero; numpy remarks on it.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]

SILU = NAMES.index("silu")

SPANS = {
    "none": lambda tokens: [],
    "all": lambda tokens: [(0, tokens)],
    "empty": lambda tokens: [(0, 0), (0, tokens), (tokens, tokens)],
    "padded": lambda tokens: [
        (tokens // 8, tokens // 3),  # rows before the first span, and a gap behind it
        (tokens // 2, tokens // 2),
        (tokens // 2, tokens - tokens // 6),  # more than a tile, and rows after the last
    ],
}

TILE = {
    "BLOCK_M": 32,
    "BLOCK_N": 32,
    "BLOCK_K": 32,
    "GROUP_M": 2,
    "num_warps": 4,
    "num_stages": 2,
}
VARIANTS = {
    "plain": TILE,
    "persistent": TILE | {"PERSISTENT": 1},  # 4 programs in the interpreter
    "descriptor": TILE | {"DESCRIPTOR": True},
    "both": TILE | {"DESCRIPTOR": True, "PERSISTENT": 1},
}


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    """Fill what new_empty returns with NaN, so that an element nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random_mlp(tokens, hidden, width, dtype, *, with_up=True, with_bias=False):
    """Return x, gate, up, down and three biases; gate and up are halves of one matrix."""
    generator = torch.Generator().manual_seed(tokens * 1000 + hidden + width)

    def random(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)

    x = random(tokens, hidden)
    gate, up = random(width, 2 * hidden, scale=2 * hidden**-0.5).chunk(2, dim=1)
    down = random(hidden, width, scale=max(width, 1) ** -0.5)
    biases = (random(width), random(width), random(hidden)) if with_bias else (None,) * 3
    if not with_up:
        up, biases = None, (biases[0], None, biases[2])
    return x, gate, up, down, *biases


def wide(tensors):
    return [None if t is None else t.double() for t in tensors]


def assert_as_exact_as_torch(ours, torchs, exact):
    assert ours.dtype == torchs.dtype
    assert ours.shape == exact.shape
    assert ours.is_contiguous()
    if ours.numel():
        torch_error = (torchs.double() - exact).abs().max()
        allowed = 2 * torch_error + max(slack(exact, ours.dtype), 1e-6)
        assert (ours.double() - exact).abs().max() <= allowed


def check(mlp, act=SILU):
    y = gated_mlp_prefill(*mlp, act)
    assert_as_exact_as_torch(y, gated_mlp_ref(*mlp, act), gated_mlp_ref(*wide(mlp), act))


SHAPES = [  # tokens, hidden, width
    (0, 32, 32),
    (1, 32, 64),
    (70, 64, 96),
    (33, 37, 65),  # no size divisible by anything
    (129, 40, 33),  # thin last groups of tiles
]


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_mlp_prefill(dtype, shape, variant):
    with trying("dual_product", variant):
        check(random_mlp(*shape, dtype))


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("with_up", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("act", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(dtype, act, with_up, with_bias):
    mlp = random_mlp(35, 40, 37, dtype, with_up=with_up, with_bias=with_bias)
    check(mlp, NAMES.index(act))


def test_no_width():
    mlp = random_mlp(5, 32, 0, torch.float32, with_bias=True)
    assert torch.equal(gated_mlp_prefill(*mlp, SILU), mlp[-1].expand(5, 32))


@pytest.mark.parametrize("kernel", ["dual_product", "down_product"])
def test_candidates(kernel):
    mlp = random_mlp(7, 24, 40, torch.float16)
    for config in CANDIDATES[kernel]:
        with trying(kernel, config):
            check(mlp)


@pytest.mark.skipif(not INTERPRETED, reason="tensor cores add up another tile in another order")
def test_variants_give_the_same_bits():
    mlp = random_mlp(70, 64, 65, torch.float16, with_bias=True)  # 9 tiles, 4 programs
    spans = torch.tensor(SPANS["padded"](70))
    results = []
    for variant in VARIANTS.values():
        with trying("dual_product_stats", variant):
            results.append(gated_mlp_prefill_stats(*mlp, spans, SILU))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def stats_of(mlp, spans, act):
    """Hold y and h against fp64, and the statistics against exact sums of that same h."""
    y, h, prompt_stats, token_stats = gated_mlp_prefill_stats(*mlp, spans, act)
    x, gate, up, _, gate_bias, up_bias, _ = wide(mlp)
    g = F.linear(x, gate, gate_bias)
    exact = activate(g, act) * (1.0 if up is None else F.linear(x, up, up_bias))
    torch_h = activate(F.linear(*mlp[:2], mlp[4]), act)
    torch_h = torch_h if up is None else torch_h * F.linear(mlp[0], mlp[2], mlp[5])
    assert_as_exact_as_torch(h, torch_h, exact)
    assert_as_exact_as_torch(y, gated_mlp_ref(*mlp, act), gated_mlp_ref(*wide(mlp), act))

    prompts = [h[start:end].double() for start, end in spans.tolist()]
    counted = torch.cat([h[:0].double(), *prompts])
    open_gates = torch.cat([g[:0], *(g[start:end] for start, end in spans.tolist())]) > 0
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


@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("shape", [(0, 32, 37), (1, 32, 64), (101, 40, 33)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics(dtype, shape, spans):
    as_tensor = torch.tensor(spans(shape[0]), dtype=torch.int64).reshape(-1, 2)
    stats_of(random_mlp(*shape, dtype, with_bias=True), as_tensor, SILU)


def test_statistics_of_a_plain_mlp():
    mlp = random_mlp(70, 40, 65, torch.float32, with_up=False)
    stats_of(mlp, torch.tensor(SPANS["padded"](70)), NAMES.index("gelu"))


def test_statistics_are_those_of_the_elementwise_kernel():
    mlp = random_mlp(70, 40, 65, torch.float32)
    spans = torch.tensor(SPANS["padded"](70))
    _, h, *ours = gated_mlp_prefill_stats(*mlp, spans, SILU)
    reference = gated_act_stats_ref(*(F.linear(mlp[0], w) for w in mlp[1:3]), spans, SILU)
    for mine, theirs in zip((h, *ours), reference, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_nan_reaches_every_statistic_of_its_prompt_and_no_other():
    mlp = random_mlp(40, 32, 37, torch.float16)
    mlp[0][35, 3] = float("nan")  # a row of the second tile
    spans = torch.tensor([(0, 34), (34, 36), (36, 40)])
    y, h, prompt_stats, token_stats = gated_mlp_prefill_stats(*mlp, spans, SILU)
    assert y.isnan().any(1).nonzero().tolist() == [[35]]
    assert h[35].isnan().all()
    assert prompt_stats.isnan().all(2).tolist() == [[False, True, False]] * 2
    assert not prompt_stats[:, [0, 2]].isnan().any()
    assert token_stats.isnan().all(1).tolist() == [True, True, False]


def test_nan_in_padding_counts_in_no_statistic():
    mlp = random_mlp(40, 32, 37, torch.float32)
    mlp[0][35, 3] = float("nan")
    *_, prompt_stats, token_stats = gated_mlp_prefill_stats(
        *mlp, torch.tensor([(0, 35), (36, 40)]), SILU
    )
    assert not prompt_stats.isnan().any()
    assert not token_stats.isnan().any()


def test_segments():
    spans = torch.tensor([(3, 10), (10, 10), (10, 11), (13, 40)])
    cut = segments(spans, 50, 8, torch.device("cpu"))
    bounds = [[3, 8], [8, 10], [10, 11], [13, 16], [16, 24], [24, 32], [32, 40]]
    assert cut.bounds.tolist() == bounds
    assert cut.of_tile.tolist() == [0, 1, 4, 5, 6, 7, 7, 7]
    assert cut.of_prompt.tolist() == [0, 2, 2, 3, 7]


def test_unsupported_inputs():
    mlp = random_mlp(3, 4, 5, torch.float64)
    with pytest.raises(ValueError, match=r"got x in torch\.float64"):
        gated_mlp_prefill(*mlp, SILU)
    x, gate, up, down, *biases = random_mlp(3, 4, 5, torch.float32)
    with pytest.raises(
        ValueError, match=r"down's rows must have unit stride .* got strides \(1, 4\)"
    ):
        gated_mlp_prefill(x, gate, up, down.t().contiguous().t(), *biases, SILU)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx90a", "gfx942"])
def test_what_would_be_launched(arch):
    mlp = [None if t is None else t.to("meta") for t in random_mlp(300, 64, 96, torch.bfloat16)]
    with launch.recorded(arch) as launches:
        y, h, *_ = gated_mlp_prefill_stats(*mlp, torch.tensor([(0, 300)]), SILU)
    assert y.is_meta
    assert h.shape == (300, 96)
    assert [made.name for made in launches] == ["dual_product", "reduce_segments", "down_product"]
    assert launches[0].grid == (3 * (1 if arch == "sm_90" else 2),)
    for made in (launches[0], launches[2]):
        stages, constants = made.options["num_stages"], made.arguments
        factors = 2 if made.name == "dual_product" else 1
        rows = constants["BLOCK_M"] + factors * constants["BLOCK_N"]
        # A tile of each factor for every stage in flight; on AMD one stage waits in registers.
        buffers = stages - 1 if arch.startswith("gfx") else stages
        # On sm_90 one block a multiprocessor was measured to be best, elsewhere two have to fit.
        most = (64 if arch.startswith("gfx") else 227 if arch == "sm_90" else 112) * 1024
        assert buffers * rows * constants["BLOCK_K"] * 2 <= most


def recorded_dual_product(arch, variant, hidden=64):
    mlp = random_mlp(300, hidden, 96, torch.bfloat16)
    with launch.recorded(arch) as launches, trying("dual_product", variant):
        gated_mlp_prefill(*(None if t is None else t.to("meta") for t in mlp), SILU)
    return launches[0]


def test_persistent_programs_fill_the_card_once():
    small = TILE | {"BLOCK_M": 16, "BLOCK_N": 16, "PERSISTENT": 1}
    assert recorded_dual_product("sm_80", small).grid == (108,)
    assert recorded_dual_product("sm_90", small | {"PERSISTENT": 2}).grid == (19 * 6,)


def test_descriptors_only_where_the_hardware_takes_them():
    def described(arch, hidden=64):
        made = recorded_dual_product(arch, VARIANTS["descriptor"], hidden)
        assert isinstance(made.arguments["x"], torch.Tensor) != made.arguments["DESCRIPTOR"]
        return made.arguments["DESCRIPTOR"]

    assert described("sm_90")
    assert described("sm_100")
    assert not described("sm_80")
    assert not described("gfx942")
    assert not described("sm_90", hidden=60)  # rows of 120 bytes
