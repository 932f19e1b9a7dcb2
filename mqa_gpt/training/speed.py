"""How fast a run is against what its device can do: MFU, model FLOPs utilisation.

MFU is the operations that the model needs per token (`training_flops`, nothing that is computed
twice) times tokens per second, over the device's peak. Two counts are in use, so both are logged:
`mfu` is 6 N + 12 L C T, as PaLM, nanoGPT and torchtitan count, and `mfu_causal` counts of
attention only the half that causality leaves.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mqa_gpt.bench.counts import training_flops
from mqa_gpt.config import GPTConfig

# Dense bfloat16 products per second with tensor cores, from NVIDIA's data sheets, by a part of the
# device's name.
DATA_SHEETS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "B200": 2250e12,
}
PROBE_SIZE = 1536  # rows and columns of the matrices that are multiplied on other devices


@dataclass(frozen=True)
class Speed:
    """What the utilisation of a device is measured by.

    Attributes:
        peak: operations per second of one device.
        source: where `peak` is from, for the log.
        flops, causal_flops: operations per token, by the two counts.
    """

    peak: float
    source: str
    flops: float
    causal_flops: float

    def utilisation(self, tokens_per_second: float) -> dict[str, float]:
        """`mfu` and `mfu_causal` for tokens per second and device."""
        return {
            "mfu": self.flops * tokens_per_second / self.peak,
            "mfu_causal": self.causal_flops * tokens_per_second / self.peak,
        }


def speed_of(config: GPTConfig, length: int, device: torch.device, dtype: str) -> Speed:
    """The scale for a run's speed; takes some tenths of a second on a CPU.

    Args:
        length: T, tokens of a training sequence.
        dtype: "float32" or "bfloat16", of matrix products.
    """
    peak, source = _peak(device, dtype)
    flops, causal = (training_flops(config, length, causal=c) for c in (False, True))
    return Speed(peak, source, flops, causal)


def _peak(device: torch.device, dtype: str) -> tuple[float, str]:
    if device.type == "cuda" and dtype == "bfloat16":
        name = torch.cuda.get_device_name(device)
        for part, peak in DATA_SHEETS.items():
            if re.search(rf"\b{part}\b", name):
                return peak, f"data sheet of {part}"
    kind = getattr(torch, dtype)
    rows = torch.ones(PROBE_SIZE, PROBE_SIZE, device=device, dtype=kind)
    seconds = []
    for _ in range(10):  # the first warms up
        begin = time.perf_counter()
        F.linear(rows, rows).sum().item()
        seconds.append(time.perf_counter() - begin)
    rate = 2 * PROBE_SIZE**3 / min(seconds[1:])
    return rate, f"measured product of {dtype} matrices, {PROBE_SIZE} x {PROBE_SIZE}"
