"""Generated code under limits: what it may do, what it may not, and how it is judged."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from pathlib import Path

import pytest

from mqa_gpt.errors import InputError
from mqa_gpt.evaluation import execution
from mqa_gpt.evaluation.execution import PROTECTIONS, Limits, run_program, run_programs
from mqa_gpt.evaluation.sandbox import ARCHITECTURES, CLONE, CLONE3, DENIED, PRLIMIT

pytestmark = pytest.mark.skipif(os.name != "posix", reason="there are no limits on this system")

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
        "import tempfile\nwith tempfile.TemporaryDirectory() as d: open(d + '/x', 'w')",
        "import resource\nassert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)",
        "import os\nassert 'SECRET' not in os.environ and os.listdir() == []",
        "import atexit, time\natexit.register(time.sleep, 99)",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()",
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass A:\n    x: int = 1\nassert A().x == 1",
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
        "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
        "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
        "open(f'/proc/{os.getppid()}/mem', 'rb')",
        "open(f'/proc/{os.getppid()}/environ', 'rb').read()",
        "shared_memory.SharedMemory(create=True, size=9)",
        "os.mknod('device', 0o600 | 0o20000, os.makedev(1, 3))",
        "ctypes.set_errno(0); r = libc.unshare(0x10000000); e = ctypes.get_errno()\n"
        "if r: raise PermissionError(e)",
        "r = libc.syscall(29, 7, 99, 0o1600)\nif r < 0: raise PermissionError",
    ],
)
def test_what_is_outside_cannot_be_changed(attack: str, tmp_path: Path) -> None:
    if "syscall" in attack and platform.machine() != "x86_64":
        pytest.skip("the number is of x86_64")
    victim = tmp_path / "victim"
    victim.write_text("hi")
    program = (
        "import ctypes, multiprocessing, os, resource, socket, subprocess\n"
        "from multiprocessing import shared_memory\n"
        f"libc, victim = ctypes.CDLL(None, use_errno=True), {str(victim)!r}\n{attack}\n"
    )
    assert re.match("failed: (PermissionError|ValueError: not allowed)", result(program))
    assert victim.read_text() == "hi"
    assert list(tmp_path.iterdir()) == [victim]


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    deep = "import os\nfor _ in range(3000): os.mkdir('a' * 9), os.chdir('a' * 9)\nopen('x', 'w')"
    for program in (deep, "import time\nopen('x', 'w')\ntime.sleep(99)"):
        run_program(program, Limits(timeout=3))
        assert list(tmp_path.iterdir()) == []


def test_a_process_that_cannot_begin_is_no_failed_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(execution, "SANDBOX", tmp_path / "broken.py")
    with pytest.raises(InputError, match="its process ended with status 3 before it began"):
        run_program("x = 1", QUICK)


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
    calls = {**DENIED, "clone": CLONE, "clone3": CLONE3, "prlimit64": PRLIMIT}
    numbers = {name: both[column] for name, both in calls.items()}
    newer = {"fchmodat2"} - found.keys()  # than these headers
    expected = {name: found.get(name) for name in numbers if name not in newer}
    assert {name: numbers[name] for name in expected} == expected


def test_the_script_needs_nothing_but_the_standard_library() -> None:
    source = Path(sys.modules[run_program.__module__].__file__ or "").parent / "sandbox.py"
    imported = re.findall(r"^(?:import|from) (\w+)", source.read_text(), re.MULTILINE)
    assert set(imported) <= sys.stdlib_module_names
