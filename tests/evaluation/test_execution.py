"""Generated code under limits: what it may do, what it may not, and how it is judged."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mqa_gpt.errors import InputError
from mqa_gpt.evaluation import execution
from mqa_gpt.evaluation.execution import PROTECTIONS, Limits, run_program, run_programs

if os.name != "posix":
    pytest.skip("there are no limits on this system", allow_module_level=True)

from mqa_gpt.evaluation import sandbox
from mqa_gpt.evaluation.sandbox import ARCHITECTURES, CHECKED, DENIED

QUICK = Limits(timeout=20)  # for what ends by itself, on a busy machine too


def result(program: str, limits: Limits = QUICK) -> str:
    return run_program(program, limits).result


@pytest.fixture(scope="module")
def restricted() -> None:
    """Skips what the kernel does not restrict here."""
    if run_program("", QUICK).protections != PROTECTIONS:
        pytest.skip("this system has no Landlock or seccomp")


@pytest.mark.parametrize(
    "program",
    [
        "x = 1",
        "assert __name__ == 'builtins'",
        "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
        "import asyncio\nasync def f(): return 3\nassert asyncio.run(f()) == 3",
        "open('x', 'w').write('hi')\nassert open('x').read() == 'hi'\nimport os\nos.remove('x')",
        "import os\nos.mkdir('a'), os.mkdir('b')\nopen('a/x', 'w').close()\n"
        "os.rename('a/x', 'b/x')\nos.link('b/x', 'a/y')",
        "import fcntl, os, socket\na, b = socket.socketpair()\na.send(b'x')\n"
        "assert b.recv(9) == b'x' and not os.isatty(a.fileno())\n"
        "a.setblocking(False)\nos.set_inheritable(a.fileno(), True)\n"
        "assert fcntl.fcntl(a, fcntl.F_GETFL) & os.O_NONBLOCK",
        "import tempfile\nwith tempfile.TemporaryDirectory() as d: open(d + '/x', 'w')",
        "import resource\nassert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)",
        "import os\nassert 'SECRET' not in os.environ and os.listdir() == []",
        "import atexit, time\natexit.register(time.sleep, 99)",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()",
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass A:\n    x: int = 1\nassert A().x == 1",
        "def f(x: int): return x\nassert f.__annotations__['x'] is int",
    ],
)
def test_ordinary_programs_pass(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    assert result(program) == "passed"


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("assert 1 == 2, 'no'", "failed: AssertionError: no"),
        ("def f(:", "failed: SyntaxError"),
        ("def f(x: Unknown): return x", "failed: NameError"),
        ("x = '\0'", "failed: SyntaxError|failed: ValueError"),
        ("x = '\ud800'", "failed: UnicodeEncodeError"),
        ("raise SystemExit(0)", "failed: SystemExit: 0"),
        ("import os\nos._exit(0)", "failed: exit with status 0 before the end of the tests"),
        ("import ctypes\nctypes.string_at(0)", "failed: ended by SIG(SEGV|BUS)"),
        ("input()", "failed: EOFError"),
        ("raise ValueError('x' * 10**6)", "failed: ValueError: x{100,190}$"),
        ("class E(Exception):\n  def __str__(self): 1 / 0\nraise E", "failed: an error that"),
    ],
)
def test_a_program_that_does_not_come_to_its_end_has_failed(program: str, expected: str) -> None:
    assert re.match(expected, result(program))


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time\ntime.sleep(99)",
        "import sys\nwhile True: print('x' * 10**6, file=sys.stderr), print('x' * 10**6)",
        "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
        "import signal, time\nfor s in (1, 2, 14, 15, 24): signal.signal(s, signal.SIG_IGN)\n"
        "time.sleep(99)",
        "import os, time\nfor fd in range(3, 64):\n  try:\n    while True: "
        "os.write(fd, b'x' * 10**5)\n  except OSError: pass\ntime.sleep(99)",
    ],
)
def test_a_program_that_takes_too_long_is_ended(
    program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "GRACE", 4)
    begin = time.monotonic()
    assert result(program, Limits(timeout=0.7)) == "timed out"
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize(
    "program",
    [
        "x = 'a' * (1 << 40)",
        "x = []\nwhile True: x.append(bytearray(1 << 24))",
    ],
)
def test_memory_is_limited(program: str) -> None:
    assert result(program, Limits(timeout=20, memory=256)) == "failed: MemoryError"


def test_written_files_are_limited_and_removed() -> None:
    assert "File too large" in result("f = open('x', 'wb')\nwhile True: f.write(bytes(1 << 20))")


@pytest.mark.usefixtures("restricted")
@pytest.mark.parametrize(
    "attack",
    [
        "open(victim, 'w')",
        "open(victim, 'a')",
        "os.remove(victim)",
        "os.truncate(victim, 0)",
        "os.rename(victim, victim + '2')",
        "os.symlink('x', victim + '2')",
        "os.mkdir(victim + '2')",
        "os.link(victim, 'x')",
        "os.chmod(victim, 0)",
        "os.utime(victim)",
        "os.setxattr(victim, 'user.a', b'b')",
        "os.fork()",
        "subprocess.run(['true'])",
        "multiprocessing.Process(target=print).start()",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "socket.socket()",
        "socket.socket(socket.AF_UNIX)",
        "os.kill(os.getppid(), 9)",
        "os.kill(-1, 9)",
        "fcntl.fcntl(open('x', 'w'), fcntl.F_SETOWN, os.getppid())",
        "fcntl.fcntl(open('x', 'w'), fcntl.F_SETSIG, 9)",
        "fcntl.fcntl(open('x', 'w'), 15, struct.pack('ii', 1, os.getppid()))",
        "fcntl.ioctl(socket.socketpair()[0], 0x8901, struct.pack('i', os.getppid()))",
        "fcntl.ioctl(open('x', 'w'), 0x40086602, struct.pack('l', 0x40))",  # FS_IOC_SETFLAGS
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)",
        # Of this process; of root's others the kernel refuses it anyway.
        "os.sched_setaffinity(0, os.sched_getaffinity(0))",
        "os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))",
        "os.sched_setparam(0, os.sched_param(0))",
        "call(463, -100, victim.encode(), 0, b'user.a', b'b', 1)",  # setxattrat
        "call(466, -100, victim.encode(), 0, b'user.a')",  # removexattrat
        "call(469, -100, victim.encode(), bytes(24), 24, 0)",  # file_setattr
        "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
        "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
        "open(f'/proc/{os.getppid()}/mem', 'rb')",
        "open(f'/proc/{os.getppid()}/environ', 'rb').read()",
        "shared_memory.SharedMemory(create=True, size=9)",
        "os.mknod('device', 0o600 | 0o20000, os.makedev(1, 3))",
        "if libc.unshare(0x10000000): raise OSError(ctypes.get_errno(), '')",
        "call(29, 7, 99, 0o1600)",  # shmget
    ],
)
def test_what_is_outside_cannot_be_changed(attack: str, tmp_path: Path) -> None:
    if "call(29" in attack and platform.machine() != "x86_64":
        pytest.skip("the number is of x86_64")
    victim = tmp_path / "victim"
    victim.write_text("hi")
    program = (
        "import ctypes, fcntl, multiprocessing, os, resource, socket, struct, subprocess\n"
        "from multiprocessing import shared_memory\n"
        f"libc, victim = ctypes.CDLL(None, use_errno=True), {str(victim)!r}\n"
        "def call(*values):\n"
        "    if libc.syscall(*values) < 0: raise OSError(ctypes.get_errno(), '')\n"
        f"{attack}\n"
    )
    # Landlock says of a link to another folder that it is another device.
    refused = r"failed: (PermissionError|ValueError: not allowed|OSError: \[Errno 18\])"
    assert re.match(refused, result(program))
    assert victim.read_text() == "hi"
    assert list(tmp_path.iterdir()) == [victim]


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    deep = "import os\nfor _ in range(3000): os.mkdir('a' * 9), os.chdir('a' * 9)\nopen('x', 'w')"
    closed = "import os\nos.makedirs('a/b')\nos.mkdir('a/b/c', 0)\nos.symlink('/', 'a/d')"
    for program in (deep, closed, "import time\nopen('x', 'w')\ntime.sleep(99)"):
        run_program(program, Limits(timeout=3))
        assert list(tmp_path.iterdir()) == []


def test_a_process_that_cannot_begin_is_no_failed_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(execution, "SANDBOX", tmp_path / "broken.py")
    with pytest.raises(InputError, match="its process ended with status 3 before it began"):
        run_program("x = 1", QUICK)


@pytest.mark.parametrize(
    "written",
    ["b'1\\n'", "b'null\\n'", "b'[' * 4096", "b'{\"protections\": 5}\\n'", "b'{\"result\": 5}\\n'"],
)
def test_a_program_that_writes_into_its_report_stops_nothing(written: str) -> None:
    program = (
        "import os\nfor fd in range(3, 64):\n  try:\n    os.ftruncate(fd, 0)\n"
        f"    os.write(fd, {written})\n  except OSError: pass\nassert 0"
    )
    outcome = run_program(program, QUICK)
    assert outcome.result.startswith("failed: ")
    assert outcome.protections == run_program("", QUICK).protections


def test_an_end_by_a_signal_without_a_name_is_a_failed_sample() -> None:
    outcome = execution._outcome(b'{"protections": ["time"]}\n', b"", -40, False, QUICK)
    assert outcome == execution.Outcome("failed: ended by signal 40", ("time",))


def test_what_the_system_does_not_limit_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def setrlimit(kind: int, _: tuple[int, int]) -> None:
        if kind == sandbox.resource.RLIMIT_AS:
            raise ValueError("current limit exceeds maximum limit")  # as on macOS

    monkeypatch.setattr(sandbox.resource, "setrlimit", setrlimit)
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    assert sandbox.protect(1 << 30, 3.0, 1 << 20) == ["time"]


def test_no_file_stays_open_where_landlock_refuses_a_rule() -> None:
    class Libc:
        def syscall(self, number: int, *values: Any) -> int:
            if number == sandbox.CREATE_RULESET:
                return os.open(os.devnull, os.O_RDONLY) if values[0] else 6
            return -1

    before = list(Path("/dev/fd").iterdir())
    assert not sandbox._restrict_files(Libc())
    assert list(Path("/dev/fd").iterdir()) == before


def test_an_interrupt_ends_what_is_running() -> None:
    outcomes = run_programs(
        ["x = 1", *["import time\ntime.sleep(99)"] * 3], Limits(timeout=60), workers=2
    )
    assert next(outcomes).passed
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        outcomes.throw(KeyboardInterrupt)
    assert time.monotonic() - begin < 30


def test_programs_run_beside_each_other_and_their_outcomes_keep_the_order() -> None:
    programs = ["import time\ntime.sleep(0.5)\nassert 0", "x = 1", "1 / 0", "x = 1"] * 2
    outcomes = list(run_programs(programs, QUICK, workers=4))
    assert [outcome.passed for outcome in outcomes] == [False, True, False, True] * 2


@pytest.mark.parametrize(
    "values", [{"timeout": 0}, {"timeout": float("nan")}, {"memory": 1}, {"memory": True}]
)
def test_limits_that_make_no_sense_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(InputError):
        Limits(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_the_numbers_of_system_calls_are_those_of_the_kernel_headers(machine: str) -> None:
    found = {}
    if machine == "x86_64":
        paths = list(Path("/usr/include").glob("**/asm/unistd_64.h"))
    else:
        paths = [Path("/usr/include/asm-generic/unistd.h")]
    if not paths or not paths[0].exists():
        pytest.skip("the headers of the kernel are not installed")
    for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", paths[0].read_text()):
        found[name] = int(number)
    column = list(ARCHITECTURES).index(machine)
    numbers = {name: both[column] for name, both in {**DENIED, **CHECKED}.items()}
    # Than these headers may be.
    newer = {"fchmodat2", "setxattrat", "removexattrat", "file_setattr"} - found.keys()
    expected = {name: found.get(name) for name in numbers if name not in newer}
    assert {name: numbers[name] for name in expected} == expected


def test_the_script_needs_nothing_but_the_standard_library() -> None:
    source = Path(sys.modules[run_program.__module__].__file__ or "").parent / "sandbox.py"
    imported = re.findall(r"^(?:import|from) (\w+)", source.read_text(), re.MULTILINE)
    assert set(imported) <= sys.stdlib_module_names
