"""Products by the compiled pass's own function, many weights in one call, as in the pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mqa_gpt.fast.int8 import quantize_rows
from mqa_kernels.cpu.linear import PANEL, ROW_END, WIDTH, Kinds, Linear, linear
from mqa_kernels.cpu.program import _example
from mqa_kernels.cpu.rows import NONE
from mqa_kernels.cpu.simd import HAS_VNNI, at, kernel, pointer
from mqa_kernels.cpu.team import Team, new_counters

OWN = PANEL * WIDTH  # numbers that a thread keeps for itself
TEAM = Team()


def all_products(  # type: ignore[no-untyped-def]
    weights, scales, x, rows, K, N, out, rounded, rounds, own, counters, kinds, thread
) -> None:
    """out (rows, N) = x (rows, K) @ weight.T of one weight after the other."""
    team, p = pointer(counters.ctypes.data, counters), 0
    inputs, outputs = pointer(x, kinds.floats), pointer(out, kinds.floats)
    integers, mine = pointer(rounded, kinds.integers), at(pointer(own, kinds.floats), thread * OWN)
    for i in range(len(weights)):
        layer = Linear(weights[i], scales[i], 0)
        p = linear(
            team, p, inputs, K, layer, outputs, N, rows, NONE, False, integers, rounds, mine, kinds
        )


compiled = kernel(all_products)


def walk(
    weight: Tensor, count: int, dtype: torch.dtype, rounds: bool = False
) -> Callable[[Tensor], Tensor]:
    """A function that multiplies x (R, K) float32 by `count` copies of a weight (N, K).

    Args:
        dtype: of the copies; int8 has a scale per row.
        rounds: round the rows of x to 8 bits too.

    Raises:
        ValueError: the processor does not multiply such integers.
    """
    N, K = weight.shape
    if rounds and not (HAS_VNNI and K % 64 == 0):
        raise ValueError("the processor has no AVX512-VNNI, or K is no multiple of 64")
    scale: Tensor | None = None
    if dtype == torch.int8:
        weight, scale = quantize_rows(weight)
    copies = [weight.to(dtype, copy=True) for _ in range(count)]
    addresses = np.array([copy.data_ptr() for copy in copies])
    scales = np.full(count, 0 if scale is None else scale.data_ptr())
    kinds = Kinds(*map(_example, (dtype, *[torch.float32] * 3, torch.int8, torch.int32)))

    def run(x: Tensor, kept: Any = (copies, scale)) -> Tensor:  # whose memory is read
        threads, rows = torch.get_num_threads(), len(x)
        out, own = x.new_empty(rows, N), x.new_empty(threads * OWN)
        rounded = torch.empty(rows * (K + ROW_END), dtype=torch.int8)
        pointers = [tensor.data_ptr() for tensor in (x, out, rounded, own)]
        TEAM.run(
            compiled,
            (
                addresses, scales, pointers[0], rows, K, N, pointers[1], pointers[2], rounds,
                pointers[3], new_counters(2 * count), kinds,
            ),
            threads,
        )  # fmt: skip
        return out

    return run
