"""Where a model goes: its dtype, its device, and whether it fits there."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch

from mqa_gpt.cache import cache_bytes
from mqa_gpt.errors import CheckpointError, InputError, shown
from mqa_gpt.fast.int8 import is_quantized
from mqa_gpt.machine import available_memory
from mqa_gpt.model import GPT

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

# Other common names of these.
DTYPE_ALIASES = {
    "float": "float32",
    "fp32": "float32",
    "bf16": "bfloat16",
    "half": "float16",
    "fp16": "float16",
    "double": "float64",
    "fp64": "float64",
}


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The dtype of that name, such as "bfloat16", "bf16" or "torch.bfloat16".

    Raises:
        InputError: a model cannot have it.
    """
    found: Any = dtype
    if isinstance(dtype, str):
        name = dtype.removeprefix("torch.")
        found = DTYPES.get(DTYPE_ALIASES.get(name, name))
    if found not in DTYPES.values():
        raise InputError(f"dtype is {shown(dtype)}: expected one of {', '.join(DTYPES)}")
    return DTYPES[str(found).removeprefix("torch.")]


def as_device(device: torch.device | str | None) -> torch.device:
    """The device of that name; None is CUDA if it is available, else the CPU.

    Raises:
        InputError: there is no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with warnings.catch_warnings(action="ignore"):  # about deprecated names
            found = torch.device(device)
        if found.type == "meta":
            raise RuntimeError("has no values to compute with")
        torch.empty(0, device=found)  # the name may be known and the hardware absent
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, TypeError):
        raise InputError(
            f"device is {shown(str(device))}, which this machine or this build of PyTorch does not "
            "have: 'cpu' always works"
        ) from None
    return found


def fast_dtype(
    stored: torch.dtype, device: torch.device, parameters: int
) -> tuple[torch.dtype, str | None]:
    """The dtype to run stored weights in where none is asked for, and why if it is another.

    float32 for 16-bit weights on a CPU that multiplies no such numbers, if memory allows.
    """
    if device.type != "cpu" or stored not in (torch.bfloat16, torch.float16):
        return stored, None
    if stored == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported():
        return stored, None
    name = str(stored).removeprefix("torch.")
    room = available_memory(device)
    if room is not None and 4 * parameters > room:
        return stored, (
            f"running in {name}, though this processor multiplies none: in float32 the weights "
            f"would take {4 * parameters / 1e9:.2f} GB, and {room / 1e9:.2f} GB are available"
        )
    return torch.float32, (
        f"running in float32, since this processor multiplies no {name}; pass --dtype {name} "
        f"(dtype='{name}') to keep it"
    )


def require_memory(
    folder: Path, model: GPT, dtype: torch.dtype, device: torch.device, spare: int = 0
) -> None:
    """CheckpointError if the model in this dtype does not fit on this device.

    Counted are the weights and, for a while, `spare` bytes to quantize them.
    """
    cpu = torch.device("cpu")

    def needed(dtype: torch.dtype, place: torch.device) -> int:
        weights = sum(
            p.numel() * (dtype.itemsize if p.is_floating_point() else 1) for p in model.parameters()
        )
        weights += sum(buffer.nbytes for buffer in model.buffers())  # the scales of 8-bit weights
        return weights + spare

    def room(place: torch.device) -> float:
        found = available_memory(place)
        return math.inf if found is None else found

    if needed(dtype, device) <= room(device):
        return
    large = [p.numel() for p in model.parameters() if p.ndim == 2]
    as_int8 = sum(large) + 8 * max(large)  # for a while the largest twice in float32
    advice = "it needs a device with more memory"
    smaller = needed(torch.bfloat16, device)
    if dtype.itemsize > 2 and smaller <= room(device):
        advice = f"dtype='bfloat16' takes {smaller / 1e9:.2f} GB and would fit"
    elif not is_quantized(model) and as_int8 <= room(device):
        advice = "quantize='int8' would fit"
    elif device != cpu and needed(dtype, cpu) <= room(cpu):
        advice = "device='cpu' has room for it"
    per_token = cache_bytes(model.config, dtype)
    raise CheckpointError(
        f"{folder} needs {needed(dtype, device) / 1e9:.2f} GB in "
        f"{str(dtype).removeprefix('torch.')}, and {per_token / 1e3:,.1f} kB for each token in the "
        f"KV cache, but {room(device) / 1e9:.2f} GB are available on {device}: {advice}"
    )
