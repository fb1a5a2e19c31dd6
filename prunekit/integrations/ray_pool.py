"""Workers on a Ray cluster that share out calls, and are replaced where they die."""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from prunekit.errors import InputError

TRIES = 3  # of one call, where its worker dies
LOCAL = "local"


class _Worker:
    """What lives in a process of the cluster: an object, made there at its first call."""

    def __init__(self, make: Callable[[], Any], folder: str):
        self._make, self._folder, self._made = make, folder, None

    def call(self, name: str, given: Sequence[Any]) -> Any:
        if self._made is None:
            try:
                os.chdir(self._folder)
            except OSError as error:
                raise InputError(
                    f"--ray: {os.uname().nodename} has no folder {self._folder} "
                    f"({error.strerror}); the machines of a cluster must share the file system"
                ) from None
            self._made = self._make()
        return getattr(self._made, name)(*given)


class RayPool:
    """Workers in processes of a Ray cluster, each with an object of its own.

    Args:
        make: makes the object, in the worker; what it needs is pickled.
        address: of the cluster, ``auto`` for the one that this machine belongs to, or ``local``
            for processes on this machine, which end with this one.
        workers: how many; 0 for one a GPU, or, where there are none, one a machine. They divide
            the CPUs among them, and each has a GPU where there are GPUs.

    Raises:
        InputError: Ray is not installed, no cluster answers, or it is too small.
    """

    def __init__(self, make: Callable[[], Any], address: str, workers: int = 0):
        self._ray, self._ours = _connected(address)
        have = self._ray.cluster_resources()
        cpus, gpus = int(have.get("CPU", 0)), int(have.get("GPU", 0))
        count = workers or gpus or sum(node["Alive"] for node in self._ray.nodes())
        most, of = (gpus, "GPUs") if gpus else (cpus, "CPUs")
        if count > most:
            self.__exit__()
            raise InputError(f"--workers: got {count}; the cluster has {most} {of}")
        share = {"num_cpus": max(1, cpus // count), "num_gpus": 1 if gpus else 0}
        remote = self._ray.remote(_Worker).options(**share)
        self._start = lambda: remote.remote(make, os.getcwd())
        self._idle = [self._start() for _ in range(count)]

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._idle = []  # a worker to which nothing refers ends
        if self._ours:
            self._ray.shutdown()

    def one(self, call: str, *given: Any) -> Any:
        """Call a method of one worker's object, and return what it returns."""
        ((_, found),) = self.each(call, [[given]])
        return found

    def each(self, call: str, groups: Sequence[Sequence[tuple]]) -> Iterator[tuple[tuple, Any]]:
        """Call a method with every tuple of arguments; the calls of a group one worker has.

        Yields:
            (arguments, result), as they come.

        Raises:
            InputError: a call's worker died `TRIES` times. What a call raises is raised.
        """
        waiting, running = deque(map(deque, groups)), {}

        def begin(worker: Any, group: deque[tuple], deaths: int = 0) -> None:
            running[worker.call.remote(call, group[0])] = worker, group, deaths

        while waiting or running:
            while waiting and self._idle:
                begin(self._idle.pop(), waiting.popleft())
            (done,), _ = self._ray.wait(list(running), num_returns=1)
            worker, group, deaths = running.pop(done)
            try:
                found = self._ray.get(done)
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except self._ray.exceptions.RayError as error:
                if deaths + 1 == TRIES:
                    raise InputError(
                        f"--ray: {TRIES} workers died of the same call: {_line(error)}; "
                        "--resume tries it again"
                    ) from None
                begin(self._start(), group, deaths + 1)
                continue
            yield group.popleft(), found
            if group:
                begin(worker, group)
            else:
                self._idle.append(worker)


def _connected(address: str) -> tuple[Any, bool]:
    """Ray, connected to a cluster or with one of its own; and whether that was done here."""
    try:
        import ray
    except ImportError:
        raise InputError("--ray: needs Ray; pip install 'prunekit[ray]'") from None
    if ray.is_initialized():
        return ray, False
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == LOCAL:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
        os.environ.setdefault("RAY_worker_niceness", "0")  # they are the work, not beside it
        ray.init(address=LOCAL, include_dashboard=False, **quiet)
        return ray, True
    try:
        _knock(address)
        ray.init(address=address, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"--ray: no cluster at {address}: {_line(error)}") from None
    return ray, True


def _knock(address: str) -> None:
    """Raise OSError where nobody listens at HOST:PORT: Ray would go on trying for minutes."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if port.isdecimal():
        socket.create_connection((host, int(port)), timeout=5).close()


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
