"""Check the machine code of every shipped kernel configuration; no GPU is needed.

    make check-kernels      # with two versions of Triton, and with another assembler
    python scripts/check_kernels.py --arch 90 --dtype bfloat16 --head-dim 128
    TRITON_PTXAS_PATH=PATH python scripts/check_kernels.py --arch 90    # PATH: another ptxas

Prints each kernel's shared memory, registers, resident blocks and tensor-core instructions. Fails
where a kernel does not compile, spills in a loop, exceeds shared memory, multiplies 16-bit numbers
without tensor cores, serializes their instructions, overwrites a register that one of them still
reads, or (programmatic dependent launch) touches its predecessor's output before it waits.

Also shown, as it decides about the speed: how many groups of loads a loop leaves in flight where it
waits for the oldest, and how many of its exponentials run while tensor cores multiply.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__" and os.environ.pop("TRITON_INTERPRET", "0") == "1":
    print("TRITON_INTERPRET is set: ignored here", file=sys.stderr)

import triton
from assemblers import ptxas_version
from kernel_cases import CALLS, DTYPES, Case, Launch, all_cases, compile_case
from rich.console import Console
from rich.table import Table
from sass import (
    copies_in_flight,
    exponentials,
    overwritten_operands,
    parameter_names,
    parse,
    race_with_predecessor,
    repeated_spills,
)
from tqdm import tqdm  # type: ignore[import-untyped]
from triton import knobs

# Bytes of shared memory per block, by architecture (CUDA programming guide).
SHARED = {80: 166_912, 90: 232_448, 100: 232_448}
# Of a multiprocessor; the same on all of them.
REGISTERS, WARPS, BLOCKS = 65_536, 64, 32
RESERVED = 1024  # bytes of shared memory per block that the system takes
TENSOR_MEMORY = 512  # columns, on sm_100
WITHOUT_PRODUCT = ("combine_kernel", "choose_kernel", "norm_kernel")


class Usage(NamedTuple):
    """One compiled kernel."""

    kernel: str
    tiles: str
    shared: int = 0  # bytes
    tensor_memory: int = 0  # columns
    registers: int = 0  # per thread
    spilled: int = 0  # bytes per thread
    repeated_spills: int = 0  # loads and stores of them in loops
    blocks: int = 0  # resident on a multiprocessor
    tensor_cores: str = ""  # instructions
    serialized: bool = False  # wgmma instructions wait for each other
    overwritten: str = ""  # an operand of an unfinished wgmma instruction, and by what
    race: str = ""  # with the preceding kernel
    copies_in_flight: int | None = None  # groups of loads that a loop does not wait for
    exponentials: str = ""  # "8 of 32": of those in loops, how many run while products do
    error: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED, default=list(SHARED))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--head-dim", type=int, nargs="+", help="only these")
    parser.add_argument("--call", nargs="+", choices=CALLS, default=list(CALLS))
    parser.add_argument("--json", type=Path, help="also write the table here")
    options = parser.parse_args()

    cases = [
        case
        for case in all_cases()
        if case.arch in options.arch
        and case.dtype in options.dtype
        and case.call in options.call
        and (options.head_dim is None or case.D in options.head_dim)
    ]
    if not cases:
        parser.error("no shipped configuration has this GPU, dtype, head dim and call")
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = list(tqdm(pool.map(check_case, cases), total=len(cases), unit="call"))
    rows = [(case, usage) for case, usages in zip(cases, found, strict=True) for usage in usages]
    print_table(rows)
    if options.json:
        write_json(options.json, rows)
    problems = sum(bool(verdict(case, usage)) for case, usage in rows)
    spills = sum(bool(usage.spilled) for _, usage in rows)
    assembler = ptxas_version(knobs.nvidia.ptxas.path)  # of GPUs before sm_100
    print(
        f"Triton {triton.__version__}, ptxas {assembler}: {len(rows)} kernels, "
        f"{spills} spill, {problems} with a problem"
    )
    return 1 if problems else 0


def check_case(case: Case) -> list[Usage]:
    """What all kernels that a call launches need, and their faults."""
    return [examine(case, launch) for launch in compile_case(case)]


def examine(case: Case, launch: Launch) -> Usage:
    """A compiled kernel's resources and faults."""
    kernel, tiles, compiled = launch
    if isinstance(compiled, Exception):
        return Usage(kernel, tiles, error=f"{type(compiled).__name__}: {compiled}")
    ptx, metadata = compiled.asm["ptx"], compiled.metadata
    resources, sass = disassemble(compiled.asm["cubin"])
    registers, spilled = registers_and_spills(resources)
    code = parse(sass)
    products = re.findall(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", ptx)
    shared, tensor_memory = metadata.shared, metadata.tmem_size or 0
    race, hidden, all_exponentials = "", *exponentials(code)
    if metadata.launch_pdl:
        parameters = parameter_names(compiled.src.signature, case.arch)
        race = race_with_predecessor(code, parameters)
    return Usage(
        kernel,
        tiles,
        shared=shared,
        tensor_memory=tensor_memory,
        registers=registers,
        spilled=spilled,
        repeated_spills=repeated_spills(code),
        blocks=blocks_that_fit(case.arch, metadata.num_warps, registers, shared, tensor_memory),
        tensor_cores=", ".join(sorted(set(products))),
        serialized="wgmma.mma_async" in products and is_serialized(ptx),
        overwritten="; ".join(overwritten_operands(code)[:1]),
        race=race,
        copies_in_flight=copies_in_flight(code),
        exponentials=f"{hidden} of {all_exponentials}" if all_exponentials else "",
    )


def disassemble(cubin: bytes) -> tuple[str, str]:
    """cuobjdump's report of resources, and the machine code."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources, sass = (
            subprocess.run(
                [tool, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-res-usage", "-sass")
        )
    return resources, sass


def is_serialized(ptx: str) -> bool:
    """Whether ptxas makes each wgmma wait for the one before, which it reports only as a remark.

    It does so where it believes that something touches their accumulators in between.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", file.name, "-o", os.devnull]
        remarks = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return "instructions are serialized" in remarks or "warpgroup.wait is injected" in remarks


def blocks_that_fit(arch: int, warps: int, registers: int, shared: int, tensor_memory: int) -> int:
    """Blocks of this many warps that are resident on a multiprocessor (CUDA programming guide).

    Registers are allocated to a warp in units of 256, and to four warps at a time.
    """
    per_warp = -(-registers * 32 // 256) * 256
    most = [
        REGISTERS // per_warp // 4 * 4 // warps,
        WARPS // warps,
        BLOCKS,
        (SHARED[arch] + RESERVED) // (shared + RESERVED),
    ]
    if tensor_memory:
        most.append(TENSOR_MEMORY // tensor_memory)
    return min(most)


def registers_and_spills(report: str) -> tuple[int, int]:
    """Registers and spilled bytes per thread, from cuobjdump's report."""
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"]


def verdict(case: Case, usage: Usage) -> str:
    """What is wrong with a kernel; empty if nothing."""
    if usage.error:
        return usage.error
    limit = SHARED[case.arch]
    problems = []
    if usage.repeated_spills:
        problems.append(f"{usage.spilled} bytes spilled, {usage.repeated_spills} accesses in loops")
    if usage.shared > limit:
        problems.append(f"{usage.shared} bytes of shared memory of {limit}")
    if usage.tensor_memory > TENSOR_MEMORY:
        problems.append(f"{usage.tensor_memory} columns of tensor memory of {TENSOR_MEMORY}")
    has_product = usage.kernel not in WITHOUT_PRODUCT
    if not usage.tensor_cores and case.dtype != "float32" and has_product:
        problems.append("no tensor cores")
    if usage.serialized:
        problems.append("wgmma instructions wait for each other")
    problems += filter(None, (usage.overwritten, usage.race))
    return "; ".join(problems)


def with_spills(usage: Usage) -> str:
    """Registers per thread, and the bytes that are spilled."""
    return f"{usage.registers}{f' + {usage.spilled} bytes' if usage.spilled else ''}"


def in_flight(usage: Usage) -> str:
    """`copies_in_flight`, marked where nothing hides that a loop waits for all of its loads."""
    if usage.copies_in_flight is None:
        return ""
    is_exposed = usage.copies_in_flight == 0 and usage.blocks == 1
    return f"{usage.copies_in_flight}{' !' if is_exposed else ''}"


def print_table(rows: list[tuple[Case, Usage]]) -> None:
    titles = "GPU,dtype,D,H,G,call,kernel,tiles,shared,registers,blocks,tensor cores,in flight,EX2,"
    table = Table(*titles.split(","))
    for case, usage in rows:
        table.add_row(
            f"sm_{case.arch}", case.dtype, str(case.D), str(case.H), str(case.G), case.call,
            usage.kernel, usage.tiles, f"{usage.shared:,}", with_spills(usage), str(usage.blocks),
            usage.tensor_cores, in_flight(usage), usage.exponentials, verdict(case, usage),
        )  # fmt: skip
    Console(width=210).print(table)
    print("registers + bytes: spilled around loops; in a loop it is a problem")
    print("in flight: groups of loads that a loop does not wait for; !: none, and one block fits")
    print("EX2: exponentials in loops that run while tensor cores multiply, of all")


def write_json(path: Path, rows: list[tuple[Case, Usage]]) -> None:
    """Write the table, keeping those of other compilers; one line per kernel."""
    old = json.loads(path.read_text()) if path.exists() else {"runs": {}, "kernels": []}
    version, assembler = triton.__version__, ptxas_version(knobs.nvidia.ptxas.path)
    if "TRITON_PTXAS_PATH" in os.environ:
        version += f" with ptxas {assembler}"
    words = [word.replace(str(path), path.name) for word in sys.argv[1:]]
    run = {
        "command": shlex.join(["python", "scripts/check_kernels.py", *words]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "ptxas": assembler,  # of GPUs before sm_100
    }
    head = {
        "question": "What does every kernel need of a GPU, in every configuration that is shipped?",
        "units": "bytes of shared memory and columns of tensor memory per block; registers and "
        "bytes spilled per thread, and their accesses in loops; blocks that fit on a "
        "multiprocessor; groups of copies that a loop leaves in flight; exponentials in loops, "
        "and how many run while products do",
        "runs": old["runs"] | {version: run},
    }
    kernels = [row for row in old["kernels"] if row["triton"] != version]
    kernels += [{"triton": version} | case._asdict() | usage._asdict() for case, usage in rows]
    lines = ",\n  ".join(json.dumps(row) for row in kernels)
    text = json.dumps(head, indent=1).removesuffix("\n}")
    path.write_text(f'{text},\n "kernels": [\n  {lines}\n ]\n}}\n')


if __name__ == "__main__":
    sys.exit(main())
