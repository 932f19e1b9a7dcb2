"""Check and measure the kernels and the models on a GPU: one command, one JSON file.

    PYTHONPATH=.:kernels python3 scripts/gpu_report.py --out report
    PYTHONPATH=.:kernels python3 scripts/gpu_report.py --out report --only numerics,decode
    PYTHONPATH=.:kernels python3 scripts/gpu_report.py --out tiles --only autotune

Needs torch, triton, transformers, tokenizers and safetensors; installs and downloads nothing.
Without a GPU every section runs in small under Triton's interpreter, which tests this script.
The most telling sections come first, for the case that time runs out: whether every kernel runs at
all (`smoke`), then checks, then speed, then the same with another setting (`*-no-overlap`) or with
another assembler if there is one (`*-ptxas`).

Each section runs in its own process, the checks of kernels at the same time, and `gpu_report.json`
is rewritten after every row. So a section that fails, crashes or hangs costs only what it had left
to do. The exit status is 1 if a
check fails or a section does not finish.
"""

from __future__ import annotations

import argparse
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
from importlib import import_module
from itertools import groupby
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NamedTuple

from assemblers import newer_ptxas

Row = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in (".", "kernels", "scripts")]


class Section(NamedTuple):
    """A function of a module, called in a process with these variables in its environment."""

    module: str
    function: str
    environment: dict[str, str] | None = None


PTXAS = {"TRITON_PTXAS_PATH": ""}  # the path is that of --ptxas

# In the order in which they run.
SECTIONS = {
    "environment": Section("gpu_models", "environment"),
    "smoke": Section("gpu_smoke", "smoke"),
    "ceilings": Section("gpu_models", "ceilings"),
    "fused": Section("gpu_kernels", "fused"),
    "numerics": Section("gpu_kernels", "numerics"),
    "numerics-ptxas": Section("gpu_kernels", "numerics", PTXAS),
    "dtypes": Section("gpu_kernels", "dtypes"),
    "steps": Section("gpu_speed", "steps"),
    "attention": Section("gpu_speed", "attention"),
    "decode": Section("gpu_models", "decode"),
    "training": Section("gpu_training", "training"),
    "steps-no-overlap": Section("gpu_speed", "steps", {"MQA_KERNELS_PDL": "0"}),
    "steps-ptxas": Section("gpu_speed", "steps", PTXAS),
    "attention-ptxas": Section("gpu_speed", "attention", PTXAS),
    "parity": Section("gpu_models", "parity"),
    "prefill": Section("gpu_models", "prefill"),
    "profile": Section("gpu_models", "profile"),
    "autotune": Section("gpu_autotune", "autotune"),
}
ON_REQUEST = {"autotune"}  # with --only
# They only check, and most of their time compile on one core each. The others measure, alone.
SIDE_BY_SIDE = {"fused", "numerics", "numerics-ptxas", "dtypes"}
# The ceiling that limits a rate.
LIMITS = {"gb_per_s": "copy_gb_per_s", "tflops": "matmul_tflops"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(), help="folder of gpu_report.json")
    parser.add_argument(
        "--only", type=section_names, metavar="A,B",
        default=[name for name in SECTIONS if name not in ON_REQUEST],
        help=f"run these sections only; there are {', '.join(SECTIONS)}",
    )  # fmt: skip
    parser.add_argument(
        "--ptxas", type=Path, default=newer_ptxas(),
        help="another assembler than Triton's, for the sections that compare them "
        "(default: %(default)s, the newest here)",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=float, default=300, metavar="SECONDS",
        help="a section that takes longer is stopped (default: %(default)s)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    sections: dict[str, Row] = {}
    report: Row = {
        "command": shlex.join(["python3", "scripts/gpu_report.py", *(arguments or sys.argv[1:])]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "sections": sections,
    }
    path = options.out / "gpu_report.json"
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        write(path, report)
    except OSError as error:
        parser.error(f"--out: {path} cannot be written: {error.strerror}")

    for names in batches(options.only):
        print("==", *names, flush=True)
        begin = time.monotonic()
        sections |= {name: {"rows": [], "error": "interrupted", "seconds": 0.0} for name in names}
        batch = {name: with_ptxas(SECTIONS[name], options.ptxas) for name in names}
        for name, row in run_sections(batch, options.limit):
            section = sections[name]
            if "ended" in row:
                section["error"] = row["ended"]
            else:
                section["rows"].append(row | share_of_limit(row, sections))
                of = f"{name:16}" if len(names) > 1 else ""
                print(of + line_of(section["rows"][-1]), flush=True)
            section["seconds"] = round(time.monotonic() - begin, 1)
            write(path, report)
    failed = failures(sections)
    print(f"== {len(failed)} failed" if failed else "== all passed", *failed, sep="\n")
    print(f"written to {path}")
    return 1 if failed else 0


def section_names(text: str) -> list[str]:
    """The value of --only, in the order in which sections run."""
    names = text.split(",")
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{', '.join(unknown)}: the sections are {', '.join(SECTIONS)}"
        )
    return [name for name in SECTIONS if name in names]


def write(path: Path, report: Row) -> None:
    """Replace the file in one step, so that a reader never sees half of one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(path)


def with_ptxas(section: Section, ptxas: Path | None) -> Section | None:
    """A section with the path of the other assembler, if it needs one; None if there is none."""
    if section.environment != PTXAS:
        return section
    path = {"TRITON_PTXAS_PATH": str(ptxas)}
    return section._replace(environment=path) if ptxas else None


def batches(names: list[str]) -> Iterator[list[str]]:
    """The sections in their order, those together that may run at the same time."""
    for together, group in groupby(names, SIDE_BY_SIDE.__contains__):
        some = list(group)
        yield from [some] if together else ([name] for name in some)


def run_sections(batch: dict[str, Section | None], limit: float) -> Iterator[tuple[str, Row]]:
    """Names and rows of sections, each in a process of its own, all at the same time.

    A section's last row is {"ended": None, or why it did not finish}. None is one that cannot run.
    """
    context = multiprocessing.get_context("spawn")
    running: dict[Connection, tuple[str, SpawnProcess]] = {}
    try:
        for name, section in batch.items():
            if section is None:
                yield name, {"skipped": "there is no newer ptxas than Triton's; --ptxas names one"}
                yield name, {"ended": None}
                continue
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=serve, args=(section, theirs))
            process.start()
            theirs.close()  # so that the process's death ends our pipe
            running[ours] = name, process
        end = time.monotonic() + limit
        while running:
            ready = wait(list(running), max(0.0, end - time.monotonic()))
            for pipe in ready or list(running):
                assert isinstance(pipe, Connection)
                name, process = running[pipe]
                row: Row = {"ended": f"stopped after {limit:g} s"}
                if ready:
                    try:
                        row = pipe.recv()
                    except EOFError:
                        process.join()
                        row = {"ended": f"its process died: exit code {process.exitcode}"}
                if "ended" in row:
                    stop(process)
                    del running[pipe]
                yield name, row
    finally:
        for _, process in running.values():
            stop(process)


def stop(process: SpawnProcess) -> None:
    """End a section's process and whatever it has started, such as a compiler."""
    assert process.pid is not None
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def serve(section: Section, pipe: Connection) -> None:
    """A section's process: call its function."""
    os.setpgrp()
    os.environ.update(section.environment or {})  # before Triton is imported
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
        # The interpreter computes with the NaN that the checks put where kernels must not look.
        warnings.filterwarnings("ignore", "invalid value encountered", RuntimeWarning)
    try:
        for row in getattr(import_module(section.module), section.function)(device):
            pipe.send(row)
        pipe.send({"ended": None})
    except Exception:
        pipe.send({"ended": traceback.format_exc()})


def share_of_limit(row: Row, sections: dict[str, Row]) -> Row:
    """{"of_limit": rate / ceiling} for a row with a rate, once the ceilings are measured."""
    for ceilings in sections.get("ceilings", {}).get("rows", ()):
        for rate, limit in LIMITS.items():
            if rate in row:
                return {"of_limit": row[rate] / ceilings[limit]}
    return {}


def line_of(row: Row) -> str:
    """A row on one line: whether it passed, then its numbers and words; lists stay in the JSON."""
    words = ["pass" if row.get("passed") else "FAIL" if "passed" in row else "    "]
    for key, value in row.items():
        if key == "error":
            words.append(last_line(value))
        elif isinstance(value, float):
            words.append(f"{key} {value:.4g}")
        elif isinstance(value, int | str) and key != "passed":
            words.append(f"{key} {value}")
    return "  ".join(words)


def last_line(error: str) -> str:
    """What a traceback ends with."""
    return error.strip().splitlines()[-1][:300]


def failures(sections: dict[str, Row]) -> list[str]:
    """A line for each section that did not finish and each check that failed."""
    found = []
    for name, section in sections.items():
        if section["error"]:
            found.append(f"{name}: {last_line(section['error'])}")
        found += [
            f"{name}: {line_of(r).removeprefix('FAIL  ')}"
            for r in section["rows"]
            if r.get("passed") is False
        ]
    return found


if __name__ == "__main__":
    sys.exit(main())
