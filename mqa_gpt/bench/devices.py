"""What named GPUs can do at most, from their makers' data sheets.

Rates are of dense matrix products, without the "sparsity" that doubles the figures on the front
pages: bfloat16 and float16 on tensor cores with float32 sums, float32 on ordinary cores (PyTorch's
default; TF32 is faster and less exact). Memory is in the data sheets' GB, taken as 10^9 bytes.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

from mqa_gpt.bench.ceilings import measure_ceilings
from mqa_gpt.machine import available_memory, cpu_name


class Device(NamedTuple):
    """Memory and speed of a device.

    Attributes:
        memory: bytes.
        bandwidth: bytes per second between memory and processor.
        rates: operations per second of matrix products, by dtype; one that is missing is not
            computed by the hardware.
        source: where the figures are from.
        is_measured: whether they are of this machine, and so of one dtype.
    """

    name: str
    memory: float
    bandwidth: float
    rates: dict[torch.dtype, float]
    source: str
    is_measured: bool = False

    def balance(self, dtype: torch.dtype) -> float:
        """Operations it can make for each byte it can move: the ridge of its roofline."""
        return self.rates[dtype] / self.bandwidth

    def least_seconds(self, flops: float, moved: float, dtype: torch.dtype) -> tuple[float, bool]:
        """The time of work at the roofline, and whether memory is what takes it.

        Arithmetic and memory work at the same time, so the slower one decides (Williams et al.
        2009).
        """
        to_compute, to_move = flops / self.rates[dtype], moved / self.bandwidth
        return max(to_compute, to_move), to_move >= to_compute


def _nvidia(
    name: str, gb: float, gb_per_s: float, tflops_16: float, tflops_32: float, source: str
) -> Device:
    rates = {torch.float16: tflops_16 * 1e12, torch.float32: tflops_32 * 1e12}
    if name != "T4":  # Turing's tensor cores have no bfloat16
        rates[torch.bfloat16] = tflops_16 * 1e12
    return Device(name, gb * 1e9, gb_per_s * 1e9, rates, source)


# Words of other variants and of slices of the GPUs below, whose figures differ.
OTHERS = {"Laptop", "NVL", "D", "MIG"}

# By the speed of their memory; of two variants of a GPU the more special name comes first.
DEVICES = [
    _nvidia("L4", 24, 300, 121, 30.3, "NVIDIA L4 datasheet"),
    _nvidia("T4", 16, 320, 65, 8.1, "NVIDIA T4 datasheet"),
    _nvidia("A10G", 24, 600, 70, 35, "AWS, EC2 G5 instances"),
    _nvidia("L40S", 48, 864, 362, 91.6, "NVIDIA L40S datasheet"),
    _nvidia("RTX 4090", 24, 1008, 165.2, 82.6, "NVIDIA Ada GPU architecture, appendix A"),
    _nvidia("A100 PCIe", 80, 1935, 312, 19.5, "NVIDIA A100 datasheet, 80 GB PCIe"),
    _nvidia("A100 80GB", 80, 2039, 312, 19.5, "NVIDIA A100 datasheet, SXM"),
    _nvidia("A100", 40, 1555, 312, 19.5, "NVIDIA A100 datasheet, 40 GB"),
    _nvidia("H100 PCIe", 80, 2000, 756, 51, "NVIDIA H100 datasheet, PCIe"),
    _nvidia("H100", 80, 3350, 989, 67, "NVIDIA H100 datasheet, SXM"),
    _nvidia("H200", 141, 4800, 989, 67, "NVIDIA H200 datasheet, SXM"),
    _nvidia("B200", 180, 8000, 2250, 75, "NVIDIA HGX B200 datasheet"),
]


def find_device(name: str) -> Device | None:
    """The device of a name as CUDA gives it, such as "NVIDIA A100-SXM4-80GB"; None if unknown."""
    words = set(re.split(r"[\s-]+", name))
    if words & OTHERS:
        return None
    return next((device for device in DEVICES if set(device.name.split()) <= words), None)


def measured_device(device: torch.device, dtype: torch.dtype, repeats: int = 3) -> Device:
    """This machine's GPU or CPU by its ceilings in one dtype; takes some seconds."""
    ceilings = measure_ceilings(device, dtype, repeats)
    is_gpu = device.type == "cuda"
    threads = torch.get_num_threads()
    return Device(
        name="this GPU" if is_gpu else "this CPU",
        memory=available_memory(device) or 0,
        bandwidth=ceilings.gb_per_s * 1e9,
        rates={dtype: ceilings.matmul_tflops * 1e12},
        source=torch.cuda.get_device_name(device)
        if is_gpu
        else f"{cpu_name()}, {threads} thread{'s' * (threads != 1)}",
        is_measured=True,
    )
