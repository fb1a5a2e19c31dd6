"""The CUDA gather kernels' bodies, run on the CPU over every block and thread.

gather_driver.cpp calls the functions that the kernels consist of, block by block and thread by
thread in random order, and watches each access.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KINDS = ("rows", "columns", "rows_in_place", "columns_in_place", "mlp")

# What is wrong in the job that the kernel gets, and what the driver must see of it.
BUGS = [
    ("rows", "count", "outside of the matrix"),
    ("rows", "width", "outside of the matrix"),
    ("rows", "stride", "outside of the matrix"),
    ("rows", "lanes", "a byte written twice"),
    ("rows", "blocks", "a byte not written"),
    ("rows", "base", "outside of the matrix"),
    ("rows", "word", "not aligned"),
    ("rows", "ends", "a byte not written"),
    ("columns", "count", "outside of the matrix"),
    ("columns", "width", "outside of the matrix"),
    ("columns", "stride", "a wrong value"),
    ("columns", "rows", "outside of the matrix"),
    ("columns", "blocks", "a byte not written"),
    ("columns", "vectors", "not aligned"),
    ("rows_in_place", "order", "a read of what was overwritten"),
    ("rows_in_place", "width", "two blocks touch one byte"),
    ("rows_in_place", "blocks", "a byte not written"),
    ("rows_in_place", "base", "two blocks touch one byte"),
    ("rows_in_place", "word", "not aligned"),
    ("rows_in_place", "strip", "a byte not written"),
    ("rows_in_place", "lead", "a byte not written"),
    ("columns_in_place", "order", "a wrong value"),
    ("columns_in_place", "width", "outside of the matrix"),
    ("columns_in_place", "tiles", "two blocks touch one byte"),
    ("mlp", "down", "a byte not written"),
    ("mlp", "gate", "a byte not written"),
    ("mlp", "up", "outside of the matrix"),
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    program = tmp_path_factory.mktemp("gather") / "driver"
    checks = ["-fsanitize=bounds,alignment", "-fsanitize-undefined-trap-on-error"]
    source = HERE / "gather_driver.cpp"
    command = [compiler, "-std=c++17", "-O2", "-Wall", "-Werror", *checks, "-o", program, source]
    subprocess.run(command, check=True)

    def run(*arguments):
        return subprocess.run([program, *arguments], capture_output=True, text=True)

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_each_element_once_and_nothing_else(driver, kind):
    result = driver(kind)
    assert result.returncode == 0, result.stdout
    assert result.stdout == "800 cases, 0 kinds of problem\n"


@pytest.mark.parametrize(("kind", "bug", "seen"), BUGS)
def test_a_wrong_job_is_noticed(driver, kind, bug, seen):
    result = driver(kind, bug, seen)
    assert result.returncode == 1
    assert seen in result.stdout


@pytest.mark.parametrize("kind", KINDS[:4])
def test_bytes_moved(driver, kind):
    moved, index = map(float, driver(kind, "traffic").stdout.split())
    assert moved <= 1.01  # of what cannot be avoided
    assert index <= 0.25  # asked of the caches again and again, of memory once


# At least as many bytes a load and a store, where rows of 2-byte elements are of odd length. In
# place a block owns 112 bytes of a row, whose ends lie within vectors.
@pytest.mark.parametrize(
    ("kind", "loaded", "stored"), [("rows", 15.5, 15.5), ("rows_in_place", 7, 8)]
)
def test_unaligned_rows_move_in_vectors(driver, kind, loaded, stored):
    widths = driver(kind, "width of accesses").stdout.split()
    assert float(widths[0]) >= loaded
    assert float(widths[1]) >= stored
