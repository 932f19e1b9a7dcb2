"""Run one program under limits: a script of its own, which `execution.py` starts in a new process.

Only the standard library is imported, so that it starts in some hundredths of a second. Standard
input holds the program and its limits as JSON. Standard error gets a line of JSON with the
protections that are active and is closed before the program begins. Standard output gets a line
with the result once the program has come to its end.

Neither the process nor what it loads can undo any of them:

    memory, time   resource limits: bytes, CPU seconds, bytes per written file, open files
    files          Landlock: no file is made, changed or removed outside the current folder
    processes      seccomp: no new process, no signal to another one, no privileges
    network        seccomp: no sockets, except for connected pairs within the process

The last three exist on Linux alone, where they need no privileges.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import platform
import resource
import signal
import struct
import sys
from typing import Any

MESSAGE_CHARACTERS = 200
OPEN_FILES = 64

# System calls that fail with EPERM: their numbers on x86_64 and on aarch64, which lacks the older.
DENIED: dict[str, tuple[int, int | None]] = {
    # the network: io_uring opens sockets without `socket`
    "socket": (41, 198), "io_uring_setup": (425, 425),
    # new processes; for `clone` see `_filter`
    "fork": (57, None), "vfork": (58, None),
    # other processes; for `fcntl`, which can direct signals to them, see `_filter`
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119), "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274), "migrate_pages": (256, 238), "move_pages": (279, 239),
    # namespaces, in which a process has privileges again
    "unshare": (272, 97), "setns": (308, 268),
    # what Landlock leaves free: modes, owners, times and attributes of files
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "setxattrat": (463, 463), "removexattrat": (466, 466), "file_setattr": (469, 469),
    # memory that outlives a process, and keys
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
}  # fmt: skip
# Allowed or denied by their arguments.
CHECKED = {
    "clone": (56, 220), "clone3": (435, 435), "prlimit64": (302, 261), "socketpair": (53, 199),
    "fcntl": (72, 25), "ioctl": (16, 29),
}  # fmt: skip
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h
CLONE_THREAD = 0x10000
SOCK_STREAM, SOCK_TYPE_MASK = 1, 0xF
F_SETOWN, F_SETSIG, F_SETOWN_EX = 8, 10, 15
# What Python asks of a file: whether it is a terminal and how wide, how much there is to read, and
# to close it on exec or not to block. Others direct signals, type into terminals or set attributes.
TCGETS, TCGETS2, TIOCGWINSZ, FIONREAD = 0x5401, 0x802C542A, 0x5413, 0x541B
FIONCLEX, FIOCLEX, FIONBIO = 0x5450, 0x5451, 0x5421
X32 = 0x40000000  # a second set of numbers on x86_64

# linux/landlock.h: rights by the version that brought them.
WRITE_FILE, REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG, MAKE_SYM = (
    1 << bit for bit in (1, 4, 5, 7, 8, 12)
)
MAKE_OTHERS = 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11  # devices, sockets, pipes
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
SCOPE_ABSTRACT_SOCKETS, SCOPE_SIGNALS = 1, 2
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on every architecture

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SIGKILL, EPERM, ENOSYS = 9, 1, 38


def main() -> None:
    """Read a program, give up what it must not have, run it and report."""
    task = json.load(sys.stdin)
    report, started = os.dup(1), os.dup(2)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    protections = protect(task["memory"], task["timeout"], task["file_bytes"])
    _say(started, {"protections": protections})
    os.close(started)  # here, so that the program cannot take it back
    # The clock starts here, so that a busy machine's slow start does not count. Unless the program
    # changes it, the signal ends the process; the parent waits only a little longer.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, task["timeout"])
    _say(report, {"result": run(task["program"])})
    os._exit(0)  # at once: what the program has registered or left running is not waited for


def run(program: str) -> str:
    """Run a program: "passed", or why not."""
    try:
        # Globals without a __name__, as the public harnesses do it: it is "builtins".
        # Nor does this file's own `from __future__` hold in it.
        exec(compile(program, "<program>", "exec", dont_inherit=True), {})
    except BaseException as error:  # SystemExit too: the tests have not come to their end
        try:
            reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        except BaseException:
            reason = "an error that cannot be shown"
        return f"failed: {reason[:MESSAGE_CHARACTERS]}"
    return "passed"


def protect(memory: int, timeout: float, file_bytes: int) -> list[str]:
    """Limit this process for good, and name what is limited.

    Args:
        memory: bytes of address space.
        timeout: seconds of CPU time, rounded up.
        file_bytes: of each file.
    """
    active = []
    if _limit(resource.RLIMIT_AS, memory, memory):
        active.append("memory")
    seconds = math.ceil(timeout) + 1  # one for the start, which has counted so far
    if _limit(resource.RLIMIT_CPU, seconds, seconds + 1):  # SIGXCPU, then SIGKILL
        active.append("time")
    _limit(resource.RLIMIT_FSIZE, file_bytes, file_bytes)
    _limit(resource.RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES)
    _limit(resource.RLIMIT_CORE, 0, 0)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)  # die with the process that started this one
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if _restrict_files(libc):
            active.append("files")
        libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))  # drop all capabilities
        if _restrict_calls(libc):
            active += ["processes", "network"]
    if "processes" not in active:  # then neither processes nor threads, except for root
        _limit(resource.RLIMIT_NPROC, 0, 0)
    return active


def _limit(kind: int, soft: int, hard: int) -> bool:
    """Lower a resource limit; False where the system refuses, as macOS does for memory."""
    most = resource.getrlimit(kind)[1]
    if most != resource.RLIM_INFINITY:
        soft, hard = min(soft, most), min(hard, most)
    try:
        resource.setrlimit(kind, (soft, hard))
    except (OSError, ValueError):
        return False
    return True


def _restrict_files(libc: Any) -> bool:
    """Landlock: write in the current folder and to /dev/null only; False if the kernel lacks it."""
    version = libc.syscall(CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    own = WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_SYM
    own |= (REFER if version >= 2 else 0) | (TRUNCATE if version >= 3 else 0)
    handled = own | MAKE_OTHERS | (IOCTL_DEV if version >= 5 else 0)
    # Rights on files, on the network (seccomp does that), and what stays within the process.
    attributes = struct.pack("QQQ", handled, 0, SCOPE_ABSTRACT_SOCKETS | SCOPE_SIGNALS)
    rules = libc.syscall(CREATE_RULESET, attributes, 24 if version >= 6 else 8, 0)
    if rules < 0:
        return False
    null = (WRITE_FILE | TRUNCATE) & handled
    places = {os.open(path, os.O_PATH): rights for path, rights in ((".", own), (os.devnull, null))}
    restricted = not any(
        libc.syscall(ADD_RULE, rules, 1, struct.pack("=Qi", rights, place), 0)
        for place, rights in places.items()
    ) and not libc.syscall(RESTRICT_SELF, rules, 0)
    for file in (rules, *places):
        os.close(file)
    return restricted


def _restrict_calls(libc: Any) -> bool:
    """seccomp: the calls of `DENIED` fail; False on another architecture or if it is forbidden."""
    if platform.machine() not in ARCHITECTURES:
        return False
    program = ctypes.create_string_buffer(_filter(platform.machine()))
    count = (len(program) - 1) // 8
    header = struct.pack("HP", count, ctypes.addressof(program))
    return libc.prctl(PR_SET_SECCOMP, 2, header, 0, 0) == 0


def _filter(machine: str) -> bytes:
    """The filter as a program of classic BPF, which sees a call's number and arguments."""
    load, mask, equal, at_least, any_bit, give = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
    number, architecture, first, second = 0, 4, 16, 24  # offsets in struct seccomp_data
    column = list(ARCHITECTURES).index(machine)

    def step(code: int, value: int, skip_if: int = 0, skip_else: int = 0) -> bytes:
        return struct.pack("HBBI", code, skip_if, skip_else, value)

    def call(numbers: tuple[int, int | None], *steps: bytes) -> list[bytes]:
        """Steps for one call, the last of which gives an answer; others skip them."""
        which = numbers[column]
        return [] if which is None else [step(equal, which, 0, len(steps)), *steps]

    def one_of(values: tuple[int, ...], answer: bytes) -> list[bytes]:
        """The answer, if what was loaded is one of the values."""
        return [part for value in values for part in (step(equal, value, 0, 1), answer)]

    fail = 0x50000
    allow, deny, lack = step(give, 0x7FFF0000), step(give, fail | EPERM), step(give, fail | ENOSYS)
    steps = [step(load, architecture), step(equal, ARCHITECTURES[machine], 1, 0), deny]
    steps += [step(load, number)]
    if machine == "x86_64":
        steps += [step(at_least, X32, 0, 1), deny]
    for numbers in DENIED.values():
        steps += call(numbers, deny)
    # clone3's flags are behind a pointer, which a filter cannot read; on ENOSYS libc falls back to
    # clone, which may make threads only.
    steps += call(CHECKED["clone3"], lack)
    thread = step(any_bit, CLONE_THREAD, 0, 1)
    steps += call(CHECKED["clone"], step(load, first), thread, allow, deny)
    # Limits of this process, which is number 0.
    steps += call(CHECKED["prlimit64"], step(load, first), *one_of((0,), allow), deny)
    # Streams, which stay connected to each other: datagrams could be sent to other sockets.
    kind = (step(load, second), step(mask, SOCK_TYPE_MASK))
    steps += call(CHECKED["socketpair"], *kind, *one_of((SOCK_STREAM,), allow), deny)
    # No signal to whom a file is said to belong, when there is something to read or write.
    owners = one_of((F_SETOWN, F_SETSIG, F_SETOWN_EX), deny)
    steps += call(CHECKED["fcntl"], step(load, second), *owners, allow)
    asked = (TCGETS, TCGETS2, TIOCGWINSZ, FIONREAD, FIONCLEX, FIOCLEX, FIONBIO)
    steps += call(CHECKED["ioctl"], step(load, second), *one_of(asked, allow), deny)
    return b"".join([*steps, allow])


def _say(report: int, what: dict[str, Any]) -> None:
    os.write(report, json.dumps(what).encode() + b"\n")


if __name__ == "__main__":
    main()
