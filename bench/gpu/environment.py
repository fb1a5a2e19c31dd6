"""Where figures come from: the card and its driver, clocks and power, versions, revision."""

from __future__ import annotations

import shlex
import subprocess
from typing import Any

import torch

from prunekit.measure.provenance import provenance

_FIELDS = (
    "uuid",
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)


def parse_smi(table: str, uuid: str) -> dict[str, str]:
    """Return a card's row of nvidia-smi's table, which has one line a card and `_FIELDS` in it.

    Args:
        table: as `nvidia-smi --query-gpu=... --format=csv,noheader` prints it.
        uuid: the card's, with or without the leading "GPU-"; the only card needs none.
    """
    rows = [[cell.strip() for cell in line.split(",")] for line in table.splitlines() if line]
    rows = [row for row in rows if len(row) == len(_FIELDS)]
    found = [row for row in rows if uuid and uuid in row[0]] or (rows if len(rows) == 1 else [])
    return dict(zip(_FIELDS[1:], found[0][1:], strict=True)) if found else {}


def card_state(device: torch.device) -> dict[str, str]:
    """Return driver, clocks, power and temperature as nvidia-smi tells them; {} without it."""
    if device.type != "cuda":
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    return parse_smi(run.stdout, uuid)


def _card(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {}
    card = torch.cuda.get_device_properties(device)
    return {
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "multiprocessors": card.multi_processor_count,
        "memory_bytes": card.total_memory,
        "l2_bytes": card.L2_cache_size,
    }


def environment(
    device: torch.device, arguments: list[str], revision: str | None, *, module: str = "bench.gpu"
) -> dict[str, Any]:
    """Return what belongs beside every figure.

    Args:
        device: what the run is on.
        arguments: of `python -m MODULE`.
        revision: of the sources, where they are no git tree, or one of another state.
    """
    facts = provenance(
        device_type=device.type,
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        command=shlex.join(["python", "-m", module, *arguments]),
        **_card(device),
    )
    if revision is not None or "revision" not in facts:
        facts |= {"revision": revision, "dirty": None}
    return facts | {"card": card_state(device)}
