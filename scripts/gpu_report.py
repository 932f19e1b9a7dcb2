"""Everything about kernels and generation that needs a GPU, in one command and one JSON file.

    python3 scripts/gpu_report.py --out report            # at most eight minutes
    python3 scripts/gpu_report.py --out report --only numerics,forward

It needs python3 with torch, triton, transformers, tokenizers and safetensors, and this checkout:
nothing is installed or downloaded. Without a GPU it runs everything in small under Triton's
interpreter, as proof that it would run.

Sections: environment, ceilings, numerics, parity, forward, backward, decode, model_tokens,
model_decode, model_prefill, model_profile, model_heads, autotune. They run in a process of their
own, and every case is in `gpu_report.json` as soon as it is done. A section that fails is recorded
with its traceback, and the others follow in a new process; the exit status is 1 then, as it is when
a check fails.
"""

from __future__ import annotations

import argparse
import errno
import json
import multiprocessing
import os
import shlex
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gpu_report_table import failures, print_table

Row = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in (".", "kernels", "scripts", "benchmarks")]

# In this order, each with its share of the time. What one does not use is the next ones'.
SHARES = {
    "environment": 1,
    "ceilings": 1,
    "numerics": 12,
    "parity": 10,
    "forward": 9,
    "backward": 9,
    "decode": 8,
    "model_tokens": 3,
    "model_decode": 8,
    "model_prefill": 3,
    "model_profile": 2,
    "model_heads": 5,
    "autotune": 10,
}
GRACE = 60.0  # seconds beyond its share after which a section is taken to hang
START = 600.0  # seconds that importing PyTorch may take
PATIENCE = 10.0  # seconds that ending may take
MOST_SECONDS = 24 * 3600


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=f"{__doc__.splitlines()[0]} Without a GPU it tries itself out in small."
    )
    parser.add_argument(
        "--out", type=Path, default=Path(), help="folder of gpu_report.json (default: this one)"
    )
    parser.add_argument(
        "--only",
        type=section_names,
        default=list(SHARES),
        metavar="A,B",
        help=f"which of the sections {', '.join(SHARES)} (default: all)",
    )
    parser.add_argument(
        "--budget",
        type=seconds_of,
        default=450,
        metavar="SECONDS",
        help="what does not fit into so many is skipped (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    path = options.out / "gpu_report.json"
    try:
        prepare(path)
    except OSError as error:
        parser.error(f"--out: {path} cannot be written: {error.strerror}")

    sections: dict[str, Row] = {name: {"skipped": "not chosen"} for name in SHARES}
    report: Row = {
        "command": shlex.join(["python3", "scripts/gpu_report.py", *(arguments or sys.argv[1:])]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "budget_seconds": options.budget,
        "device": None,
        "sections": sections,
    }
    end = time.monotonic() + options.budget
    worker = Worker()
    try:
        for i, name in enumerate(options.only):
            seconds = share(options.only[i:], end - time.monotonic())
            section: Row = {"rows": [], "seconds": 0.0, "error": None}
            sections[name] = section
            begin = time.monotonic()
            print(f"{name} (at most {seconds:.0f} s)", file=sys.stderr)
            try:
                if worker.device is None:
                    report["device"] = worker.start()
                    if report["device"] == "cpu":
                        print("no GPU: everything in small under Triton's interpreter instead")
                for row in worker.rows(name, seconds):
                    section["rows"].append(row)
                    write(path, report)
            except SectionError as error:
                section["error"] = str(error)
                print(error, file=sys.stderr)
                worker.stop()
            section["seconds"] = time.monotonic() - begin
            write(path, report)
    finally:
        worker.stop()
    print_table(report)
    print(f"written to {path}")
    return 1 if failures(report) else 0


def section_names(text: str) -> list[str]:
    """What --only says, in the order in which it runs."""
    names = text.split(",")
    unknown = [name for name in names if name not in SHARES]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{', '.join(unknown)}: the sections are {', '.join(SHARES)}"
        )
    return [name for name in SHARES if name in names]


def seconds_of(text: str) -> float:
    """What --budget says."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= MOST_SECONDS:  # as NaN is not
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of seconds above 0 and up to {MOST_SECONDS:,}"
        )
    return seconds


def share(names: list[str], left: float) -> float:
    """Seconds of those left that the first of the sections still to run may take."""
    return max(0.0, left) * SHARES[names[0]] / sum(SHARES[name] for name in names)


def prepare(path: Path) -> None:
    """Make the report's folder; OSError if it cannot be written there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    new_file(path).touch()
    new_file(path).unlink()


def new_file(path: Path) -> Path:
    """What is written before it takes the place of the file at `path`."""
    return path.with_suffix(".new")


def write(path: Path, report: Row) -> None:
    """Replace the file in one step, so that there is a whole one at any time."""
    new = new_file(path)
    new.write_text(json.dumps(report, indent=1) + "\n")
    new.replace(path)


class SectionError(Exception):
    """A section ended early; the message is its traceback, or what became of its process."""


class Worker:
    """A process that runs sections. What a kernel does to it, it does not do to the report."""

    def __init__(self) -> None:
        self.device: str | None = None
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None

    def start(self) -> str:
        """Start it; "cuda" or "cpu", the device that it works on."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs,))
        self._process.start()
        theirs.close()  # so that its death is the end of our pipe
        self.device = self._receive(START)[1]
        assert self.device is not None
        return self.device

    def rows(self, section: str, seconds: float) -> Iterator[Row]:
        """A section's rows as they come.

        Raises:
            SectionError: it failed, died or hangs; the worker has to be stopped then.
        """
        assert self._pipe is not None
        end = time.monotonic() + seconds + GRACE
        self._pipe.send((section, seconds))
        while True:
            kind, content = self._receive(end - time.monotonic())
            if kind == "row":
                yield content
            elif kind == "end":
                return
            else:
                raise SectionError(content)

    def _receive(self, seconds: float) -> tuple[str, Any]:
        assert self._pipe is not None
        assert self._process is not None
        if not self._pipe.poll(max(0.0, seconds)):
            raise SectionError(f"stopped: its process was silent for {seconds:.0f} s")
        try:
            message: tuple[str, Any] = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise SectionError(f"its process died: exit code {self._process.exitcode}") from None
        return message

    def stop(self) -> None:
        """End it, whatever it is doing."""
        if self._process is not None and self._pipe is not None:
            self._pipe.close()
            self._process.join(PATIENCE)  # it ends by itself unless it hangs
            self._process.kill()
            assert self._process.pid is not None
            with suppress(ProcessLookupError):  # processes of its own that are left
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.join()
        self.device, self._process, self._pipe = None, None, None


def serve(pipe: Connection) -> None:
    """The worker: run the sections that are asked for until the pipe ends."""
    os.setpgrp()  # so that processes of its own end with it
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":  # before Triton is imported
        os.environ["TRITON_INTERPRET"] = "1"
        # The checks put NaN where kernels may not look. A kernel masks it after it has computed,
        # which on a GPU nobody hears of, but the interpreter computes with NumPy, which warns.
        warnings.filterwarnings(
            "ignore",
            r"invalid value encountered in (matmul|multiply)",
            RuntimeWarning,
            r"triton\.runtime\.interpreter",
        )
    from clock import Clock
    from gpu_report_sections import SECTIONS, Context, cpu_plan, gpu_plan

    plan = gpu_plan() if device == "cuda" else cpu_plan()
    clock = Clock(torch.device(device))
    pipe.send(("device", device))
    with suppress(EOFError):
        while True:
            name, seconds = pipe.recv()
            try:
                for row in SECTIONS[name](Context(clock, plan, time.monotonic() + seconds)):
                    pipe.send(("row", row))
                pipe.send(("end", None))
            except Exception:  # whatever it is belongs into the report
                pipe.send(("error", traceback.format_exc()))


if __name__ == "__main__":
    sys.exit(main())
