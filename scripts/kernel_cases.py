"""Every shipped kernel configuration, compiled for every supported GPU; no GPU is needed.

Calls the public functions on CPU tensors and has Triton compile each launch instead of running it,
so tiles, types, divisibility and constants are those of the real launch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor
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

MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}  # of each supported GPU (data sheets)
DTYPES = ("bfloat16", "float16", "float32")
CALLS = ("train", "ragged", "dropout", "decode", "fused", "fused_int8")
PADDED_ROWS = {  # of a fused step
    "bfloat16": (1, 8, 16, 32, 64), "float16": (1, 8, 16, 32, 64), "float32": (1, 8, 16),
}  # fmt: skip
LAYER_ROWS = {"bfloat16": (16, 32, 64), "float16": (16, 32, 64), "float32": (16,)}  # int8_linear


class Case(NamedTuple):
    """What to compile for one GPU: a call of `attention`, or a fused step (C = H D)."""

    arch: int
    dtype: str
    D: int
    G: int
    call: str
    H: int = 32


class Launch(NamedTuple):
    """A kernel that a call launches.

    Attributes:
        compiled: Triton's `CompiledKernel`, or the error that compiling ended with.
    """

    kernel: str
    tiles: str
    compiled: Any


def all_cases() -> Iterator[Case]:
    """Common head dims on every GPU; one of each rarer kind on one."""
    for arch in MULTIPROCESSORS:
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
        yield Case(90, "bfloat16", D, 1, "decode", H)
    yield Case(90, "bfloat16", 128, 1, "decode", 16)
    for call in ("fused", "fused_int8", "train", "decode"):
        yield Case(90, "float16", 128, 1, call)


def compile_case(case: Case) -> list[Launch]:
    """Compile every kernel that the call launches, to machine code."""
    launches = []
    compile_launch = triton.JITFunction.run

    def record(kernel, *arguments, grid, warmup, **options):  # type: ignore[no-untyped-def]
        tiles = "{M}x{N} ".format(**options) if "M" in options else ""
        if "ROWS" in options:
            tiles = "{ROWS}x{BLOCK_N}x{BLOCK_K} of {K} ".format(**options)
        settings = {"num_warps": 4, "num_stages": options.get("STAGES", 3)} | options
        tiles += "{num_warps} warps {num_stages} stages".format(**settings)
        try:
            compiled = compile_launch(kernel, *arguments, grid=grid, warmup=True, **options)
        except Exception as error:  # the compiler raises many kinds
            compiled = error
        launches.append(Launch(kernel.__name__, tiles, compiled))

    device = {
        "runs_on": True,
        "architecture": case.arch,
        "multiprocessors": MULTIPROCESSORS[case.arch],
    }
    driver.set_active(absent_gpu(case.arch))
    with ExitStack() as stack:
        stack.enter_context(patch.object(triton.JITFunction, "run", record))
        for module in [m for name, m in sys.modules.items() if name.startswith("mqa_kernels.")]:
            for name in device.keys() & vars(module).keys():
                stack.enter_context(patch.object(module, name, return_value=device[name]))
        (call_fused if case.call.startswith("fused") else call_attention)(case)
    return launches


def absent_gpu(arch: int) -> SimpleNamespace:
    """The part of Triton's driver that compiling needs."""
    return SimpleNamespace(
        get_current_device=lambda: arch,  # Triton caches compiled kernels by device number
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
    )


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
    for R in PADDED_ROWS[case.dtype]:
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
