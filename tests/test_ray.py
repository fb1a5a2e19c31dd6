"""A sweep over a Ray cluster gives the table of one process, whatever is killed on the way."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from prunekit.cli import main
from prunekit.experiment.ledger import NAME, read_rows
from prunekit.experiment.protocol import protocol_of
from prunekit.experiment.sweep import sweep
from tests.sweeps import bare, tiny_protocol

pytest.importorskip("ray")
WORKERS = ("--ray", "local", "--workers", "2")


@pytest.fixture
def given(folder, tmp_path):
    return tiny_protocol(folder, tmp_path)


@pytest.fixture
def job(given, tmp_path):
    (tmp_path / "p.yaml").write_text(json.dumps(given))  # JSON is YAML
    return [
        *(sys.executable, "-m", "prunekit", "sweep", str(tmp_path / "p.yaml"), "--quiet"),
        *(*WORKERS, "--out", str(tmp_path / "run")),
    ]


def table(given, tmp_path):
    return bare(sweep(protocol_of(given), tmp_path / "whole", quiet=True))


def workers_of(process):
    """The processes that run cells."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if child.cmdline()[:1] and child.cmdline()[0].startswith("ray::_Worker"):
                found.append(child)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def begun(job, out):
    """A sweep into a folder, whose workers have begun."""
    process = subprocess.Popen([*job[:-1], str(out)], stdout=subprocess.DEVNULL)
    while process.poll() is None and not workers_of(process):
        time.sleep(0.05)
    return process


@pytest.fixture
def span(job, tmp_path):
    """Seconds from then to its end."""
    process, since = begun(job, tmp_path / "timed"), time.monotonic()
    assert process.wait() == 0
    return time.monotonic() - since


def under_way(job, out, wait):
    """A sweep into a folder, so many seconds after its workers have begun; it may be through."""
    process = begun(job, out)
    time.sleep(wait)
    return process


def test_workers_give_the_table_of_one_process(given, job, tmp_path):
    made = subprocess.run(job, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert made.stderr == ""
    rows = bare(read_rows(tmp_path / "run" / NAME))
    assert sorted(rows, key=str) == sorted(table(given, tmp_path), key=str)
    assert not (tmp_path / "run" / "partial").exists()
    scores = [json.loads((tmp_path / run / "scores.json").read_text()) for run in ("run", "whole")]
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_what_cannot_be_is_one_line(given, job, tmp_path, capsys):
    assert main([*job[3:-6], "--workers", "2"]) == 2
    assert capsys.readouterr().err.endswith("expected 1 or more, and --ray with it\n")
    most = f"prunekit sweep: --workers: got 9999; the cluster has {os.cpu_count()} CPUs\n"
    assert subprocess.run([*job, "--workers", "9999"], capture_output=True).stderr == most.encode()
    nowhere = subprocess.run([*job, "--ray", "127.0.0.1:1"], capture_output=True, text=True)
    assert nowhere.returncode == 2
    assert nowhere.stderr.startswith("prunekit sweep: --ray: no cluster at 127.0.0.1:1: ")
    assert nowhere.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_worker_killed_at_any_moment_loses_only_its_cell(given, job, tmp_path, span):
    """Ten sweeps, in each of which a worker is killed, at the beginning, in a cell or between."""
    want, draw = table(given, tmp_path), random.Random(3)
    killed = 0
    for trial in range(10):
        out = tmp_path / f"run{trial}"
        process = under_way(job, out, draw.uniform(0, 0.8 * span))
        if process.poll() is None and (workers := workers_of(process)):
            draw.choice(workers).send_signal(signal.SIGKILL)
            killed += 1
        assert process.wait() == 0
        assert sorted(bare(read_rows(out / NAME)), key=str) == sorted(want, key=str)
    assert killed >= 7


@pytest.mark.slow
def test_the_main_process_killed_takes_its_workers_along_and_can_be_resumed(
    given, job, tmp_path, span
):
    """Ten sweeps, each killed at some moment; what was done is kept, the rest done by resuming."""
    want, draw = table(given, tmp_path), random.Random(4)
    killed, agents = 0, []
    for trial in range(10):
        out = tmp_path / f"run{trial}"
        process = under_way(job, out, draw.uniform(0, 0.8 * span))
        if process.poll() is None:
            workers = workers_of(process)
            agents += psutil.Process(process.pid).children(recursive=True)
            process.kill()
            killed += 1
            assert psutil.wait_procs(workers, timeout=60)[1] == []
        process.wait()
        done = read_rows(out / NAME)
        rows = sweep(protocol_of(given), out, resume=True, quiet=True)
        assert bare(rows) == want
        assert read_rows(out / NAME)[: len(done)] == done
    assert killed >= 7
    # Ray's agents look for their cluster for its gcs_rpc_server_reconnect_timeout_s, a minute.
    assert psutil.wait_procs(agents, timeout=150)[1] == []
