"""The most a machine can do: how fast it reads its memory and how fast it multiplies matrices.

`probes` measure it, in turn with what they are the scale for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mqa_gpt.bench.timing import take_turns

PROBE_BYTES = 1 << 30  # more than the caches of a processor hold
CPU_PROBE_SIZE, GPU_PROBE_SIZE = 2048, 8192  # rows and columns of the matrices multiplied

# Passes in one run of a probe. A GPU makes one in a quarter of a millisecond, of which launching
# and waiting would be a visible part.
PASSES = {"cpu": 1, "cuda": 16}


@dataclass(frozen=True)
class Ceilings:
    """The fastest runs on this machine: bytes per second that a sum reads and that a copy reads and
    writes, and operations per second of a matrix product.

    Attributes:
        int8_matmul_tflops: of a product of 8-bit integers; None where it is not measured.
    """

    read_gb_per_s: float
    copy_gb_per_s: float
    matmul_tflops: float
    int8_matmul_tflops: float | None = None

    @property
    def gb_per_s(self) -> float:
        """The faster of reading and copying."""
        return max(self.read_gb_per_s, self.copy_gb_per_s)

    def tflops(self, itemsize: int) -> float:
        """The rate of products whose weights have `itemsize` bytes each."""
        if itemsize == 1 and self.int8_matmul_tflops is not None:
            return self.int8_matmul_tflops
        return self.matmul_tflops


class Probe(NamedTuple):
    """An action that shows what the machine can do.

    Attributes:
        amount: of the probe's unit in one run, which makes the same pass `PASSES` times.
    """

    run: Callable[[], object]
    amount: float


def probes(device: torch.device, dtype: torch.dtype, in_8_bits: bool = False) -> dict[str, Probe]:
    """A probe for each field of `Ceilings`, by its name and in its unit.

    Args:
        in_8_bits: whether to measure products of 8-bit integers too, on a CPU.
    """
    memory = torch.rand(PROBE_BYTES // 4, device=device)
    half = len(memory) // 2
    size = GPU_PROBE_SIZE if device.type == "cuda" else CPU_PROBE_SIZE
    product = product_probe(device, dtype, size)
    if device.type == "cpu" and dtype != torch.float32:  # some multiply 16-bit numbers more slowly
        product = max(product, product_probe(device, torch.float32, size), key=_rate)
    limits = {
        "read_gb_per_s": _probe(device, lambda: memory.sum(), PROBE_BYTES / 1e9),
        "copy_gb_per_s": _probe(
            device, lambda: memory[:half].copy_(memory[half:]), PROBE_BYTES / 1e9
        ),
        "matmul_tflops": product,
    }
    if in_8_bits and device.type == "cpu":
        integers = torch.randint(-127, 128, (size, size), dtype=torch.int8)
        limits["int8_matmul_tflops"] = _probe(
            device, lambda: torch._int_mm(integers, integers.T), 2 * size**3 / 1e12
        )
    return limits


def product_probe(device: torch.device, dtype: torch.dtype, size: int) -> Probe:
    """A product of two matrices of `size` rows and columns, in 10^12 operations."""
    rows = torch.rand(size, size, device=device).to(dtype)
    linear = nn.Linear(size, size, bias=False, device=device, dtype=dtype).requires_grad_(False)
    return _probe(device, lambda: linear(rows), 2 * size**3 / 1e12)


def _probe(device: torch.device, action: Callable[[], Tensor], amount: float) -> Probe:
    passes = PASSES.get(device.type, 1)

    def run() -> None:
        for _ in range(passes):
            action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return Probe(run, passes * amount)


def _rate(probe: Probe) -> float:
    """Of a run, after one to warm up."""
    probe.run()
    begin = time.perf_counter()
    probe.run()
    return probe.amount / (time.perf_counter() - begin)


def reached(limits: Mapping[str, Probe], seconds: Mapping[Any, list[float]]) -> Ceilings:
    """The rates of the probes in their fastest runs, since a slower one is no ceiling."""
    return Ceilings(**{name: probe.amount / min(seconds[name]) for name, probe in limits.items()})


def measure_ceilings(device: torch.device, dtype: torch.dtype, repeats: int) -> Ceilings:
    """The ceilings by themselves, after a warm-up."""
    limits = probes(device, dtype)
    actions = {name: probe.run for name, probe in limits.items()}
    take_turns(actions, 1, "warming up the ceilings")
    return reached(limits, take_turns(actions, repeats, "ceilings"))
