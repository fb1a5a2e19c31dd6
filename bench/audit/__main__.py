"""`python -m bench.audit`; see the package."""

import os
import sys


def main() -> int:
    # Triton decides at import whether it compiles or interprets.
    os.environ.pop("TRITON_INTERPRET", None)
    from bench.audit.run import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
