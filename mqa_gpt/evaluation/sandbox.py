"""Run one program under limits: a script of its own, which `execution.py` starts in a new process.

Only the standard library is imported, so that it starts in some hundredths of a second. Standard
input holds the program and its limits as JSON. Standard output gets one line of JSON with the
protections that are active, and a second one once the program has come to its end.

Neither the process nor what it loads can undo any of them:

    memory, time   resource limits: bytes, CPU seconds, bytes per written file, open files
    files          Landlock: no file is made, changed or removed outside the current folder
    processes      seccomp: no new process, no signal to another one, no privileges
    network        seccomp: no sockets

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
    # other processes
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "setpriority": (141, 140),
    # namespaces, in which a process has privileges again
    "unshare": (272, 97), "setns": (308, 268),
    # what Landlock leaves free: modes, owners, times and attributes of files
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    # memory that outlives a process, and keys
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
}  # fmt: skip
CLONE, CLONE3, PRLIMIT = (56, 220), (435, 435), (302, 261)
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h
CLONE_THREAD = 0x10000
X32 = 0x40000000  # a second set of numbers on x86_64

# linux/landlock.h: rights by the version that brought them.
WRITE_FILE, REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG, MAKE_SYM = (
    1 << bit for bit in (1, 4, 5, 7, 8, 12)
)
MAKE_OTHERS = 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11  # devices, sockets, pipes
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on every architecture

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SIGKILL, EPERM, ENOSYS = 9, 1, 38


def main() -> None:
    """Read a program, give up what it must not have, run it and report."""
    task = json.load(sys.stdin)
    report = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    protections = protect(task["memory"], task["timeout"], task["file_bytes"])
    _say(report, {"protections": protections})
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
        exec(compile(program, "<program>", "exec"), {})
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
    seconds = math.ceil(timeout)
    for kind, soft, hard in (
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_CPU, seconds, seconds + 1),  # SIGXCPU, then SIGKILL
        (resource.RLIMIT_FSIZE, file_bytes, file_bytes),
        (resource.RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        most = resource.getrlimit(kind)[1]
        if most != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        resource.setrlimit(kind, (soft, hard))
    active = ["memory", "time"]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)  # die with the process that started this one
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        active += ["files"] * _restrict_files(libc)
        # Root's privileges; fails without any.
        libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))
        active += ["processes", "network"] * _restrict_calls(libc)
    if "processes" not in active:  # then neither processes nor threads, except for root
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    return active


def _restrict_files(libc: Any) -> bool:
    """Landlock: write in the current folder and to /dev/null only; False if the kernel lacks it."""
    version = libc.syscall(CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    own = WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_SYM
    own |= TRUNCATE if version >= 3 else 0
    handled = own | MAKE_OTHERS
    handled |= (REFER if version >= 2 else 0) | (IOCTL_DEV if version >= 5 else 0)
    rules = libc.syscall(CREATE_RULESET, struct.pack("Q", handled), 8, 0)
    null = (WRITE_FILE | TRUNCATE) & handled
    for path, rights in ((".", own), (os.devnull, null)):
        place = os.open(path, os.O_PATH)
        if libc.syscall(ADD_RULE, rules, 1, struct.pack("=Qi", rights, place), 0):
            return False
        os.close(place)
    restricted = libc.syscall(RESTRICT_SELF, rules, 0) == 0
    os.close(rules)
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
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    number, architecture, argument = 0, 4, 16  # offsets in struct seccomp_data
    allow, fail = 0x7FFF0000, 0x00050000
    column = list(ARCHITECTURES).index(machine)

    def step(code: int, value: int, skip_if: int = 0, skip_else: int = 0) -> bytes:
        return struct.pack("HBBI", code, skip_if, skip_else, value)

    steps = [
        step(load, architecture),
        step(equal, ARCHITECTURES[machine], 1, 0),
        step(give, fail | EPERM),
        step(load, number),
    ]
    if machine == "x86_64":
        steps += [step(at_least, X32, 0, 1), step(give, fail | EPERM)]
    for numbers in DENIED.values():
        denied = numbers[column]
        if denied is not None:
            steps += [step(equal, denied, 0, 1), step(give, fail | EPERM)]
    # Its flags are in memory, where no filter sees them; without it, libraries take `clone`.
    steps += [step(equal, CLONE3[column], 0, 1), step(give, fail | ENOSYS)]
    # Threads are allowed, and limits of this process.
    steps += [step(equal, CLONE[column], 0, 4), step(load, argument)]
    steps += [step(any_bit, CLONE_THREAD, 1, 0), step(give, fail | EPERM), step(give, allow)]
    steps += [step(equal, PRLIMIT[column], 0, 3), step(load, argument)]
    steps += [step(equal, 0, 1, 0), step(give, fail | EPERM), step(give, allow)]
    return b"".join(steps)


def _say(report: int, what: dict[str, Any]) -> None:
    os.write(report, json.dumps(what).encode() + b"\n")


if __name__ == "__main__":
    main()
