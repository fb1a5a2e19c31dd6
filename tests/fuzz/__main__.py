"""The coverage-guided fuzzer: python -m tests.fuzz READER [--minutes M]; needs atheris.

Inputs that ended in anything but a reading or a refusal, took longer than 10 seconds or more than
2 GB are written to tests/fuzz/found/READER, where the tests run them from then on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["prunekit"]):
    from tests.fuzz.readers import FRAMED, READERS, header_of, with_header

FOUND = Path(__file__).parent / "found"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("reader", choices=READERS)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--header", action="store_true", help="only prunekit's own header's text")
    options = parser.parse_args()
    if options.header and options.reader not in FRAMED:
        parser.error(f"--header: got {options.reader}; expected one of {', '.join(FRAMED)}")
    reader = READERS[options.reader]
    seed = reader.seed()
    found = FOUND / options.reader
    found.mkdir(parents=True, exist_ok=True)

    def once(data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        reader(with_header(seed, text) if options.header else data)

    with tempfile.TemporaryDirectory() as corpus:
        first = json.dumps(header_of(seed)).encode() if options.header else seed
        (Path(corpus) / "seed").write_bytes(first)
        limits = [f"-max_total_time={60 * options.minutes:.0f}", "-timeout=10"]
        limits += ["-rss_limit_mb=2048", f"-max_len={max(4096, 2 * len(first))}"]
        atheris.Setup(
            [sys.argv[0], *limits, "-print_final_stats=1", f"-artifact_prefix={found}/", corpus],
            once,
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main()
