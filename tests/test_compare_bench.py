"""Two revisions side by side: what a worker answers, and what is made of it."""

import json
import subprocess
import sys
from pathlib import Path

from bench import compare
from bench.cases import SUITES

ROOT = Path(__file__).parents[1]


class Fake:
    """A side whose cases take what it is told."""

    def __init__(self, seconds):
        self.cases, self.seconds, self.asked = list(seconds), seconds, []

    def time(self, case):
        self.asked.append(case)
        return self.seconds[case] * (1 + 0.001 * (len(self.asked) % 3))


def test_both_run_every_shared_case_in_turn():
    base, head = Fake({"a": 1.0, "gone": 1.0}), Fake({"new": 1.0, "a": 2.0})
    taken = compare.race(base, head, rounds=11)
    assert set(taken) == {"a"}
    assert [len(side) for side in taken["a"]] == [11, 11]
    assert base.asked == head.asked == ["a"] * (11 + compare.WARM)


def test_what_is_slower_is_named_and_nothing_else(capsys):
    base = Fake({"same": 1.0, "slower": 1.0, "faster": 1.0})
    head = Fake({"same": 1.0, "slower": 1.1, "faster": 0.5})
    assert compare.report(compare.race(base, head, 25), most=0.05) == 1
    lines = {line.split()[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines()}
    assert (lines["same"], lines["slower"], lines["faster"]) == ("ok", "regressed", "ok")
    assert compare.report(compare.race(base, base, 25), most=0.05) == 0


def test_an_unknown_revision_is_one_line(capsys):
    assert compare.main(["--base", "no-such-revision"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("bench.compare: no-such-revision: fatal: not a valid object name")
    assert said.count("\n") == 1


def test_a_worker_runs_the_cases_of_its_tree(tmp_path):
    side = compare.Side(ROOT, tmp_path / "side", ["operations"])
    try:
        assert side.errors == {}
        assert side.cases == list(SUITES["operations"]())
        assert all(0 < side.time(case) < 60 for case in side.cases)
    finally:
        side.close()


def test_a_case_that_fails_is_an_answer(tmp_path):
    """A worker goes on after an error of another revision's, and says which it was."""
    code = (
        "import sys; import bench.cases as cases\n"
        "def broken(): raise ValueError('not here')\n"
        "cases.SUITES = {'one': lambda: {'bad': broken, 'good': lambda: None}, 'two': broken}\n"
        "from bench.worker import main; main(['one', 'two'])"
    )
    asked = "".join(json.dumps({"case": case}) + "\n" for case in ("bad", "good"))
    run = {"input": asked, "capture_output": True, "text": True, "cwd": ROOT, "check": True}
    done = subprocess.run([sys.executable, "-c", code], **run)
    first, bad, good = map(json.loads, done.stdout.splitlines())
    assert first == {"cases": ["bad", "good"], "errors": {"two": "ValueError: not here"}}
    assert bad == {"error": "ValueError: not here"}
    assert good["seconds"] >= 0
