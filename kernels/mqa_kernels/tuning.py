"""Tile sizes and launch settings, by shape and dtype.

`make check-kernels` compiles them for every supported GPU and verifies that none spills registers
in a loop or exceeds shared memory. Which of those that fit is the fastest has not been measured on
a GPU.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton


class Tiles(NamedTuple):
    """M folded rows by N keys, with the number of warps and of pipeline stages."""

    M: int
    N: int
    warps: int
    stages: int


def keeps_operands_in_memory(architecture: int) -> bool:
    """Whether products take their operands from shared memory, and there is most of it: sm_90 and
    sm_100. Elsewhere they take registers, and as many stages or as large tiles would spill."""
    return 90 <= architecture < 120


@functools.cache
def forward_tiles(
    dtype: torch.dtype, D: int, rows: int, dropout: bool = False, architecture: int = 90
) -> Tiles:
    """Tiles of `forward_kernel` for `rows` = T * H / G folded rows per group.

    The compiler waits at the top of the loop. With two stages that is a wait for all loads, which
    then are under way during one step only; with three, those of the next block stay under way.

    Here and below, dropout has smaller tiles because its random numbers take many registers.
    """
    if dtype == torch.float32:  # no tensor cores: small tiles that stay in registers
        if D <= 64 and rows > 16:
            return Tiles(32, 32, 8, 1)
        return Tiles(16, 32, 4, 1) if D <= 128 else Tiles(16, 32 if dropout else 16, 8, 1)
    if D > 128:
        return Tiles(64, 32, 8, 2) if rows > 32 else Tiles(32 if rows > 16 else 16, 64, 4, 2)
    stages = 3 if D <= 64 or keeps_operands_in_memory(architecture) else 2
    if rows <= 16:
        return Tiles(16, 64, 4, stages)
    if rows <= 32:
        return Tiles(32, 64, 4, 3)
    if rows <= 64:  # one token of 48 heads: with 128 rows, only one block fits on a multiprocessor
        return Tiles(64, 64 if keeps_operands_in_memory(architecture) else 32, 4, 3)
    return Tiles(128, 32 if dropout and D > 64 else 64, 8, stages)


@functools.cache
def query_tiles(dtype: torch.dtype, D: int, dropout: bool = False) -> Tiles:
    """Tiles of `dq_kernel`."""
    if dtype == torch.float32:
        if D <= 64:
            return Tiles(32, 32, 8, 1)
        return Tiles(16, 16, 4, 2) if D <= 128 or dropout else Tiles(16, 32, 8, 3)
    if D <= 128:
        return Tiles(128, 32, 8, 2) if dropout else Tiles(64, 64, 4, 2)
    return Tiles(64, 16 if dropout else 32, 8, 2)


@functools.cache
def key_tiles(dtype: torch.dtype, D: int, dropout: bool = False, architecture: int = 90) -> Tiles:
    """Tiles of `dkv_kernel` on a GPU of this architecture.

    N is the larger side: Triton splits the key rows of its products among the warps, 16 to each.
    """
    if dtype == torch.float32:
        return Tiles(16 if D > 128 else 32, 16 if 64 < D <= 128 else 32, 8, 1)
    if D > 128:
        return Tiles(16, 32 if dropout else 64, 8, 2)
    if D <= 64:
        return Tiles(32, 64, 4, 2 if dropout or D < 32 else 3)
    if keeps_operands_in_memory(architecture):
        return Tiles(32, 128, 8, 2 if dropout else 3)
    return Tiles(32, 64, 8 if dropout else 4, 2)


def key_splits(programs: int, steps: int, tiles: Tiles, multiprocessors: int) -> int:
    """num_splits of the keys in `forward_kernel`, whose programs have up to `steps` blocks each:
    for two programs per multiprocessor, at most 64.

    - A share has at least two steps, because the loads of two are under way at once. Its output is
      written and read again in float32, as many bytes as the keys and values of 2 M / N steps: it
      has no fewer.
    - Two splits would save less than combining costs.
    """
    least = max(2, 2 * tiles.M // tiles.N)
    splits = min(2 * multiprocessors // programs, steps // least, 64)
    return triton.cdiv(steps, triton.cdiv(steps, splits)) if splits > 2 else 1  # none is empty


def row_splits(programs: int, steps: int, tiles: Tiles, multiprocessors: int) -> int:
    """num_splits of the rows in `dkv_kernel`, for twice the programs that fit on a multiprocessor:
    one with 8 warps, or three with 4. At most 64.

    Programs differ in length, and the short ones fill the gaps at the end. To load and store its
    keys takes a program about as long as eight steps, so it has at least four.
    """
    fit = 3 if tiles.warps == 4 else 1
    return max(1, min(2 * fit * multiprocessors // programs, steps // 4, 64))


def combine_warps(D: int, num_splits: int) -> int:
    """Warps that combine num_splits partial outputs of D channels."""
    return 4 if D * num_splits >= 2048 else 1


class LinearTiles(NamedTuple):
    """BLOCK_N outputs of ROWS rows, SPLIT_K * BLOCK_K columns at a time (see `fused.py`)."""

    ROWS: int
    BLOCK_N: int
    SPLIT_K: int
    BLOCK_K: int
    CHUNK: int
    STAGES: int
    num_warps: int
    maxnreg: int | None  # registers per thread; None leaves them to the compiler


@functools.cache
def linear_tiles(
    dtype: torch.dtype,
    rows: int,
    N: int,
    K: int,
    int8: bool = False,
    multiprocessors: int = 132,
) -> LinearTiles:
    """Tiles of the product of `rows` rows with a weight (N, K).

    - BLOCK_N is the least whose `stream_cost` is within 5% of the best. It is at most 32 for one
      row, and where K is below 1024 or the weights are int8: with 64, some compiler versions spill.
      K is not split across programs, because combining would need another kernel.
    - One row with K up to 2048 is a single step of 16 outputs, all of it in flight at once. Beyond,
      BLOCK_K is half as large for 32 outputs as for 16: the same would take 160 registers.
    - Two programs fit on a multiprocessor with 128 registers. Without the explicit limit the
      compiler takes more for some, and spills in others to make room for a third. With it, it
      spills where there are more than 512 sums.
    - int8 weights have to be converted, each by one warp only. Triton gives each warp whole parts
      of K, hence SPLIT_K = 8. With several rows a step is 16 KiB of weights, and there are at least
      four along K.
    """
    if rows > 16:
        return many_row_tiles(rows, N, K, int8)
    ROWS = 1 if rows == 1 else max(8, triton.next_power_of_2(rows))
    blocks = (16, 32) if rows == 1 or K < 1024 or int8 else (16, 32, 64)
    if (rows == 1 and K <= 2048) or (int8 and dtype == torch.float32):
        blocks = (16,)
    costs = {block: stream_cost(N, block, ROWS, multiprocessors) for block in blocks}
    BLOCK_N = next(block for block in blocks if costs[block] <= 1.05 * min(costs.values()))
    SPLIT_K = 8 if int8 and dtype != torch.float32 else 128 // BLOCK_N
    if dtype == torch.float32:  # no tensor cores: a thread holds a whole BLOCK_K of its rows
        BLOCK_K = {1: 64, 8: 32, 16: 16}[ROWS] if int8 else 32 if rows == 1 else 16
    elif rows == 1:
        BLOCK_K = 256 if K <= 2048 else 2048 // BLOCK_N
    elif int8:
        BLOCK_K = min(2048 // BLOCK_N, triton.next_power_of_2(triton.cdiv(K, 4 * SPLIT_K)))
    else:
        BLOCK_K = 64
    BLOCK_K = min(BLOCK_K, triton.next_power_of_2(triton.cdiv(K, SPLIT_K)))
    # The least that fills one tensor-core instruction.
    BLOCK_K = max(BLOCK_K, 32 if int8 and dtype != torch.float32 else 16)
    CHUNK = min(triton.next_power_of_2(K), 4096 // ROWS)
    STAGES = 3 if BLOCK_K >= 128 or (int8 and (rows == 1 or (rows > 8 and BLOCK_N > 16))) else 4
    maxnreg = 128 if ROWS * BLOCK_N <= 512 else None
    if dtype == torch.float32 and rows > 1:
        maxnreg = 255 if int8 and ROWS == 16 else None  # 255: else some spill to stay at 64
    return LinearTiles(ROWS, BLOCK_N, SPLIT_K, BLOCK_K, CHUNK, STAGES, 8, maxnreg)


def many_row_tiles(rows: int, N: int, K: int, int8: bool) -> LinearTiles:
    """Tiles for 17 to 64 rows in 16 bits, without SPLIT_K.

    - Every program reads x from the L2 cache, ROWS / BLOCK_N as many elements as weights. So
      BLOCK_N is as large as leaves programs enough; 64 are one tensor-core instruction of sm_90.
    - Below N = 8192 there are about 64 programs, and each must have twice as much under way. (In
      int8 that would not fit GPUs with little shared memory, where `int8_linear` takes 64 rows.)
    """
    ROWS = triton.next_power_of_2(rows)
    BLOCK_N = 32 if N < 4096 else 128 if ROWS == 64 and N >= 16_384 else 64
    BLOCK_K = min(64 if BLOCK_N == 128 else 128, max(32, triton.next_power_of_2(K)))
    STAGES = 4 if N >= 8192 or (int8 and ROWS == 64) else 6
    maxnreg = 224 if int8 and BLOCK_N == 64 else None  # without it, some spill on sm_100
    return LinearTiles(ROWS, BLOCK_N, 1, BLOCK_K, 0, STAGES, 8 if BLOCK_N == 128 else 4, maxnreg)


def stream_cost(N: int, BLOCK_N: int, ROWS: int, multiprocessors: int) -> int:
    """How long programs take that read BLOCK_N rows of a weight (N, K) each, in units of the time
    that reading a row takes.

    Two or three of them fit on a multiprocessor, which depends on the compiler: the worse counts.
    All that run together read as fast as memory delivers, if there is one or more on each
    multiprocessor. So a last wave of fewer takes as long as if there were. Several rows of x have
    to be read and normalized, too, which takes about as long as ROWS rows of the weight.
    """
    programs = triton.cdiv(N, BLOCK_N)
    most = 0
    for places in (2 * multiprocessors, 3 * multiprocessors):
        rest = programs % places
        idle = max(0, multiprocessors - rest) if rest else 0
        most = max(most, programs + idle)
    return most * (BLOCK_N + (ROWS if ROWS > 1 else 0))


def choose_block(parts: int) -> int:
    """How many of `parts` candidates `choose_kernel` reduces at a time."""
    return min(triton.next_power_of_2(parts), 4096)
