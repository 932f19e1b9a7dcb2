"""How fast a run is against what its device can do: MFU, model FLOPs utilisation.

MFU is the operations that the model needs per token (`training_flops`, nothing that is computed
twice) times tokens per second, over the device's peak. Two counts are in use, so both are logged:
`mfu` is 6 N + 12 L C T, as PaLM, nanoGPT and torchtitan count, and `mfu_causal` counts only
the causal half of attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mqa_gpt.bench.ceilings import product_probe
from mqa_gpt.bench.counts import training_flops
from mqa_gpt.bench.devices import find_device
from mqa_gpt.bench.timing import take_turns
from mqa_gpt.config import GPTConfig

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
    kind = getattr(torch, dtype)
    if device.type == "cuda" and kind == torch.bfloat16:
        known = find_device(torch.cuda.get_device_name(device))
        if known is not None and kind in known.rates:
            return known.rates[kind], f"data sheet of {known.name}"
    probe = product_probe(device, kind, PROBE_SIZE)
    seconds = take_turns({"product": probe.run}, 10, "measuring")["product"]
    rate = 1e12 * probe.amount / min(seconds[1:])  # the first warms up
    return rate, f"measured product of {dtype} matrices, {PROBE_SIZE} x {PROBE_SIZE}"
