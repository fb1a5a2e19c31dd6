"""Energy: whose counters are read, and what is made of them."""

import pytest
import torch

from prunekit.measure.energy import Counter, counters_of, joules_of

CPU = torch.device("cpu")


def zone(root, name, kind, joules, most=1000.0):
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{kind}\n")
    (folder / "energy_uj").write_text(f"{int(joules * 1e6)}\n")
    (folder / "max_energy_range_uj").write_text(f"{int(most * 1e6)}\n")
    return folder / "energy_uj"


def test_packages_are_counted_once_and_their_parts_not(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 5)
    zone(tmp_path, "intel-rapl:0:0", "core", 3)
    zone(tmp_path, "intel-rapl:1", "package-1", 7)
    zone(tmp_path, "intel-rapl:2", "psys", 20)
    found = counters_of(CPU, tmp_path)
    assert [(c.name, c.joules(), c.wraps) for c in found] == [
        ("RAPL", 5.0, 1000.0),
        ("RAPL", 7.0, 1000.0),
    ]


def test_without_counters_nothing_is_said(tmp_path):
    assert counters_of(CPU, tmp_path / "missing") == []
    assert joules_of(lambda: None, []) is None


def test_a_counter_that_may_not_be_read_is_none(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 5).write_text("forbidden")
    assert counters_of(CPU, tmp_path) == []


@pytest.mark.parametrize("start", [10.0, 995.0])
def test_joules_a_run_are_a_mean_and_survive_the_counters_end(start):
    """Each run takes 0.25 s and 2 J; the counter begins anew at 1000 J."""
    spent = [0.0, 0.0]

    def run():
        spent[0] += 2.0
        spent[1] += 0.25

    counter = Counter("RAPL", lambda: (start + spent[0]) % 1000, 1000.0)
    assert joules_of(run, [counter, counter], clock=lambda: spent[1]) == pytest.approx(4.0)
    assert spent[1] == 1.0


def test_a_run_longer_than_the_least_is_run_once():
    counts = []
    counter = Counter("NVML", lambda: 3.0 * len(counts))
    ticks = iter([0.0, 5.0, 9.0])
    assert joules_of(lambda: counts.append(1), [counter], clock=lambda: next(ticks)) == 3.0
