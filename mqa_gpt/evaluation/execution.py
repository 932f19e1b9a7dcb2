"""Run programs that a model wrote, each in a process of its own with limits (`sandbox.py`).

This is for code that is wrong or careless, as models write it. It is no prison for code that was
made to break out: see docs/evaluation.md for what is not protected.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mqa_gpt.errors import InputError, require_int, require_number

SANDBOX = Path(__file__).with_name("sandbox.py")
FILE_BYTES = 16 << 20  # of each file that a program writes
REPORT_BYTES = 4096
GRACE = 10.0  # seconds for starting a process, and for one that ignores its clock
PROTECTIONS = ("memory", "time", "files", "processes", "network")

# What a program sees of the environment. Libraries that start threads as they are imported would
# need more memory, and with fixed hashes sets have the same order in every run.
ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PATH": os.defpath,
    "PYTHONHASHSEED": "0",
}


@dataclass(frozen=True)
class Limits:
    """What each program may use.

    Attributes:
        timeout: seconds, on the clock and of CPU time.
        memory: MiB of address space, the interpreter included.
    """

    timeout: float = 3.0
    memory: int = 1024

    def __post_init__(self) -> None:
        require_number(
            InputError, "timeout", self.timeout, "from 0.1 to 3600", lambda x: 0.1 <= x <= 3600
        )
        require_int(InputError, "memory", self.memory, 64, 1 << 20)


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        result: "passed", "timed out", or "failed: ..." with the reason.
        protections: which of `PROTECTIONS` were active.
    """

    result: str
    protections: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether it ran to its end without an error."""
        return self.result == "passed"


def run_program(program: str, limits: Limits) -> Outcome:
    """Run a Python program in a new process and an empty folder, both gone afterwards.

    Its output is discarded; a program that ends early, by `os._exit` too, has failed.

    Raises:
        InputError: the system has none of the limits (Windows), or no program can be started.
    """
    if os.name != "posix":
        raise InputError("generated code is only run on Linux and macOS: use one of them")
    return _run(program, limits, set())


def _run(program: str, limits: Limits, running: set[subprocess.Popen[bytes]]) -> Outcome:
    """`run_program`, whose process is in `running` as long as it runs."""
    task = {
        "program": program,
        "memory": limits.memory << 20,
        "timeout": limits.timeout,
        "file_bytes": FILE_BYTES,
    }
    with _empty_folder() as folder, tempfile.TemporaryFile() as report:
        try:
            process = subprocess.Popen(
                # -P: modules of the current folder cannot stand in for others
                [sys.executable, "-s", "-P", "-B", str(SANDBOX)],
                stdin=subprocess.PIPE,
                stdout=report,
                stderr=subprocess.PIPE,
                cwd=folder,
                env={**ENVIRONMENT, "HOME": folder, "TMPDIR": folder},
                start_new_session=True,
            )
        except OSError as error:
            raise InputError(f"no process can be started: {error.strerror}") from error
        running.add(process)
        is_late = False
        try:
            # A program is text of a JSON file, which may hold what UTF-8 cannot: JSON escapes it.
            process.communicate(json.dumps(task).encode(), timeout=limits.timeout + GRACE)
        except subprocess.TimeoutExpired:
            is_late = True
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            _, started = process.communicate()
            running.discard(process)
        report.seek(0)
        return _outcome(started, report.read(REPORT_BYTES), process.returncode, is_late, limits)


def _outcome(started: bytes, report: bytes, status: int, is_late: bool, limits: Limits) -> Outcome:
    """What the process said before the program and after it; without a result, how it ended."""
    protections = _said(started, "protections")
    if protections is None:
        how = "was not ready in time" if is_late else f"ended with status {status}"
        raise InputError(
            f"no program can be run here: its process {how} before it began; the memory of "
            f"{limits.memory} MB may be too small, or there are too many workers"
        )
    result = _said(report, "result")
    if not isinstance(result, str):
        if is_late or -status in (signal.SIGALRM, signal.SIGXCPU):
            result = "timed out"
        elif status < 0:
            names = {number.value: number.name for number in signal.Signals}
            result = f"failed: ended by {names.get(-status, f'signal {-status}')}"
        else:
            result = f"failed: exit with status {status} before the end of the tests"
    return Outcome(result, tuple(name for name in PROTECTIONS if name in protections))


def _said(report: bytes, key: str) -> Any:
    """The key's value in the first line that has one."""
    for line in report.splitlines():  # among which may be what the program wrote itself
        with suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, dict) and key in entry:
                return entry[key]
    return None


def run_programs(
    programs: Sequence[str],
    limits: Limits,
    *,
    workers: int = 1,
) -> Iterator[Outcome]:
    """The outcomes of programs in their order, `workers` of which run at a time."""
    running: set[subprocess.Popen[bytes]] = set()
    workers = require_int(InputError, "workers", workers, 1, 1024)
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(_run, program, limits, running) for program in programs]
        try:
            for future in futures:
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(future.done() for future in futures):  # some may be starting a process
                for process in tuple(running):
                    process.kill()
                time.sleep(0.01)
            raise


@contextmanager
def _empty_folder() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="mqa-gpt-")
    try:
        yield folder
    finally:
        with suppress(RecursionError):  # a thousand folders in each other
            shutil.rmtree(folder, ignore_errors=True)
        if os.path.lexists(folder):  # or some that their owner may not open
            for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
                subprocess.run([*command, folder], check=False, stderr=subprocess.DEVNULL)
