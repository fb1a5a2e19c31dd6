"""The course of a long work over batches: where it may stop, so that it can be gone on with."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TypeVar

Item = TypeVar("Item")

KEEP_S = 300.0  # between two keepings of what was done, for who is killed without a word
KEEP_SHARE = 0.05  # of the time may go to keeping, however large what is kept


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM came, and what was done by then is kept.

    Attributes:
        signal: the signal's number.
    """

    def __init__(self, number: int, said: str):
        super().__init__(f"{signal.Signals(number).name}: {said}")
        self.signal = number


@contextmanager
def signals_noted() -> Iterator[list[int]]:
    """Inside, the first Ctrl-C or SIGTERM is only noted; a second one acts as ever.

    Yields:
        The signals that came: empty so far. Outside the main thread it stays so, since none comes
        there.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: object) -> None:
        came.append(number)
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Course:
    """Goes over batches from where another ended, and keeps what was done when it must end.

    Args:
        done: batches that are through already.
        keep: told how many batches are through, writes down what they gave; asked every five
            minutes, and less often where that took long. None: nothing is kept, and signals act as
            ever.
    """

    def __init__(self, done: int = 0, keep: Callable[[int], None] | None = None):
        self.done = done
        self._keep = keep

    def over(self, batches: Sequence[Item]) -> Iterator[Item]:
        """The batches that are left, in turn; `done` counts those that the loop is through with.

        Raises:
            Stopped: Ctrl-C or SIGTERM came during the last one, and what was done is kept.
        """
        with nullcontext([]) if self._keep is None else signals_noted() as came:
            due = math.inf if self._keep is None else time.monotonic() + KEEP_S
            for batch in batches[self.done :]:
                yield batch
                self.done += 1
                if not came and time.monotonic() < due:
                    continue
                begun = time.monotonic()
                self._keep(self.done)
                if came:
                    said = f"{self.done} of {len(batches)} batches were done and are kept"
                    raise Stopped(came[0], said)
                ended = time.monotonic()
                due = ended + max(KEEP_S, (ended - begun) / KEEP_SHARE)
