"""The file of a run's results, whole after every single one of them."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prunekit.files import read_json, write_json

SCHEMA = 1
MEASURED, TUNED, REHEARSED = "gpu", "gpu tuning", "rehearsal on a CPU"


class WrongError(AssertionError):
    """A result is further from the exact one than twice torch's own."""


def safe_name(device: str) -> str:
    """Return a device's name as a file's: letters, digits and hyphens."""
    return re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-")


class Results:
    """Entries by id, each written to the file before the next one is begun.

    A run that was cut short is taken up again over the same file: what it has is not done anew.

    Args:
        path: the file.
        header: what describes the run; a file of another schema or kind is not taken up.
        resume: take up the file if it is there.
    """

    def __init__(self, path: Path, header: dict[str, Any], *, resume: bool):
        self.path = path
        self.value = {"schema": SCHEMA, **header, "finished": False, "running": None, "entries": {}}
        if resume and path.is_file():
            self.value = read_json(path)
        self._write()

    def _write(self) -> None:
        write_json(self.path, self.value)

    def __contains__(self, name: str) -> bool:
        return name in self.value["entries"]

    def update(self, **facts: Any) -> None:
        """Add facts to the header."""
        self.value.update(facts)
        self._write()

    def record(self, name: str, entry: Callable[[], dict[str, Any]], **facts: Any) -> None:
        """Write down what ``entry()`` returns, or how it failed.

        The file names what is running, so that whoever finds the process gone knows what killed it.
        """
        self.value["running"] = {"name": name, **facts}
        self._write()
        begun = time.perf_counter()
        try:
            found = entry()
        except Exception as error:  # whatever it is, the other entries are still worth having
            lines = traceback.format_exception_only(error)
            found = {"error": "".join(lines).strip()[:2000]}
            traceback.print_exc()
        self.value["entries"][name] = {**facts, **found, "took_s": time.perf_counter() - begun}
        self.value["running"] = None
        self._write()

    def forget(self, name: str) -> None:
        """Let an entry be made anew."""
        self.value["entries"].pop(name, None)

    def touch(self) -> None:
        """Show that the run is alive, while an entry takes long."""
        self.path.touch()

    @property
    def failed(self) -> list[str]:
        """The ids of the entries that have an error."""
        return [name for name, entry in self.value["entries"].items() if "error" in entry]


def bury(path: Path, why: str) -> bool:
    """Write down as failed what was running when a process ended; return whether something was."""
    value = read_json(path)
    facts = value["running"]
    if facts is None:
        return False
    name = facts.pop("name")
    value["entries"][name] = {**facts, "error": why}
    value["running"] = None
    write_json(path, value)
    return True
