"""Compile every shipped kernel configuration for every supported GPU; no GPU is needed.

    make check-kernels
    PYTHONPATH=kernels python scripts/check_kernels.py --arch 90 --dtype bfloat16

Prints shared memory, registers, spills and tensor-core instructions of each, and fails where a
kernel does not compile, spills registers, does not fit into shared memory, or runs a 16-bit product
without tensor cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

if os.environ.pop("TRITON_INTERPRET", "0") == "1":
    print("TRITON_INTERPRET is set: ignored here", file=sys.stderr)

import torch
import triton
from rich.console import Console
from rich.table import Table
from tqdm import tqdm  # type: ignore[import-untyped]
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mqa_kernels import tuning
from mqa_kernels.backward import dkv_kernel, dq_kernel
from mqa_kernels.forward import combine_kernel, forward_kernel

# Bytes of shared memory that one block may have (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
HEAD_DIMS = (64, 80, 128, 256)
HEADS = 32  # R, in all of them
KERNELS = ("prefill", "dropout", "decode", "combine", "dq", "dkv")


class Case(NamedTuple):
    """One kernel in one configuration for one GPU."""

    arch: int
    dtype: str
    head_dim: int
    kernel: str


class Usage(NamedTuple):
    """What the compiler made of a case."""

    tiles: str
    shared: int
    registers: int
    spilled: int
    tensor_cores: str
    problem: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED_LIMIT, default=[80, 90, 100])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    parser.add_argument("--head-dim", type=int, nargs="+", default=list(HEAD_DIMS))
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--json", type=Path, help="also write the table here")
    options = parser.parse_args()

    cases = [
        Case(*values)
        for values in itertools.product(
            options.arch, options.dtype, options.head_dim, options.kernel
        )
    ]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        usages = list(tqdm(pool.map(compile_case, cases), total=len(cases), unit="kernel"))
    print_table(cases, usages)
    if options.json:
        rows = [case._asdict() | usage._asdict() for case, usage in zip(cases, usages, strict=True)]
        options.json.write_text(
            json.dumps({"triton": triton.__version__, "kernels": rows}, indent=2) + "\n"
        )
    problems = sum(bool(usage.problem) for usage in usages)
    print(f"Triton {triton.__version__}: {len(cases)} kernels, {problems} with a problem")
    return 1 if problems else 0


def compile_case(case: Case) -> Usage:
    """Compile one case down to machine code and read off what it needs."""
    function, constants, tiles = configuration(case)
    element = f"*{DTYPES[case.dtype]}"
    types = dict.fromkeys(function.arg_names, "i32")
    types |= {name: element for name in types if name.endswith("_ptr")}
    types |= dict.fromkeys(("lse_ptr", "lses_ptr", "parts_ptr", "delta_ptr"), "*fp32")
    types |= dict.fromkeys(("scale", "scale_log2", "dropout_p"), "fp32")
    types |= {"start_ptr": "*i64", "lengths_ptr": "*i64", "seed_ptr": "*i64"}
    if case.kernel == "decode":
        types["out_ptr"] = "*fp32"
    signature = {
        name: "constexpr" if name in constants else types[name] for name in function.arg_names
    }
    # What the launcher finds in practice: pointers and strides that 16 divides.
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(function.arg_names)
        if name not in constants and (name.endswith("_ptr") or name.startswith("stride_"))
    }
    try:
        compiled = triton.compile(
            ASTSource(function, signature, constants, attributes),
            target=GPUTarget("cuda", case.arch, 32),
            options={"num_warps": tiles.warps, "num_stages": tiles.stages},
        )
    except Exception as error:  # the compiler raises many kinds
        return Usage(tiles_text(tiles), 0, 0, 0, "", f"{type(error).__name__}: {error}")
    shared = compiled.metadata.shared
    registers, spilled = resources(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    found = re.search(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", ptx)
    tensor_cores = found[0] if found else ""
    problems = []
    if spilled:
        problems.append(f"{spilled} bytes spilled")
    if shared > SHARED_LIMIT[case.arch]:
        problems.append(f"{shared} bytes of shared memory of {SHARED_LIMIT[case.arch]}")
    if not tensor_cores and case.dtype != "float32" and case.kernel != "combine":
        problems.append("no tensor cores")
    return Usage(tiles_text(tiles), shared, registers, spilled, tensor_cores, "; ".join(problems))


def configuration(case: Case) -> tuple[triton.JITFunction, dict[str, object], tuning.Tiles]:
    """The kernel, its compile-time constants, and its tiles."""
    D, dtype = case.head_dim, getattr(torch, case.dtype)
    padded = triton.next_power_of_2(D)
    if case.kernel == "combine":
        warps = tuning.combine_warps(D, 64)
        constants = {"D": D, "PADDED_D": padded, "SPLITS": 64, "PADDED_SPLITS": 64}
        return combine_kernel, constants, tuning.Tiles(0, 0, warps, 1)
    dropout = case.kernel == "dropout"
    constants = {"G": 1, "R": HEADS, "D": D, "PADDED_D": padded, "DROPOUT": dropout}
    if case.kernel in ("prefill", "dropout"):
        function, splits = forward_kernel, 1
        tiles = tuning.forward_tiles(dtype, D, HEADS * 2048)
    elif case.kernel == "decode":
        function, splits = forward_kernel, 16
        tiles = tuning.forward_tiles(dtype, D, HEADS)
        constants |= {"B": 1, "T": 1}  # the launcher makes constants of ones
    elif case.kernel == "dq":
        function, splits, tiles = dq_kernel, None, tuning.query_tiles(dtype, D)
    else:
        function, splits, tiles = dkv_kernel, 4, tuning.key_tiles(dtype, D)
    constants |= {"M": tiles.M, "N": tiles.N}
    if splits is not None:
        constants["SPLITS"] = splits
    absent = {"lengths_ptr": None} | ({} if dropout else {"seed_ptr": None})
    absent |= {} if case.kernel == "decode" else {"start_ptr": None}
    return function, constants | absent, tiles


def tiles_text(tiles: tuning.Tiles) -> str:
    return f"{tiles.M}x{tiles.N} {tiles.warps} warps {tiles.stages} stages" if tiles.M else "-"


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes per thread that did not fit into them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"]


def print_table(cases: list[Case], usages: list[Usage]) -> None:
    table = Table("GPU", "dtype", "D", "kernel", "tiles", "shared", "registers", "tensor cores", "")
    for case, usage in zip(cases, usages, strict=True):
        table.add_row(
            f"sm_{case.arch}", case.dtype, str(case.head_dim), case.kernel, usage.tiles,
            f"{usage.shared:,}", str(usage.registers), usage.tensor_cores, usage.problem,
        )  # fmt: skip
    Console(width=150).print(table)


if __name__ == "__main__":
    sys.exit(main())
