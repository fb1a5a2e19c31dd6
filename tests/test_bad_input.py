"""Every bad input of docs/bad-input.md gives one line, status 2, and what the page says."""

import pytest

from bench.markers import between
from tests.bad_input import CASES, MARKERS, PAGE, folder, own, table, tried


@pytest.fixture(scope="module")
def said():
    """What every command says, and that nothing is left behind that was not there."""
    with folder() as path:
        there = set(path.iterdir())
        found = {command: tried(command) for _, command in CASES}
        assert set(path.iterdir()) == there
        assert (path / "data" / "precious.txt").read_text() == "mine"
        yield found


@pytest.mark.parametrize("command", [pytest.param(c, id=what) for what, c in CASES])
def test_it_is_refused_in_a_line(said, command):
    status, line = said[command]
    assert status == 2, line
    assert line.count("\n") == 1, line
    assert line.startswith("prunekit")
    assert "Traceback" not in line


def test_the_page_says_what_prunekit_says(said):
    """Word for word, but for what other libraries say: that is theirs to change."""
    page = PAGE.read_text()
    assert len({command for _, command in CASES}) == len(CASES) >= 40
    rows = page.splitlines()
    want = between(page, MARKERS, table({c: line for c, (_, line) in said.items()})).splitlines()
    assert [own(row) for row in rows] == [own(row) for row in want]
