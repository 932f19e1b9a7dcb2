"""What every launch needs: checked inputs, and facts about the device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton import knobs

INTERPRETED = bool(knobs.runtime.interpret)
MAX_GRID = 65_535  # along a grid's second axis
MAX_ROWS = 16  # of the fused kernels for few rows
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of `int8_linear`. In float32, without tensor cores, arithmetic takes longer than reading beyond.
MAX_INT8_ROWS = {torch.float32: 16, torch.bfloat16: 64, torch.float16: 64}


def runs_on(device: torch.device) -> bool:
    """Whether the kernels run there: on CUDA devices, and under Triton's interpreter anywhere."""
    return device.type == "cuda" or INTERPRETED


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a small made-up number for the interpreter."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def architecture(device: torch.device) -> int:
    """Of a GPU, as in its name sm_90; 0 for the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def most_rows(device: torch.device) -> int:
    """Rows that the fused kernels for few take there: 16, or 8 where a block may have 99 KiB of
    shared memory, into which not all tiles for 16 fit."""
    return 8 if architecture(device) in (86, 89, 120, 121) else MAX_ROWS


NO_OVERLAP = {"OVERLAP": False}  # launch options of a kernel that starts when all before have ended


def overlap(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel that may start before its predecessor ends, where GPUs can do that
    (programmatic dependent launch, from sm_90 on); such a kernel waits by itself."""
    if architecture(device) < 90:
        return NO_OVERLAP
    return {"OVERLAP": True, "launch_pdl": True}


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor | None,
    lengths: Tensor | None,
    left_padding: Tensor | None,
    scale: float,
) -> None:
    """Raise ValueError where the kernels would read the wrong memory or compute nonsense."""
    if not 1e-30 < scale < 1e30:  # in float32 it must neither vanish nor overflow
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
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit: k and v "
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
        raise ValueError(f"q, k and v are on {q.device}, {k.device} and {v.device}: move them")
    if not runs_on(q.device):
        raise ValueError(
            f"q is on {q.device}: the kernels run on a CUDA device (or, for tests, on the CPU "
            "with TRITON_INTERPRET=1)"
        )
    if B * G > MAX_GRID:
        raise ValueError(
            f"{B} rows of {G} key/value heads are {B * G} programs: CUDA starts at most {MAX_GRID} "
            "along this axis; split the batch"
        )
    per_rows = {"start": start, "lengths": lengths, "left_padding": left_padding}
    for name, per_row in per_rows.items():
        if per_row is None:
            continue
        if per_row.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{name} is {per_row.dtype}: it must be int64 or int32")
        if per_row.shape != (B,) or per_row.stride() != (1,) or per_row.device != q.device:
            raise ValueError(
                f"{name} has shape {tuple(per_row.shape)}, strides {per_row.stride()}, and is on "
                f"{per_row.device}: it must hold one integer per row, ({B},), contiguous, on "
                f"{q.device}"
            )


def check_rows(
    x: Tensor, weight: Tensor, weight_scale: Tensor | None, most: int = MAX_ROWS
) -> tuple[int, int]:
    """K and N of x (R, K) and weight (N, K); ValueError where they do not fit the kernels.

    The weight is of x's dtype, or of int8 with a scale (N,) float32. R is at most `most`.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or 0 in weight.shape:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}: x must be (R, K) and "
            "weight (N, K)"
        )
    if not 1 <= len(x) <= most:
        raise ValueError(
            f"x has {len(x)} rows: these kernels take 1 to {most}; use the modules for more"
        )
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}: the kernels take float32, bfloat16 or float16")
    if not runs_on(x.device):
        raise ValueError(
            f"x is on {x.device}: the kernels run on a CUDA device (or, for tests, on the CPU "
            "with TRITON_INTERPRET=1)"
        )
    if (weight.dtype == torch.int8) != (weight_scale is not None):
        raise ValueError(
            f"weight is {weight.dtype} and weight_scale "
            f"{None if weight_scale is None else weight_scale.dtype}: an int8 weight needs its "
            "rows' scales, and no other weight takes any"
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
    """ValueError unless each tensor is None or has its shape, x's device, and x's or this dtype."""
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
                f"{name} needs a gradient, which these kernels do not have: call them under "
                "torch.inference_mode() or torch.no_grad()"
            )
