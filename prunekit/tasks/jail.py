"""Runs one untrusted program: the child's side of `sandbox`, started as a script, never imported.

The process gives up everything but computing before it runs the program's first line. Its limits of
processor time, memory and files are the kernel's; a seccomp filter then refuses, with EPERM, every
system call that is not listed here. So it cannot open a socket, begin a process, signal one, open a
file for writing, or remove, rename or change one, as root or as anyone. It can read files.

Usage: jail.py VERDICT_FD CPU_SECONDS MEMORY_BYTES < (a line with a nonce, then the program)
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import sys

# Name and number on x86_64 and on arm64 (-: it has none), from Linux's unistd.h.
_HARMLESS = """
read 0 63, write 1 64, close 3 57, lseek 8 62, pread64 17 67, readv 19 65, writev 20 66,
preadv 295 69, fstat 5 80, newfstatat 262 79, stat 4 -, lstat 6 -, statx 332 291, access 21 -,
faccessat 269 48, faccessat2 439 439, statfs 137 43, fstatfs 138 44, getdents64 217 61,
getcwd 79 17, chdir 80 49, fchdir 81 50, readlink 89 -, readlinkat 267 78, fadvise64 221 223,
pipe 22 -, pipe2 293 59, eventfd2 290 19, dup 32 23, dup2 33 -, dup3 292 24, umask 95 166,
select 23 -, pselect6 270 72, poll 7 -, ppoll 271 73, epoll_create 213 -, epoll_create1 291 20,
epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22,
mmap 9 222, mprotect 10 226, munmap 11 215, brk 12 214, mremap 25 216, madvise 28 233,
mincore 27 232, msync 26 227, membarrier 324 283,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigtimedwait 128 137,
rt_sigpending 127 136, sigaltstack 131 132, alarm 37 -, setitimer 38 103, getitimer 36 102,
nanosleep 35 101, clock_nanosleep 230 115, restart_syscall 219 128, clock_gettime 228 113,
clock_getres 229 114, gettimeofday 96 169, time 201 -, times 100 153, getrandom 318 278,
getpid 39 172, gettid 186 178, getppid 110 173, getpgid 121 155, getsid 124 156, getuid 102 174,
getgid 104 176, geteuid 107 175, getegid 108 177, getresuid 118 148, getresgid 120 150,
getgroups 115 158, getrlimit 97 163, getrusage 98 165, getpriority 140 141, getcpu 309 168,
sysinfo 99 179, uname 63 160, sched_yield 24 124, sched_getaffinity 204 123,
sched_getparam 143 121, sched_getscheduler 145 120, sched_get_priority_max 146 125,
sched_get_priority_min 147 126, futex 202 98, futex_waitv 449 449, set_robust_list 273 99,
set_tid_address 218 96, rseq 334 293, arch_prctl 158 -, exit 60 93, exit_group 231 94
"""
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, audit's number
_OPEN = {"x86_64": ((2, 1), (257, 2)), "aarch64": ((56, 2),)}  # open and openat: number, flags
_CLONE, _CLONE3 = {"x86_64": 56, "aarch64": 220}, 435
_IOCTL, _FCNTL = {"x86_64": 16, "aarch64": 29}, {"x86_64": 72, "aarch64": 25}
_PRLIMIT = {"x86_64": 302, "aarch64": 261}

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CLONE_THREAD = 0x00010000
_TERMINAL = (0x5401, 0x5413, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONCLEX, FIOCLEX
_DESCRIPTOR = (0, 1, 2, 3, 4, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC

_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38


def _when(number: int, body: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """Instructions for one system call; others jump over them. Each is (code, then, else, k)."""
    return [(_EQUAL, 0, len(body), number), *body]


def _argument(index: int, half: int = 0) -> tuple[int, int, int, int]:
    """Load 32 bits of an argument; both machines are little-endian."""
    return (_LOAD, 0, 0, 16 + 8 * index + 4 * half)


def filter_program(machine: str) -> bytes:
    """The seccomp filter of a machine, as classic BPF."""
    allow, refuse = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | errno.EPERM)
    column, audit = _MACHINES[machine]
    rules = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, audit), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    for entry in _HARMLESS.replace("\n", " ").split(","):
        number = entry.split()[1 + column]
        if number != "-":
            rules += _when(int(number), [allow])
    for number, flags in _OPEN[machine]:
        rules += _when(number, [_argument(flags), (_ANY_BIT, 1, 0, _WRITING), allow, refuse])
    threads = [_argument(0), (_ANY_BIT, 0, 1, _CLONE_THREAD), allow, refuse]
    rules += _when(_CLONE[machine], threads)
    # Its flags lie in memory, where a filter cannot look; without it the C library takes clone.
    rules += _when(_CLONE3, [(_RETURN, 0, 0, _ERRNO | errno.ENOSYS)])
    for number, commands in ((_IOCTL[machine], _TERMINAL), (_FCNTL[machine], _DESCRIPTOR)):
        listed = [step for command in commands for step in ((_EQUAL, 0, 1, command), allow)]
        rules += _when(number, [_argument(1), *listed, refuse])
    is_null = [_argument(2), (_EQUAL, 0, 3, 0), _argument(2, 1), (_EQUAL, 0, 1, 0), allow, refuse]
    rules += _when(_PRLIMIT[machine], is_null)  # limits may be read, not set
    return b"".join(struct.pack("=HBBI", *rule) for rule in [*rules, refuse])


def _limit(cpu_seconds: int, memory: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    for none in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(none, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


def _lock() -> None:
    """Die with the parent, gain no privilege, and let the filter judge every system call."""

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("rules", ctypes.c_char_p))

    rules = filter_program(platform.machine())
    program = Program(len(rules) // 8, rules)
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    for option, value, pointer in (
        (_PR_SET_PDEATHSIG, signal.SIGKILL, None),
        (_PR_SET_NO_NEW_PRIVS, 1, None),
        (_PR_SET_SECCOMP, 2, ctypes.byref(program)),
    ):
        none = ctypes.c_ulong(0)
        if prctl(option, ctypes.c_ulong(value), pointer, none, none):
            raise OSError(ctypes.get_errno(), f"prctl {option}")


def main() -> None:
    """Lock the process, run the program, and report how it ended."""
    verdict, cpu_seconds, memory = map(int, sys.argv[1:])
    nonce, _, source = sys.stdin.read().partition("\n")
    del sys.path[0], sys.argv[1:]  # prunekit's own files are no modules of the program's
    kind, reason = "failed", ""
    try:
        _limit(cpu_seconds, memory)
        _lock()
        kind = "unparsable"
        code = compile(source, "program", "exec")
        kind = "failed"
        exec(code, {"__name__": "__main__"})
        kind = nonce
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"[:500]
    os.write(verdict, f"{kind}\n{reason}".encode(errors="replace"))
    os._exit(0)  # neither its threads nor its exit handlers go on


if __name__ == "__main__":
    main()
