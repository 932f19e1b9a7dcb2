"""Compile every shipped kernel configuration for every supported GPU; no GPU is needed.

    make check-kernels      # with the installed Triton, then with the oldest supported one
    python scripts/check_kernels.py --arch 90 --dtype bfloat16 --head-dim 128

Calls the public functions on CPU tensors and has Triton compile each launch instead of running it,
so tiles, types, divisibility and constants are those of the real launch. Prints each kernel's
shared memory, registers, spills, tensor-core instructions and resident blocks. Fails where a
kernel does not compile, spills, exceeds shared memory, multiplies 16-bit numbers without tensor
cores, serializes their instructions, or (programmatic dependent launch) touches its predecessor's
output before it waits.
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
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

if __name__ == "__main__" and os.environ.pop("TRITON_INTERPRET", "0") == "1":
    print("TRITON_INTERPRET is set: ignored here", file=sys.stderr)

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from mqa_kernels import (
    attention,
    int8_linear,
    linear_residual,
    norm_argmax,
    norm_linear,
    norm_lm_head,
    norm_qkv_to_cache,
)


class GPU(NamedTuple):
    """Limits of a GPU (CUDA programming guide, data sheets)."""

    multiprocessors: int
    shared: int  # bytes per block


GPUS = {80: GPU(108, 166_912), 90: GPU(132, 232_448), 100: GPU(148, 232_448)}
# Of a multiprocessor; the same on all of them.
REGISTERS, WARPS, BLOCKS = 65_536, 64, 32
RESERVED = 1024  # bytes of shared memory per block that the system takes
TENSOR_MEMORY = 512  # columns, on sm_100
DTYPES = ("bfloat16", "float16", "float32")
CALLS = ("train", "ragged", "dropout", "decode", "fused", "fused_int8")
PADDED_ROWS = (1, 8, 16)  # of a fused step
LAYER_ROWS = {"bfloat16": (16, 32, 64), "float16": (16, 32, 64), "float32": (16,)}  # int8_linear
WITHOUT_PRODUCT = ("combine_kernel", "choose_kernel")
# Arguments that no kernel writes. Only these may be read before griddepcontrol.wait.
CONSTANT = {"norm_weight_ptr", "norm_bias_ptr", "weight_ptr", "scale_ptr", "bias_ptr"}
# PTX: accesses to global memory, and an instruction's name, target and sources.
READS = r"ld\.(\w+\.)*global|cp\.async|cp\.bulk"
WRITES = r"\b(st|red|atom)\.(\w+\.)*global"
INSTRUCTION = re.compile(r"(?:@!?%p\d+\s+)?([a-z]\S*)\s+(\{[^}]*\}|\[[^]]*\]|[^,[]+)(.*)")


class Case(NamedTuple):
    """What to compile for one GPU: a call of `attention`, or a fused step (C = H D)."""

    arch: int
    dtype: str
    D: int
    G: int
    call: str
    H: int = 32


class Usage(NamedTuple):
    """One compiled kernel."""

    kernel: str
    tiles: str
    shared: int = 0  # bytes
    tensor_memory: int = 0  # columns
    registers: int = 0  # per thread
    spilled: int = 0  # bytes per thread
    blocks: int = 0  # resident on a multiprocessor
    tensor_cores: str = ""  # instructions
    serialized: bool = False  # wgmma instructions wait for each other
    race: str = ""  # with the preceding kernel
    error: str = ""


def absent_gpu(arch: int) -> SimpleNamespace:
    """The part of Triton's driver that compiling needs."""
    return SimpleNamespace(
        get_current_device=lambda: arch,  # Triton caches compiled kernels by device number
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=GPUS, default=list(GPUS))
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
        found = list(tqdm(pool.map(compile_case, cases), total=len(cases), unit="call"))
    rows = [(case, usage) for case, usages in zip(cases, found, strict=True) for usage in usages]
    print_table(rows)
    if options.json:
        write_json(options.json, rows)
    problems = sum(bool(verdict(case, usage)) for case, usage in rows)
    print(f"Triton {triton.__version__}: {len(rows)} kernels, {problems} with a problem")
    return 1 if problems else 0


def all_cases() -> Iterator[Case]:
    """Common head dims on every GPU; one of each rarer kind on one."""
    for arch in GPUS:
        for dtype in ("bfloat16", "float32"):
            for D in (64, 80, 128, 256):
                yield Case(arch, dtype, D, 1, "train")
                yield Case(arch, dtype, D, 1, "decode")
            yield Case(arch, dtype, 128, 32, "decode")
        for D in (64, 128, 256):
            yield Case(arch, "bfloat16", D, 1, "ragged")
            yield Case(arch, "bfloat16", D, 1, "dropout")
        for D in (128, 256):
            yield Case(arch, "float32", D, 1, "dropout")
        for call in ("fused", "fused_int8"):
            for dtype in ("bfloat16", "float32"):
                for H in (16, 32):  # StarCoderBase-1B and 7B
                    yield Case(arch, dtype, 128, 1, call, H)
    for D in (16, 32, 96):
        yield Case(90, "bfloat16", D, 1, "train")
        yield Case(90, "bfloat16", D, 1, "decode")
    yield Case(90, "bfloat16", 128, 32, "train")
    # Each number of heads is a kernel of its own; these include the official models'.
    for H, G in ((16, 1), (22, 1), (48, 1), (32, 4)):
        yield Case(90, "bfloat16", 128, G, "train", H)
    for H in (12, 16):
        yield Case(90, "bfloat16", 64, 1, "train", H)
    for H, D in ((12, 64), (22, 128), (48, 128)):  # fused steps of the other official shapes
        yield Case(90, "bfloat16", D, 1, "fused", H)
        yield Case(90, "bfloat16", D, 1, "fused_int8", H)
        yield Case(90, "float32", D, 1, "fused", H)
    for call in ("fused", "fused_int8", "train", "decode"):
        yield Case(90, "float16", 128, 1, call)


def compile_case(case: Case) -> list[Usage]:
    """Compile every kernel that the call launches, to machine code."""
    usages = []
    compile_launch = triton.JITFunction.run

    def record(kernel, *arguments, grid, warmup, **options):  # type: ignore[no-untyped-def]
        tiles = "{M}x{N} ".format(**options) if "M" in options else ""
        if "ROWS" in options:
            tiles = "{ROWS}x{BLOCK_N}x{BLOCK_K} of {K} ".format(**options)
        settings = {"num_warps": 4, "num_stages": options.get("STAGES", 3)} | options
        tiles += "{num_warps} warps {num_stages} stages".format(**settings)
        try:
            compiled = compile_launch(kernel, *arguments, grid=grid, warmup=True, **options)
            usage = examine(case, kernel.__name__, tiles, compiled)
        except Exception as error:  # the compiler raises many kinds
            usage = Usage(kernel.__name__, tiles, error=f"{type(error).__name__}: {error}")
        usages.append(usage)

    count = GPUS[case.arch].multiprocessors
    driver.set_active(absent_gpu(case.arch))
    with (
        patch.object(triton.JITFunction, "run", record),
        patch("mqa_kernels.launch.runs_on", return_value=True),
        patch("mqa_kernels.launch.architecture", return_value=case.arch),
        patch("mqa_kernels.forward.multiprocessors", return_value=count),
        patch("mqa_kernels.backward.multiprocessors", return_value=count),
    ):
        (call_fused if case.call.startswith("fused") else call_attention)(case)
    return usages


def call_attention(case: Case) -> None:
    """Call `attention` on uninitialised memory."""
    dtype = getattr(torch, case.dtype)
    if case.call == "decode":  # one row whose keys are split, so that combine_kernel runs too
        q, k, v = projection(1, 1, 16_384, case, dtype)
        attention(q, k, v, torch.zeros(1, dtype=torch.int64))
        return
    if case.call == "train":
        q, k, v = (x.requires_grad_() for x in projection(2, 2048, 2048, case, dtype))
        out = attention(q, k, v)
    else:  # per-row lengths, and a T that 16 does not divide
        q, k, v = (x.requires_grad_() for x in projection(2, 2047, 2047, case, dtype))
        rows = torch.zeros(2, dtype=torch.int64)
        dropout_p = 0.1 if case.call == "dropout" else 0.0
        out = attention(q, k, v, rows, dropout_p=dropout_p, lengths=rows, left_padding=rows)
    torch.autograd.grad(out, (q, k, v), torch.empty_like(out))


def call_fused(case: Case) -> None:
    """Call everything that a decode step launches besides attention, for each padded row count."""
    D, G, C, V = case.D, case.G, case.H * case.D, 49_152
    dtype, int8 = getattr(torch, case.dtype), case.call == "fused_int8"
    gelu = "gelu" if case.H >= 32 else "gelu_tanh"  # as in the official models

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def weight(N: int, K: int) -> Tensor:
        return torch.empty(N, K, dtype=torch.int8 if int8 else dtype)

    def scale(N: int) -> Tensor | None:
        return torch.empty(N) if int8 else None

    norm = empty(C), empty(C), 1e-5
    for R in PADDED_ROWS:
        x, wide, kv = empty(R, C), empty(R, 4 * C), 2 * G * D
        lengths, slots = torch.zeros(R, dtype=torch.int64), empty(R, 8192, G, 2 * D)
        qkv = weight(C + kv, C), empty(C + kv)
        norm_qkv_to_cache(x, *norm, *qkv, slots, lengths, scale(C + kv))
        linear_residual(x, weight(C, C), empty(C), x, scale(C))
        norm_linear(x, *norm, weight(4 * C, C), empty(4 * C), gelu, scale(4 * C))
        linear_residual(wide, weight(C, 4 * C), empty(C), x, scale(C))
        norm_lm_head(x, *norm, weight(V, C), scale(V))
        norm_argmax(x, *norm, weight(V, C), scale(V))
    for R in LAYER_ROWS[case.dtype] if int8 else ():
        for K in (C, 4 * C):
            int8_linear(empty(R, K), weight(C, K), torch.empty(C), empty(C))


def projection(
    B: int, T: int, S: int, case: Case, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, T, H, D), k and v (B, S, G, D): views into wider rows, as in the model."""
    H, G, D = case.H, case.G, case.D
    q = torch.empty(B, T, H + 2 * G, D, dtype=dtype)[:, :, :H]
    k, v = torch.empty(B, S, G, 2 * D, dtype=dtype).chunk(2, dim=-1)
    return q, k, v


def examine(case: Case, kernel: str, tiles: str, compiled: triton.compiler.CompiledKernel) -> Usage:
    """A compiled kernel's resources and faults."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, spilled = resources(report)
    instructions = re.findall(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", compiled.asm["ptx"])
    shared, tensor_memory = compiled.metadata.shared, compiled.metadata.tmem_size or 0
    warps = compiled.metadata.num_warps
    return Usage(
        kernel,
        tiles,
        shared=shared,
        tensor_memory=tensor_memory,
        registers=registers,
        spilled=spilled,
        blocks=blocks_that_fit(GPUS[case.arch], warps, registers, shared, tensor_memory),
        tensor_cores=", ".join(sorted(set(instructions))),
        serialized="wgmma.mma_async" in instructions and is_serialized(compiled.asm["ptx"]),
        race=(
            race_with_predecessor(compiled.asm["ptx"], pointers_of(compiled.src.signature))
            if compiled.metadata.launch_pdl
            else ""
        ),
    )


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


def race_with_predecessor(ptx: str, pointers: dict[int, str]) -> str:
    """What a kernel wrongly does before griddepcontrol.wait; empty if nothing.

    Args:
        pointers: names of its pointer arguments by their parameter numbers in PTX.
    """
    before, wait, _ = ptx.partition("griddepcontrol.wait")
    if not wait:
        return "does not wait for the kernel before"
    if re.search(WRITES, before):
        return "writes before it waits"
    read = sources_of_loads(before, pointers) - CONSTANT
    return f"reads {', '.join(sorted(read))} before it waits" if read else ""


def pointers_of(signature: dict[str, str]) -> dict[int, str]:
    """Names of a kernel's pointer arguments by their parameter numbers in PTX (no constexprs)."""
    passed = [(name, kind) for name, kind in signature.items() if kind != "constexpr"]
    return {number: name for number, (name, kind) in enumerate(passed) if kind.startswith("*")}


def sources_of_loads(ptx: str, pointers: dict[int, str]) -> set[str]:
    """The pointer arguments that the addresses of all loads are computed from.

    Includes "an unknown address" where an address was itself loaded from memory.
    """
    sources: dict[str, set[str]] = {}  # by register

    def found_in(text: str) -> set[str]:
        numbers = [int(number) for number in re.findall(r"_param_(\d+)\b", text)]
        found = {pointers[number] for number in numbers if number in pointers}
        return found.union(*(sources.get(register, ()) for register in registers(text)))

    read = set()
    for line in ptx.splitlines():
        for statement in re.sub(r"//.*", "", line).split(";"):
            match = INSTRUCTION.match(statement.strip())
            if match is None:
                continue
            name, target, rest = match.groups()
            if re.match(READS, name):
                # A copy has two addresses and reads the second.
                for address in re.findall(r"\[([^]]*)\]", target + rest)[-1:]:
                    read |= found_in(address) or {"an unknown address"}
            else:
                for register in registers(target):
                    sources.setdefault(register, set()).update(found_in(rest))
    return read


def registers(ptx: str) -> list[str]:
    return re.findall(r"%[a-z]+\d+", ptx)


def blocks_that_fit(gpu: GPU, warps: int, registers: int, shared: int, tensor_memory: int) -> int:
    """Blocks of this many warps that are resident on a multiprocessor (CUDA programming guide).

    Registers are allocated to a warp in units of 256, and to four warps at a time.
    """
    per_warp = -(-registers * 32 // 256) * 256
    most = [
        REGISTERS // per_warp // 4 * 4 // warps,
        WARPS // warps,
        BLOCKS,
        (gpu.shared + RESERVED) // (shared + RESERVED),
    ]
    if tensor_memory:
        most.append(TENSOR_MEMORY // tensor_memory)
    return min(most)


def resources(report: str) -> tuple[int, int]:
    """Registers and spilled bytes per thread, from cuobjdump's report."""
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"]


def verdict(case: Case, usage: Usage) -> str:
    """What is wrong with a kernel; empty if nothing."""
    if usage.error:
        return usage.error
    limit = GPUS[case.arch].shared
    problems = []
    if usage.spilled:
        problems.append(f"{usage.spilled} bytes spilled")
    if usage.shared > limit:
        problems.append(f"{usage.shared} bytes of shared memory of {limit}")
    if usage.tensor_memory > TENSOR_MEMORY:
        problems.append(f"{usage.tensor_memory} columns of tensor memory of {TENSOR_MEMORY}")
    has_product = usage.kernel not in WITHOUT_PRODUCT
    if not usage.tensor_cores and case.dtype != "float32" and has_product:
        problems.append("no tensor cores")
    if usage.serialized:
        problems.append("wgmma instructions wait for each other")
    if usage.race:
        problems.append(usage.race)
    return "; ".join(problems)


def print_table(rows: list[tuple[Case, Usage]]) -> None:
    titles = "GPU,dtype,D,H,G,call,kernel,tiles,shared,registers,blocks,tensor cores,"
    table = Table(*titles.split(","))
    for case, usage in rows:
        table.add_row(
            f"sm_{case.arch}", case.dtype, str(case.D), str(case.H), str(case.G), case.call,
            usage.kernel, usage.tiles, f"{usage.shared:,}", str(usage.registers), str(usage.blocks),
            usage.tensor_cores, verdict(case, usage),
        )  # fmt: skip
    Console(width=190).print(table)


def write_json(path: Path, rows: list[tuple[Case, Usage]]) -> None:
    """Write the table, keeping those of other versions of Triton; one line per kernel."""
    old = json.loads(path.read_text()) if path.exists() else {"runs": {}, "kernels": []}
    version = triton.__version__
    words = [word.replace(str(path), path.name) for word in sys.argv[1:]]
    run = {
        "command": shlex.join(["python", "scripts/check_kernels.py", *words]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    head = {
        "question": "What does every kernel need of a GPU, in every configuration that is shipped?",
        "units": "bytes of shared memory and columns of tensor memory per block; registers and "
        "bytes spilled per thread; blocks that fit on a multiprocessor",
        "runs": old["runs"] | {version: run},
    }
    kernels = [row for row in old["kernels"] if row["triton"] != version]
    kernels += [{"triton": version} | case._asdict() | usage._asdict() for case, usage in rows]
    lines = ",\n  ".join(json.dumps(row) for row in kernels)
    text = json.dumps(head, indent=1).removesuffix("\n}")
    path.write_text(f'{text},\n "kernels": [\n  {lines}\n ]\n}}\n')


if __name__ == "__main__":
    sys.exit(main())
