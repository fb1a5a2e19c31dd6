"""The sandbox: hostile programs are contained, fail in bounded time, and leave nothing behind."""

import errno
import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from prunekit.errors import InputError
from prunekit.tasks import jail, sandbox
from prunekit.tasks.sandbox import run_program

# What a program does: (source, what its failure says). {victim} is a file outside its folder.
HOSTILE = {
    "endless loop": ("while True: pass", "status -"),
    "endless loop that catches everything": (
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\n"
        "while True:\n try:\n  while True: pass\n except BaseException: pass",
        "status -9",
    ),
    "endless sleep": ("import time\nwhile True: time.sleep(1)", "took too long"),
    "endless read": ("import os\nr, w = os.pipe()\nos.read(r, 1)", "took too long"),
    "fork bomb": ("import os\nwhile True: os.fork()", "PermissionError"),
    "fork bomb that goes on": (
        "import os\nwhile True:\n try: os.fork()\n except OSError: pass",
        "status -",
    ),
    "thread bomb": (
        "import threading, time\n"
        "while True: threading.Thread(target=time.sleep, args=(99,)).start()",
        "RuntimeError|MemoryError",
    ),
    "shell": ("import subprocess\nsubprocess.run('true')", "PermissionError"),
    "another program in its place": (
        "import os\nos.execv('/bin/sh', ['sh', '-c', 'exit 0'])",
        "PermissionError",
    ),
    "10 GB": ("x = bytearray(10 * 2**30)", "MemoryError"),
    "10 GB bit by bit": ("x = []\nwhile True: x.append(bytearray(2**20))", "MemoryError"),
    "deletion": ("import os\nos.remove({victim!r})", "PermissionError"),
    "deletion of a folder": (
        "import os, shutil\nshutil.rmtree(os.path.dirname({victim!r}))",
        "PermissionError",
    ),
    "renaming": ("import os\nos.rename({victim!r}, {victim!r} + '2')", "PermissionError"),
    "truncation": ("import os\nos.truncate({victim!r}, 0)", "PermissionError"),
    "opening to truncate": (
        "import os\nos.open({victim!r}, os.O_RDONLY | os.O_TRUNC)",
        "PermissionError",
    ),
    "overwriting": ("open({victim!r}, 'r+').write('x')", "PermissionError"),
    "changing rights": ("import os\nos.chmod({victim!r}, 0)", "PermissionError"),
    "link": ("import os\nos.link({victim!r}, {victim!r} + '2')", "PermissionError"),
    "huge file": (
        "f = open('big', 'wb')\nwhile True: f.write(bytes(2**20))",
        "PermissionError",
    ),
    "socket": ("import socket\nsocket.socket()", "PermissionError"),
    "connection": (
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:1')",
        "Operation not permitted",
    ),
    "killing its parent": ("import os\nos.kill(os.getppid(), 9)", "PermissionError"),
    "killing everyone": ("import os\nos.kill(-1, 9)", "PermissionError"),
    "raising its limits": (
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "PermissionError|not allowed",
    ),
    "printing without end": ("while True: print('x' * 4096)", "status -"),
    "writing to every descriptor": (
        "import os\nwhile True:\n for fd in range(64):\n"
        "  try: os.write(fd, b'x' * 65536)\n  except OSError: pass",
        "too long|status -",
    ),
    "exit before the end": ("import os\nos._exit(0)", "ended early, with status 0"),
    "polite exit": ("raise SystemExit(0)", "SystemExit: 0"),
    "crash": ("import ctypes\nctypes.string_at(0)", "status -"),
    "recursion": ("def f(): f()\nf()", "RecursionError"),
    "system call by number": (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "assert libc.unlink({victim!r}.encode()) == 0",
        "AssertionError",
    ),
}


def jailed(*parents):
    """Ids of the sandboxed processes of some parents; orphans are init's, whose id is 1."""
    found = psutil.process_iter(["pid", "ppid", "cmdline"])
    return {
        p.info["pid"]
        for p in found
        if p.info["ppid"] in parents and str(sandbox._JAIL) in (p.info["cmdline"] or ())
    }


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / "outside" / "victim"
    path.parent.mkdir()
    path.write_text("alive")
    return path


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_is_contained(name, victim):
    source, reason = HOSTILE[name]
    source = source.replace("{victim!r}", repr(str(victim)))
    sleeps = "too long" in reason  # others are to end by their own doing, or by the processor's
    limits = {
        "cpu_seconds": 1 if "status" in reason else 5,
        "wall_seconds": 1.0 if sleeps else 40.0,
    }
    outcome = run_program(source, **limits)
    assert not outcome.passed
    assert re.search(reason, outcome.reason), outcome.reason
    assert not jailed(os.getpid(), 1)
    assert os.listdir(victim.parent) == ["victim"]
    assert victim.read_text() == "alive"
    assert victim.stat().st_mode & 0o600 == 0o600


@pytest.mark.parametrize(
    "source",
    [
        "import math, re, collections, itertools, typing, random, heapq, functools, datetime",
        "print('ä', open('/proc/self/stat').read())",
        "import threading\nfound = []\nt = threading.Thread(target=found.append, args=(1,))\n"
        "t.start()\nt.join()\nassert found == [1]",
        "import hashlib, json, decimal, fractions, string, bisect, copy, operator, statistics",
        "import time\ntime.sleep(0.01)",
        "x = bytearray(300 * 2**20)",
        "import numpy as np\nassert np.ones((4, 4)).sum() == 16",
        "assert __name__ == '__main__'",
        "import os\nassert os.listdir('.') == []",
        "try: input()\nexcept EOFError: pass",
    ],
)
def test_an_honest_program_passes(source):
    outcome = run_program(source)
    assert outcome.passed, outcome.reason


def test_a_text_that_is_no_program_is_told_apart_from_one_that_fails():
    outcome = run_program("def f(:\n")
    assert (outcome.passed, outcome.parsed) == (False, False)
    assert outcome.reason.startswith("SyntaxError")
    for source in ("assert 1 == 2, 'no'", "eval('1 +')", "raise KeyboardInterrupt"):
        outcome = run_program(source)
        assert (outcome.passed, outcome.parsed) == (False, True)
    for source in ("x = '\0'", "x = '\ud800'", "(" * 10000, "\n" * 10):
        run_program(source)


def test_the_environment_is_not_handed_on_and_sets_have_one_order(monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    source = "import os\nassert 'SECRET' not in os.environ\nassert str(set('abcdef')) == {order!r}"
    code = "print(str(set('abcdef')))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    outcome = run_program(source.replace("{order!r}", repr(done.stdout.strip())))
    assert outcome.passed, outcome.reason


def patiently(found):
    """Wait until there is something, or for 60 s that this process was awake."""
    for _ in range(600):
        if result := found():
            return result
        time.sleep(0.1)
    return None


def test_a_program_dies_with_who_runs_it():
    code = (
        "from prunekit.tasks.sandbox import run_program\n"
        "run_program('import time\\ntime.sleep(3600)', wall_seconds=3600.0)"
    )
    runner = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1])
    try:
        begun = patiently(lambda: jailed(runner.pid))
        assert begun
        time.sleep(0.5)  # until it has locked itself
    finally:
        runner.kill()
        runner.wait()
    assert patiently(lambda: not begun & jailed(1))


def judged(machine, number, *arguments):
    """What the filter of a machine returns for a system call: the kernel's steps, one by one."""
    rules = list(struct.iter_unpack("=HBBI", jail.filter_program(machine)))
    audit = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]
    filled = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("=IIQ6Q", number, audit, 0, *filled)
    place, loaded = 0, 0
    while True:
        code, then, otherwise, k = rules[place]
        if code == 0x06:
            return "allow" if k == 0x7FFF0000 else k & 0xFFFF
        if code == 0x20:
            loaded = struct.unpack_from("=I", data, k)[0]
        else:
            place += then if (loaded == k if code == 0x15 else loaded & k) else otherwise
        place += 1


@pytest.mark.parametrize(
    ("machine", "numbers"),
    [
        ("x86_64", (0, 41, 257, 56, 435, 302, 87, 62, 16, 72)),
        ("aarch64", (63, 198, 56, 220, 435, 261, 35, 129, 29, 25)),
    ],
)
def test_the_filter_judges_alike_on_both_machines(machine, numbers):
    read, socket, openat, clone, clone3, prlimit, unlink, kill, ioctl, fcntl = numbers
    assert judged(machine, read) == "allow"
    for number in (socket, unlink, kill, 0x40000000 + read):
        assert judged(machine, number) == errno.EPERM
    for flags, verdict in (
        (os.O_RDONLY | os.O_CLOEXEC, "allow"),
        (os.O_RDONLY | os.O_DIRECTORY, "allow"),
        *((flag, errno.EPERM) for flag in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC)),
    ):
        assert judged(machine, openat, 0, 0, flags) == verdict
    assert judged(machine, clone, 0x10000) == "allow"
    assert judged(machine, clone, 17) == errno.EPERM
    assert judged(machine, clone3) == errno.ENOSYS
    assert judged(machine, prlimit, 0, 9, 0) == "allow"
    assert judged(machine, prlimit, 0, 9, 1) == judged(machine, prlimit, 0, 9, 2**32) == errno.EPERM
    assert judged(machine, ioctl, 0, 0x5401) == judged(machine, fcntl, 0, 1) == "allow"
    assert judged(machine, ioctl, 0, 0x5412) == judged(machine, fcntl, 0, 8) == errno.EPERM


def test_other_systems_are_refused_with_the_reason(monkeypatch):
    sandbox.check_sandbox()
    monkeypatch.setattr(sandbox.platform, "system", lambda: "Darwin")
    with pytest.raises(InputError, match="expected Linux on x86_64 or aarch64"):
        sandbox.check_sandbox()


def test_a_sandbox_that_lets_nothing_pass_is_noticed(monkeypatch):
    monkeypatch.setattr(sandbox, "_JAIL", Path("/nowhere"))
    with pytest.raises(InputError, match="cannot be built here"):
        sandbox.check_sandbox()
