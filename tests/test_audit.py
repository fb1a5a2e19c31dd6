"""The audit of GPU kernels: that it sees what it is there to see, and that it passes."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from bench.audit import budgets, cuda
from bench.audit.binary import Figures, load_bits, load_rank
from bench.audit.budgets import FOLDER
from bench.audit.cases import CASES
from bench.audit.formulas import FORMULAS, STREAMING, nbytes
from bench.audit.meter import apart, metered
from bench.audit.occupancy import blocks_per_multiprocessor
from bench.audit.run import hold
from bench.audit.traffic import Run, meter
from bench.audit.variants import VARIANTS
from prunekit.measure.roofline import CARDS, predicted_bound
from prunekit_kernels.launch import launch

ROOT = Path(__file__).parents[1]
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="the meter wants TRITON_INTERPRET=1"
)


@triton.jit
def _double_kernel(
    x, y, size, row_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr, BUG: tl.constexpr
):
    """y = 2·x for ROWS rows, or with one of the bugs that the meter is for."""
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    for row in range(ROWS):
        if BUG == "no mask on load":
            value = tl.load(x + row * row_stride + columns)
        else:
            value = tl.load(x + row * row_stride + columns, mask=inside, other=0.0)
        if BUG == "read twice":
            value += tl.load(x + row * row_stride + columns, mask=inside, other=0.0)
        else:
            value *= 2
        if BUG == "no mask on store":
            tl.store(y + row * size + columns, value)
        else:
            tl.store(y + row * size + columns, value, mask=inside)


def double(x: torch.Tensor, bug: str = "") -> torch.Tensor:
    y = torch.empty(x.shape, dtype=x.dtype)
    arguments = x, y, x.shape[1], x.stride(0)
    launch(_double_kernel, (1,), *arguments, ROWS=len(x), BLOCK=64, BUG=bug)
    return y


DOUBLE = {"double": (lambda a: nbytes(a["x"], a["y"]), STREAMING)}


def findings(x: torch.Tensor, bug: str) -> list[str]:
    (result,) = meter(Run("double", "2x48", lambda: double(x, bug)), "sm_90", DOUBLE)
    return result.findings()


@interpreted
def test_meter_finds_nothing_wrong_with_a_right_kernel():
    x = apart(torch.randn(2, 48))
    with metered() as counted:
        y = double(x)
    assert torch.equal(y, 2 * x)
    (counts,) = counted.launches
    assert counts.kernel == "double"
    assert counts.bytes == {"load": nbytes(x), "store": nbytes(y)}
    assert counts.moved == 2 * nbytes(x)
    assert counts.strays == 0
    assert findings(x, "") == []


@interpreted
@pytest.mark.parametrize("bug", ["no mask on load", "no mask on store"])
def test_meter_finds_a_dropped_mask(bug):
    # 16 lanes of each row are too many; those of the first row land in the second, which is read
    # or written already: moved, but no stray.
    lines = findings(apart(torch.randn(2, 48)), bug)
    assert "double/double sm_90 2x48: 16 active lanes outside every tensor" in lines
    assert any("moved/ideal 1.167, at most 1.05" in line for line in lines)


@interpreted
def test_meter_finds_what_is_read_twice():
    lines = findings(apart(torch.randn(2, 48)), "read twice")
    assert lines == ["double/double sm_90 2x48: moved/ideal 1.500, at most 1.05"]


@interpreted
def test_meter_knows_what_lies_between_the_rows_of_a_view():
    fused = apart(torch.randn(2, 96))
    with metered() as counted:
        double(fused[:, :48], "no mask on load")
    assert counted.strays == 2 * 16  # neighbours in memory, but not elements of the view


@interpreted
def test_meter_counts_whole_sectors():
    x = apart(torch.randn(2, 49))[:, 1:]  # rows of 192 bytes that begin 4 and 200 bytes in
    with metered() as counted:
        double(x)
    assert counted.launches[0].sectors == {"load": 7 + 7, "store": 12}


FIGURES = Figures(
    registers=128,
    spills=0,
    shared=65536,
    blocks=2,
    mma="HMMA.16816.F32.BF16",
    loads={"LDGSTS.128": 24, "LDG.32": 1},
    stores={"STG.128": 4},
)
KEY = "dual_product sm_80 bf16"


def row(products=("dual_product",), narrow=(), spilling=(), dtype="bf16", **changes) -> budgets.Row:
    excused = {k: dict.fromkeys(v, "why") for k, v in (("narrow", narrow), ("spilling", spilling))}
    case = SimpleNamespace(products=frozenset(products), **excused)
    kernel = SimpleNamespace(name="dual_product")
    found = SimpleNamespace(case=case, specialisation=kernel, dtype=dtype)
    return budgets.Row(KEY, (found,), (replace(FIGURES, **changes),))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"registers": 168}, "registers 128 -> 168 (budget 128)"),
        ({"shared": 98304}, "shared 65536 -> 98304 (budget 65536)"),
        ({"blocks": 1}, "blocks 2 -> 1 (budget 2)"),
        ({"mma": ""}, "mma HMMA.16816.F32.BF16 -> none (budget HMMA.16816.F32.BF16)"),
        ({"loads": {"LDG.128": 24}}, "load LDGSTS.128 -> LDG.128 (budget LDGSTS.128)"),
        ({"loads": {"LDG.16": 24}}, "load LDGSTS.128 -> LDG.16 (budget LDGSTS.128)"),
    ],
)
def test_a_broken_budget_says_what_moved(changes, line):
    worse, better = budgets.compare([row(**changes)], {KEY: row().budget})
    assert worse == [f"{KEY}: {line}"]
    assert not better


def test_better_than_budget_passes_with_a_hint():
    worse, better = budgets.compare([row(registers=96)], {KEY: row().budget})
    assert not worse
    assert better == [f"{KEY}: registers 128 -> 96 (budget 128)"]


def test_kernels_and_budgets_have_to_match():
    assert budgets.compare([row()], {}) == ([f"{KEY}: has no budget"], [])
    gone = [f"{KEY}: has a budget, but no kernel"]
    assert budgets.compare([], {KEY: row().budget}) == (gone, [])


def test_a_row_is_judged_by_its_worst_binary():
    one = row()
    both = replace(one, figures=(FIGURES, replace(FIGURES, registers=90, blocks=1, loads={})))
    assert both.budget == {**one.budget, "blocks": 1, "load": ""}


def test_loads_are_ordered_by_bits_then_by_whether_threads_wait():
    names = ["LDG.128", "LDGSTS.64", "UTMALDG.2D", "", "LDGSTS.128", "load.64", "LDG.16"]
    widest_last = ["", "LDG.16", "load.64", "LDGSTS.64", "LDG.128", "LDGSTS.128", "UTMALDG.2D"]
    assert sorted(names, key=load_rank) == widest_last


def test_every_kernel_is_audited():
    sources = "".join(file.read_text() for file in (ROOT / "kernels").glob("*.py"))
    kernels = set(re.findall(r"^def _(\w+)_kernel\(", sources, re.MULTILINE))
    keys = [key.split()[0] for key in budgets.read(FOLDER / "triton-3.9.json")]
    assert (
        kernels == set(FORMULAS) == {re.split("[/:@]", key)[-1] for key in keys if ":" not in key}
    )


def test_rules_that_need_no_budget():
    assert budgets.absolute([row()]) == []
    assert budgets.absolute([row(spills=40)]) == [f"{KEY}: spills 40 bytes, expected none"]
    assert budgets.absolute([row(mma="")]) == [f"{KEY}: no tensor-core opcode"]
    assert budgets.absolute([row(products=(), mma="")]) == []
    narrow = {"loads": {"LDG.64": 4}}
    assert budgets.absolute([row(**narrow)]) == [f"{KEY}: widest load is LDG.64, expected 128 bits"]
    assert budgets.absolute([row(narrow=("dual_product",), **narrow)]) == []
    assert budgets.absolute([row(spilling=("dual_product",), spills=40)]) == []
    # Products in fp32 are exact, and an excuse of one dtype is no other's.
    assert budgets.absolute([row(dtype="fp32", mma="")]) == []
    assert budgets.absolute([row(dtype="fp32", narrow=("dual_product fp32",), **narrow)]) == []
    assert len(budgets.absolute([row(narrow=("dual_product fp32",), **narrow)])) == 1


def test_every_excuse_is_needed():
    written = budgets.read(FOLDER / "triton-3.9.json")
    for case in CASES + VARIANTS:
        for excused, bad in (
            (case.spilling, lambda budget: budget["spills"] > 0),
            (case.narrow, lambda budget: load_bits(budget["load"]) < 128),
        ):
            for name in excused:
                kernel, _, dtype = name.partition(" ")
                mine = [
                    budget
                    for key, budget in written.items()
                    if key.startswith(f"{case.name}/{kernel} ") and key.endswith(dtype)
                ]
                assert any(map(bad, mine)), f"{case.name}: {name}"


def test_budgets_survive_their_file(tmp_path):
    file = tmp_path / "budgets.json"
    budgets.write(file, [row()])
    assert budgets.read(file) == {KEY: row().budget}
    assert budgets.path("3.9.1").name == "triton-3.9.json"


def test_another_triton_has_no_budgets_until_they_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(budgets, "FOLDER", tmp_path)
    assert hold([row()], update=False) == []
    assert "no budgets for Triton" in capsys.readouterr().out
    assert hold([row()], update=True) == []
    assert hold([row()], update=False) == []
    worse = f"{KEY}: registers 128 -> 168 (budget 128)"
    assert hold([row(registers=168)], update=False) == [worse]
    assert hold([row(registers=96)], update=False) == []
    assert "128 -> 96 (budget 128); keep it with --update" in capsys.readouterr().out


def test_rules_of_the_cuda_gathers():
    good = {"kernel": "gather_rows<16>", "arch": "sm_80", "spill_bytes": 0, "stack": 0}
    good |= {"wide_loads": 4, "wide_stores": 4}
    unaligned = good | {"kernel": "gather_rows<2>", "wide_loads": 0, "wide_stores": 0}
    assert cuda.findings([good, unaligned]) == []
    assert cuda.findings([good | {"spill_bytes": 8}, good | {"wide_loads": 0}]) == [
        "gather_rows<16> sm_80: spills 8 bytes, expected none",
        "gather_rows<16> sm_80: no 128-bit loads or no 128-bit stores",
    ]


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "blocks"),
    [
        ("sm_80", 8, 255, 96 << 10, 1),
        ("sm_80", 8, 128, 64 << 10, 2),
        ("sm_90", 8, 127, 96 << 10, 2),  # 196 of 228 KB, 1 KB of each block the driver's
        ("sm_80", 8, 32, 82 << 10, 1),
        ("sm_80", 16, 44, 0, 2),
        ("sm_90", 16, 36, 0, 3),
        ("sm_90", 4, 54, 64, 9),
        ("sm_90", 4, 32, 0, 16),
        ("sm_90", 1, 16, 0, 32),
        ("gfx942", 4, 154, 32 << 10, 2),
        ("gfx942", 4, 128, 0, 4),  # 4 of 8 wavefronts a SIMD
        ("gfx942", 4, 136, 0, 3),
        ("gfx90a", 1, 94, 0, 20),
        ("gfx90a", 4, 40, 33 << 10, 1),
    ],
)
def test_blocks_per_multiprocessor(arch, warps, registers, shared, blocks):
    assert blocks_per_multiprocessor(arch, warps, registers, shared) == blocks


def test_tensor_memory_limits_blocks():
    fit = blocks_per_multiprocessor("sm_100", 4, 64, 1024, tensor_columns=256)
    assert fit == 2


def test_predicted_bound():
    h100 = next(card for card in CARDS if card.name == "H100")
    decode = predicted_bound(h100, 3 * 4096 * 14336 * 2, 6 * 4096 * 14336)
    assert decode.binds == "bytes"
    assert decode.seconds == pytest.approx(105e-6, rel=0.01)
    prefill = predicted_bound(h100, 3 * 4096 * 14336 * 2, 6 * 2048 * 4096 * 14336)
    assert prefill.binds == "FLOPs"
    assert prefill.seconds == pytest.approx(729e-6, rel=0.01)


# Asks Triton's own launch path what it would compile, with a driver that only names the target.
ASK_TRITON = """
import json, sys
import torch, triton
from triton.runtime.driver import driver
from bench.audit.specialise import specialise, target_of
from prunekit_kernels.gated_act_stats import gated_act_stats_triton
from prunekit_kernels.launch import recorded

class Driver:
    def get_current_target(self): return target_of(arch)
    def get_current_device(self): return arch
    def get_current_stream(self, device): return 0

def remember(*, compile, **_):
    wanted.append(compile)
    return True  # as if it were compiled

driver.set_active(Driver())
triton.knobs.runtime.jit_cache_hook = remember
for arch in ("sm_80", "gfx942"):
    for width, tokens in ((64, 48), (37, 48), (1, 1)):
        with recorded(arch) as launches:
            gate = torch.empty(tokens, 2 * width, dtype=torch.bfloat16, device="meta")[:, :width]
            gated_act_stats_triton(gate, None if width == 37 else gate, torch.tensor([[0, 1]]), 0)
        for launch in launches:
            wanted = []
            real = {
                k: torch.empty_strided(v.shape, v.stride(), dtype=v.dtype)
                if isinstance(v, torch.Tensor) else v for k, v in launch.arguments.items()
            }
            launch.kernel[launch.grid](**real, **launch.options)
            (theirs,) = wanted
            ours = specialise(launch, arch)
            differ = [
                name for name, mine, triton_s in (
                    ("signature", ours.source.signature, theirs["signature"]),
                    ("constants", ours.source.constants, theirs["constants"]),
                    ("attributes", ours.source.attrs, theirs["configs"][0]),
                    *((k, ours.options[k], theirs[k]) for k in
                      ("num_warps", "num_stages", "num_ctas", "enable_fp_fusion")),
                ) if mine != triton_s
            ]
            signature = {str(k): v for k, v in ours.source.signature.items()}
            print(json.dumps({"differ": differ, "width": width, "signature": signature,
                              "name": ours.name}))
"""


def in_compiling_process(*command: str) -> subprocess.CompletedProcess:
    """Run Python where Triton compiles: in this process it interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True
    )


def test_specialisation_is_tritons_own():
    run = in_compiling_process("-c", ASK_TRITON)
    assert run.returncode == 0, run.stderr
    answers = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(answers) == 2 * 3 * 2
    assert not [answer for answer in answers if answer["differ"]]
    first = [a["signature"] for a in answers if a["name"] == "gated_act_stats"]
    # Width 1 is a constant, as is up where there is none; a count of tokens never is.
    assert [s["width"] for s in first] == ["i32", "i32", "constexpr"] * 2
    assert [s["up"] for s in first] == ["*bf16", "constexpr", "*bf16"] * 2
    assert {s["tokens"] for s in first} == {"i32"}


def test_the_audit_passes():
    run = in_compiling_process("-m", "bench.audit")
    failed = [line for line in run.stdout.splitlines() if line.startswith("FAILED")]
    assert run.returncode == 0, "\n".join(failed) or run.stderr
    assert "predicted bound" in run.stdout
