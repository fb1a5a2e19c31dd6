"""Runs cases of `bench.cases` under one revision of prunekit, when it is told to.

Reads a line of JSON a request from standard input, {"case": NAME}, and answers with one on standard
output: {"seconds": S}, or {"error": WHY}. The first line that it writes names the cases.
"""

from __future__ import annotations

import json
import sys
import time


def main(suites: list[str]) -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # what anything else prints is no answer
    from bench.cases import SUITES

    cases, errors = {}, {}
    for name in suites:
        try:
            cases |= SUITES[name]()
        except Exception as error:  # of another revision: said, and its cases left out
            errors[name] = f"{type(error).__name__}: {error}"
    print(json.dumps({"cases": list(cases), "errors": errors}), file=answers, flush=True)
    for line in sys.stdin:
        case = cases[json.loads(line)["case"]]
        try:
            begun = time.perf_counter()
            case()
            answer = {"seconds": time.perf_counter() - begun}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
