"""How do the programs of every launch fill an H200, in waves and in simulated time?

    PYTHONPATH=kernels:scripts python -m benchmarks.gpu.waves
    PYTHONPATH=kernels:scripts python -m benchmarks.gpu.waves --shape starcoderbase-7b

Needs no GPU. Compiling takes some ten minutes, once.

Calls the public functions as prefill, training and a decode step do, compiles each launch instead
of running it (as check_kernels.py), and simulates how its programs are scheduled (schedule.py):
with equal steps where arithmetic is the limit (prefill and training), and in decoding with the
bandwidth of memory and of the L2 cache, and the latency of loads. What lies between two launches is
not simulated.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

if __name__ == "__main__" and os.environ.pop("TRITON_INTERPRET", "0") == "1":
    print("TRITON_INTERPRET is set: ignored here", file=sys.stderr)

import torch
import triton
from check_kernels import blocks_that_fit, registers_and_spills
from kernel_cases import absent_gpu
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]
from triton.runtime import driver

from benchmarks.gpu.schedule import (
    BANDWIDTH,
    EXPONENTIALS,
    LATENCY,
    MATMUL,
    MULTIPROCESSORS,
    combine_seconds,
    dkv_steps,
    efficiency,
    forward_steps,
    simulate,
    step_rate,
    waves,
)
from benchmarks.measure import make_parser, refuse_bad_input, result_path, write_result
from mqa_gpt.config import ACTIVATIONS, GPTConfig
from mqa_kernels import (
    attention,
    linear_residual,
    norm_argmax,
    norm_linear,
    norm_qkv_to_cache,
)
from mqa_kernels.forward import forward_kernel

KERNEL = type(forward_kernel)  # Triton's class
ARCH = 90
DTYPE = torch.bfloat16
# The official shapes; starcoder and granite-20b-code-base-8k have the launches of starcoderbase.
SHAPES = (
    "tiny_starcoder_py",
    "gpt_bigcode-santacoder",
    "starcoderbase-1b",
    "starcoderbase-3b",
    "starcoderbase-7b",
    "starcoderbase",
)
PHASES = ("prefill", "training", "decode")
PROMPTS = (1024, 8192)  # tokens of one prompt
TRAINING = ((2, 8192), (4, 4096), (8, 2048), (32, 512))  # rows and tokens of a training step
BATCHES = (1, 8, 16, 32, 64)
CONTEXTS = (1024, 8192)  # tokens of each row in a decode step, which the cache is made for
NAMES = {
    "forward_kernel": "forward",
    "dq_kernel": "dQ",
    "dkv_kernel": "dK, dV",
    "combine_kernel": "combine",
}
PRODUCTS = ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj", "lm_head", "argmax")


class Resources(NamedTuple):
    """What the compiler made of a kernel."""

    registers: int  # per thread
    shared: int  # bytes per block
    blocks: int  # that fit on a multiprocessor


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, ...]
    options: dict[str, Any]
    resources: Resources

    @property
    def programs(self) -> int:
        return math.prod(self.grid)

    @property
    def places(self) -> int:
        return MULTIPROCESSORS * self.resources.blocks


def launches_of(call: Callable[[], object]) -> list[Launch]:
    """What a call launches on an H200, compiled."""
    found = []
    compile_launch = KERNEL.run

    def record(kernel, *arguments, grid, warmup, **options):  # type: ignore[no-untyped-def]
        compiled = compile_launch(kernel, *arguments, grid=grid, warmup=True, **options)
        found.append(Launch(kernel.__name__, grid, options, resources(compiled)))

    driver.set_active(absent_gpu(ARCH))
    with ExitStack() as stack:
        stack.enter_context(patch.object(KERNEL, "run", record))
        for name, value in {
            "launch.runs_on": True,
            "launch.architecture": ARCH,
            "forward.multiprocessors": MULTIPROCESSORS,
            "backward.multiprocessors": MULTIPROCESSORS,
            "fused_ops.multiprocessors": MULTIPROCESSORS,
        }.items():
            stack.enter_context(patch(f"mqa_kernels.{name}", return_value=value))
        call()
    return found


def resources(compiled: Any) -> Resources:
    """Of a kernel that Triton compiled."""
    if compiled.hash not in _resources:
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            report = subprocess.check_output([tool, "-res-usage", file.name], text=True)
        registers, _ = registers_and_spills(report)
        shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
        blocks = blocks_that_fit(ARCH, warps, registers, shared, tensor_memory=0)
        _resources[compiled.hash] = Resources(registers, shared, blocks)
    return _resources[compiled.hash]


_resources: dict[str, Resources] = {}


# --------------------------------------------------------------------------------------- launches


def projection(config: GPTConfig, B: int, T: int) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, T, H, D), k and v (B, T, G, D): parts of c_attn's output."""
    H, G, D = config.n_head, config.n_kv_head, config.head_dim
    qkv = torch.empty(B, T, H + 2 * G, D, dtype=DTYPE)
    return qkv[:, :, :H], qkv[:, :, H : H + G], qkv[:, :, H + G :]


def prefill(config: GPTConfig) -> Iterator[dict[str, Any]]:
    """Attention of one prompt."""
    for T in sorted({min(T, config.n_positions) for T in PROMPTS}):
        found = launches_of(partial(attention, *projection(config, 1, T)))
        yield from attention_rows(config, found, 1, T)


def training(config: GPTConfig) -> Iterator[dict[str, Any]]:
    """Attention of a training step, forward and backward."""
    for B, T in TRAINING:
        if config.n_positions < T:
            continue

        def step(B: int = B, T: int = T) -> None:
            q, k, v = (x.requires_grad_() for x in projection(config, B, T))
            out = attention(q, k, v)
            torch.autograd.grad(out, (q, k, v), torch.empty_like(out))

        yield from attention_rows(config, launches_of(step), B, T)


def attention_rows(
    config: GPTConfig, launches: list[Launch], B: int, T: int
) -> Iterator[dict[str, Any]]:
    """Launches over T new tokens of B rows, limited by arithmetic.

    A program also loads and stores tiles of its own, which count as the steps that load as much.
    """
    for launch in launches:
        row = {"batch": B, "tokens": T, "part": NAMES[launch.kernel]}
        if launch.kernel == "combine_kernel":
            yield row | described(launch, 1)
            continue
        M, N = launch.options["M"], launch.options["N"]
        shape = config.n_head, config.n_kv_head, M, N
        if launch.kernel == "dkv_kernel":
            splits = launch.grid[0]
            steps = dkv_steps(B, T, *shape, splits)
            stored = 1 if splits == 1 else 2  # dK and dV in 16 or 32 bits
            own = (2 + 2 * stored) * N / (2 * M)
        else:
            splits = (*launch.grid, 1)[2]
            steps = forward_steps([T] * B, T, *shape, splits)
            tiles = 4 if launch.kernel == "dq_kernel" else 2 if splits == 1 else 3  # Q, O, dO, dQ
            own = tiles * M / (2 * N)
        assert len(steps) == launch.programs
        costs = [step + own for step in steps]
        found = {"efficiency": efficiency(costs, launch.places)}
        yield row | described(launch, max(steps)) | found


def decode(config: GPTConfig) -> Iterator[dict[str, Any]]:
    """A decode step: the launches of one layer and of the head."""
    for B in BATCHES:
        for context in CONTEXTS:
            if context <= config.n_positions:
                found = launches_of(partial(attend_cache, config, B, context))
                for part, launch in zip(("attention", "combine"), found, strict=False):
                    case = {"batch": B, "tokens": context, "part": part}
                    yield case | (
                        cache_row(config, launch, B, context)
                        if part == "attention"
                        else combine_row(config, launch, B, found[0].grid[2])
                    )
        for int8 in (False, True):
            launches = launches_of(partial(weights_of_a_step, config, B, int8))
            products = [each for each in launches if each.kernel != "norm_kernel"]
            for part, launch in zip(PRODUCTS, products, strict=True):
                weights = {"weights": "int8" if int8 else "bfloat16"}
                case = {"batch": B, "part": part} | weights
                yield case | (
                    described(launch, 1) if part == "argmax" else weight_row(launch, B, int8)
                )


def attend_cache(config: GPTConfig, B: int, S: int) -> None:
    H, G, D = config.n_head, config.n_kv_head, config.head_dim
    k, v = torch.empty(B, S, G, 2 * D, dtype=DTYPE).chunk(2, dim=-1)
    attention(torch.empty(B, 1, H, D, dtype=DTYPE), k, v, torch.zeros(B, dtype=torch.int64))


def weights_of_a_step(config: GPTConfig, B: int, int8: bool) -> None:
    """Everything but attention that a step of B rows launches in a layer, and in the head."""
    C, F, V = config.n_embd, config.inner_size, config.vocab_size
    G, D = config.n_kv_head, config.head_dim

    def weight(N: int, K: int) -> tuple[Tensor, Tensor]:
        return torch.empty(N, K, dtype=torch.int8 if int8 else DTYPE), bias(N)

    def bias(N: int) -> Tensor:
        return torch.empty(N, dtype=DTYPE)

    def scale(N: int) -> Tensor | None:
        return torch.empty(N) if int8 else None

    x, wide = torch.empty(B, C, dtype=DTYPE), torch.empty(B, F, dtype=DTYPE)
    norm, kv = (bias(C), bias(C), 1e-5), 2 * G * D
    slots, lengths = torch.empty(B, 1024, G, 2 * D, dtype=DTYPE), torch.zeros(B, dtype=torch.int64)
    activation = ACTIVATIONS[config.activation_function]
    norm_qkv_to_cache(x, *norm, *weight(C + kv, C), slots, lengths, scale(C + kv))
    linear_residual(x, *weight(C, C), x, scale(C))
    norm_linear(x, *norm, *weight(F, C), activation, scale(F))
    linear_residual(wide, *weight(C, F), x, scale(C))
    norm_argmax(x, *norm, weight(V, C)[0], scale(V))


def cache_row(config: GPTConfig, launch: Launch, B: int, context: int) -> dict[str, Any]:
    """Attention of one new token per row, limited by reading keys and values.

    "by_splits" are the seconds, with the combination, for other numbers of splits.
    """
    H, D, splits = config.n_head, config.head_dim, launch.grid[2]
    M, N, stages = (launch.options[name] for name in ("M", "N", "num_stages"))
    shape = [context] * B, 1, H, config.n_kv_head, M, N
    size = 2 * N * D * DTYPE.itemsize
    compute = 4 * M * N * D / MATMUL + M * N / EXPONENTIALS

    def seconds(splits: int) -> float:
        steps = forward_steps(*shape, splits)
        reading = read(launch, steps, size, stages, compute)["seconds"]
        return reading + combine_seconds(B * H, splits, D)

    steps = forward_steps(*shape, splits)
    assert len(steps) == launch.programs
    found = described(launch, max(steps)) | read(launch, steps, size, stages, compute)
    powers = [2**power for power in range(8) if 2**power <= context // N]
    return found | {
        "splits": splits,
        "by_splits": {count: seconds(count) for count in sorted({*powers, splits})},
    }


def combine_row(config: GPTConfig, launch: Launch, B: int, splits: int) -> dict[str, Any]:
    seconds = combine_seconds(B * config.n_head, splits, config.head_dim)
    return described(launch, 1) | {"seconds": seconds}


def weight_row(launch: Launch, B: int, int8: bool) -> dict[str, Any]:
    """A product of B rows, limited by reading the weights, or by rows of x from the L2 cache, which
    every program reads."""
    options = launch.options
    columns = options["SPLIT_K"] * options["BLOCK_K"]
    steps = options["K"] / columns  # columns beyond K are not read
    size = columns * options["BLOCK_N"] * (1 if int8 else DTYPE.itemsize)
    x = columns * B * DTYPE.itemsize
    found = read(launch, [steps] * launch.programs, size, options["STAGES"], cached_bytes=x)
    return described(launch, math.ceil(steps)) | found


def read(
    launch: Launch, steps: Sequence[float], step_bytes: int, stages: int,
    compute: float = 0.0, cached_bytes: float = 0.0,
) -> dict[str, Any]:  # fmt: skip
    """Simulated seconds, and the share of the bandwidth."""
    ahead = max(1, min(stages - 1, math.ceil(max(steps))))
    rate = step_rate(step_bytes, ahead, compute, cached_bytes)
    seconds = simulate(steps, launch.places, rate)
    return {
        "seconds": seconds,
        "efficiency": sum(steps) * step_bytes / BANDWIDTH / seconds,
    }


def described(launch: Launch, steps: int) -> dict[str, Any]:
    """What is known of a launch without a simulation."""
    options = launch.options
    if "M" in options:
        tiles = "{M}x{N}".format(**options)
    elif "ROWS" in options:
        tiles = "{ROWS}x{BLOCK_N}x{BLOCK_K}".format(**options)
    else:
        tiles = ""
    settings = {"num_warps": 4, "num_stages": options.get("STAGES", 3)} | options
    count, last = waves(launch.programs, launch.places)
    return {
        "kernel": launch.kernel,
        "tiles": f"{tiles} {{num_warps}} warps {{num_stages}} stages".format(**settings).strip(),
        "grid": launch.grid,
        **launch.resources._asdict(),
        "waves": count,
        "last_wave": last,
        "steps": steps,
    }


# ----------------------------------------------------------------------------------------- report


def rows_of(shape: str, phase: str) -> list[dict[str, Any]]:
    config = GPTConfig.preset(shape)
    steps = {"prefill": prefill, "training": training, "decode": decode}[phase]
    return [{"shape": shape, "phase": phase} | row for row in steps(config)]


def print_rows(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        case = f"{row['shape']} {row['phase']} {row['batch']}"
        case += f" x {row['tokens']}" if "tokens" in row else f" {row['weights']}"
        what = f"{row['tiles']}, {'x'.join(map(str, row['grid']))}"
        fits = f"{row['registers']} registers, {row['shared']} bytes, {row['blocks']} blocks"
        full = f"{row['waves']} waves, the last {row['last_wave']:.2f}"
        found = []
        if "efficiency" in row:
            found.append(f"efficiency {row['efficiency']:.2f}")
        if "seconds" in row:
            found.append(f"{1e6 * row['seconds']:.2f} us")
        print("; ".join([f"{case} {row['part']}: {what}", fits, full, *found]))


@refuse_bad_input
def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "kernel_waves.json")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="NAME")
    parser.add_argument("--phase", nargs="+", choices=PHASES, default=list(PHASES))
    options = parser.parse_args(arguments)
    output = result_path(options.output, "kernel_waves.json")
    cases = [(shape, phase) for phase in options.phase for shape in options.shape]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = list(tqdm(pool.map(rows_of, *zip(*cases, strict=True)), total=len(cases)))
    rows = [row for each in found for row in each]
    print_rows(rows)
    gpu = {
        "name": "H200, simulated",
        "multiprocessors": MULTIPROCESSORS,
        "bytes_per_second": BANDWIDTH,
        "latency_seconds": LATENCY,
    }
    return write_result(output, __file__, __doc__, options, rows, gpu=gpu)


if __name__ == "__main__":
    sys.exit(main())
