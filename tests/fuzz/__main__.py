"""The coverage-guided fuzzer: python -m tests.fuzz [READER] [--minutes M]; needs atheris.

Without a READER all of them have their turn, those with a header in JSON once more with that alone.
Inputs that ended in anything but a reading or a refusal, took longer than 10 seconds or more than
2 GB are written to tests/fuzz/found/READER, where the tests run them from then on.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.fuzz import FRAMED, KINDS

FOUND = Path(__file__).parent / "found"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("reader", nargs="?", choices=KINDS)
    parser.add_argument("--minutes", type=float, default=10.0, help="of each")
    parser.add_argument(
        "--jobs", type=int, default=1, help="readers at once, where all have a turn"
    )
    parser.add_argument("--header", action="store_true", help="only prunekit's own header's text")
    options = parser.parse_args()
    if options.header and options.reader not in FRAMED:
        parser.error(f"--header: got {options.reader}; expected one of {', '.join(FRAMED)}")
    if options.reader is None:
        sys.exit(everyone(options.minutes, options.jobs))
    fuzz(options.reader, options.header, options.minutes)


def fuzz(name: str, only_header: bool, minutes: float) -> None:
    """Feed a reader until time is up; does not return."""
    import atheris

    with atheris.instrument_imports(include=["prunekit"]):
        from tests.fuzz.readers import READERS, header_of, with_header
    reader = READERS[name]
    seed = reader.seed()
    found = FOUND / name
    found.mkdir(parents=True, exist_ok=True)

    def once(data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        reader(with_header(seed, text) if only_header else data)

    with tempfile.TemporaryDirectory() as corpus:
        first = json.dumps(header_of(seed)).encode() if only_header else seed
        (Path(corpus) / "seed").write_bytes(first)
        limits = [f"-max_total_time={60 * minutes:.0f}", "-timeout=10"]
        limits += ["-rss_limit_mb=2048", f"-max_len={max(4096, 2 * len(first))}"]
        atheris.Setup(
            [sys.argv[0], *limits, "-print_final_stats=1", f"-artifact_prefix={found}/", corpus],
            once,
        )
        atheris.Fuzz()


def everyone(minutes: float, jobs: int) -> int:
    """Run a process a reader; print how often each read, and return 1 where one found something."""

    def run(given: tuple[str, ...]) -> int:
        command = [sys.executable, "-m", "tests.fuzz", *given, "--minutes", str(minutes)]
        done = subprocess.run(command, capture_output=True, text=True)
        executed = re.search(r"number_of_executed_units:\s*(\d+)", done.stderr)
        if done.returncode or executed is None:
            print(f"{' '.join(given)}: FAILED\n{done.stderr[-3000:]}", flush=True)
            return 1
        said = f"{int(executed[1]):,} executions in {minutes:g} minutes"
        print(f"{' '.join(given)}: {said}", flush=True)
        return 0

    turns = [(name,) for name in KINDS] + [(name, "--header") for name in FRAMED]
    with ThreadPoolExecutor(jobs) as pool:
        return max(pool.map(run, turns))


if __name__ == "__main__":
    main()
