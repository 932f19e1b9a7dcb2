"""What every launch needs: argument checks, and properties of the device."""

from __future__ import annotations

import functools
import os

import torch
import triton
from torch import Tensor
from triton import knobs

INTERPRETED = bool(knobs.runtime.interpret)
MAX_GRID = 65_535  # programs along the second and third axis of a CUDA grid
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEW_ROWS = 16  # up to which a fused product normalizes its rows itself
# B * T rows of the fused kernels and of `int8_linear`. In float32, without tensor cores, more rows
# take longer to multiply than the weights take to read.
MAX_ROWS = {torch.float32: 16, torch.bfloat16: 64, torch.float16: 64}
# GPUs with only 99 KiB of shared memory per block and, some, only 6 MB of L2 cache.
SMALL = (86, 89, 120, 121)


def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on this device: CUDA, or any device under Triton's interpreter."""
    return device.type == "cuda" or INTERPRETED


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of streaming multiprocessors; under the interpreter an arbitrary small number."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def architecture(device: torch.device) -> int:
    """The compute capability as one number, 90 for sm_90; 0 under the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def most_rows(device: torch.device, dtype: torch.dtype) -> int:
    """Largest B * T that the fused kernels take: 64, or 16 in float32; but 8 on GPUs with only 99
    KiB of shared memory per block, where some tiles for 16 rows do not fit."""
    return 8 if architecture(device) in SMALL else MAX_ROWS[dtype]


NO_OVERLAP = {"OVERLAP": False}  # launch options of a kernel that starts after all earlier ones


def overlap(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel that starts before its predecessor ends, and waits for it itself
    (programmatic dependent launch): from sm_90 on, unless MQA_KERNELS_PDL=0 in the environment.
    """
    pdl = os.environ.get("MQA_KERNELS_PDL", "1")
    if pdl not in ("0", "1"):
        raise ValueError(f"the environment variable MQA_KERNELS_PDL is {pdl!r}: it must be 0 or 1")
    if pdl == "0" or architecture(device) < 90:
        return NO_OVERLAP
    return {"OVERLAP": True, "launch_pdl": True}


def prefetch_bytes(weight: Tensor, rows: int) -> int:
    """Bytes that a program which reads `rows` rows of a matrix asks the L2 cache for at once; 0
    under the interpreter.

    All programs that run at a time ask for 16 MB: as much as memory delivers in the 4 us in which x
    arrives and is normalized, and a third of the L2 cache of an H100. They are taken to be 256, or
    512 with int8 weights.
    """
    if architecture(weight.device) == 0:
        return 0
    total, places = (2**21, 128) if architecture(weight.device) in SMALL else (2**24, 256)
    if weight.dtype == torch.int8:
        total //= 2
    programs = triton.next_power_of_2(triton.cdiv(len(weight), rows))
    size = rows * weight.shape[1] * weight.element_size()
    return min(total // min(programs, places), max(128, triton.next_power_of_2(size)))


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor | None,
    lengths: Tensor | None,
    left_padding: Tensor | None,
    seed: Tensor | None,
    scale: float,
) -> None:
    """Raise ValueError where the kernels would read the wrong memory or compute nonsense."""
    if not 1e-30 < scale < 1e30:  # must neither underflow nor overflow in float32
        raise ValueError(f"scale is {scale}: it must be above 1e-30 and below 1e30")
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(
            f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}: q must be (B, T, H, D), "
            "k and v (B, S, G, D)"
        )
    B, _, H, D = q.shape
    G = k.shape[2]
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != D or G == 0 or H % G:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not match: k and v "
            "must be (B, S, G, D) with q's B and D, and G must divide H"
        )
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}: the kernels take float32, "
            "bfloat16 or float16, the same for all three"
        )
    if not 1 <= D <= 256:
        raise ValueError(f"the head dim is {D}: the kernels take 1 to 256")
    if not q.stride(3) == k.stride(3) == v.stride(3) == 1:
        raise ValueError("q, k and v must be contiguous along D, their last dimension")
    if not q.device == k.device == v.device:
        raise ValueError(
            f"q, k and v are on {q.device}, {k.device} and {v.device}: move them to one device"
        )
    check_device("q", q)
    if B * G > MAX_GRID:
        raise ValueError(
            f"B * G is {B * G} ({B} rows, {G} key/value heads): CUDA starts at most {MAX_GRID} "
            "programs along this axis; split the batch"
        )
    per_row = {"start": start, "lengths": lengths, "left_padding": left_padding}
    for name, tensor in per_row.items():
        if tensor is None:
            continue
        if tensor.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{name} is {tensor.dtype}: it must be int64 or int32")
        if tensor.shape != (B,) or tensor.stride() != (1,) or tensor.device != q.device:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}, on "
                f"{tensor.device}: it must hold one integer per row, ({B},), contiguous, on "
                f"{q.device}"
            )
    if seed is not None and (seed.dtype, seed.numel(), seed.device) != (torch.int64, 1, q.device):
        raise ValueError(
            f"seed is {seed.dtype} {tuple(seed.shape)} on {seed.device}: it must be one int64 on "
            f"{q.device}"
        )


def check_device(name: str, x: Tensor) -> None:
    """ValueError unless the kernels run where x is."""
    if not runs_on(x.device):
        raise ValueError(
            f"{name} is on {x.device}: the kernels run on a CUDA device (or, for tests, on the CPU "
            "with TRITON_INTERPRET=1)"
        )


def check_rows(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
) -> tuple[int, int]:
    """K and N of x (rows, K) and weight (N, K), or ValueError.

    The weight has x's dtype, or is int8 with a float32 scale (N,).
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or 0 in weight.shape:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}: x must be (rows, K) "
            "and weight (N, K)"
        )
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}: the kernels take float32, bfloat16 or float16")
    limit = MAX_ROWS[x.dtype]
    if not 1 <= len(x) <= limit:
        raise ValueError(
            f"x has {len(x)} rows: these kernels take 1 to {limit}; use the modules for more"
        )
    check_device("x", x)
    if (weight.dtype == torch.int8) != (weight_scale is not None):
        raise ValueError(
            f"weight is {weight.dtype} and weight_scale "
            f"{None if weight_scale is None else weight_scale.dtype}: an int8 weight needs "
            "weight_scale, one float32 per row, and no other weight takes one"
        )
    check_all(x, {"x": (x, tuple(x.shape))})
    check_all(
        x,
        {"weight": (weight, tuple(weight.shape))},
        x.dtype if weight_scale is None else torch.int8,
    )
    check_all(x, {"weight_scale": (weight_scale, (len(weight),))}, torch.float32)
    return x.shape[1], weight.shape[0]


def check_all(
    x: Tensor,
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]],
    dtype: torch.dtype | None = None,
) -> None:
    """ValueError unless each tensor is None, or contiguous with this shape and `dtype` (x's if
    None), on x's device and without a gradient."""
    dtype = dtype or x.dtype
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != x.device:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}: it must be "
                f"{dtype} {shape} on {x.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}: it must be contiguous")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires a gradient, and these kernels have no backward: call them under "
                "torch.inference_mode() or torch.no_grad()"
            )
