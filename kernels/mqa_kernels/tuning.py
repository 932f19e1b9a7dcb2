"""Tile sizes and launch settings, by shape and dtype.

`make check-kernels` compiles them for every supported GPU and verifies that none spills registers
or exceeds shared memory. Which of those that fit is the fastest has not been measured on a GPU.
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


@functools.cache
def forward_tiles(dtype: torch.dtype, D: int, rows: int, dropout: bool = False) -> Tiles:
    """Tiles of `forward_kernel` for `rows` = T * H / G folded rows per group.

    Here and below, dropout has smaller tiles because its random numbers take many registers.
    """
    if dtype == torch.float32:  # no tensor cores: small tiles that stay in registers
        if D <= 64 and rows > 16:
            return Tiles(32, 32, 8, 1)
        return Tiles(16, 32, 4, 1) if D <= 128 else Tiles(16, 32 if dropout else 16, 8, 1)
    if rows <= 16:
        return Tiles(16, 64, 4, 3 if D <= 64 else 2)
    if rows <= 32:
        return Tiles(32, 64, 4, 3 if D <= 128 else 2)
    if D <= 128:
        return Tiles(128, 32 if dropout and D > 64 else 64, 8, 2)
    return Tiles(64, 32, 8, 2)


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
    if 90 <= architecture < 120:  # sm_90 and sm_100 have the most shared memory
        return Tiles(32, 128, 8, 2 if dropout else 3)
    return Tiles(32, 64, 8 if dropout else 4, 2)


def split_count(programs: int, size: int, block: int, multiprocessors: int) -> int:
    """num_splits of a loop over `size` in steps of `block`, such that a launch of `programs` has
    about two programs per multiprocessor.

    At most 64 splits of at least four steps each: shorter ones are assumed not to be worth the
    combining (not measured).
    """
    wanted = 2 * multiprocessors // programs
    return max(1, min(wanted, size // (4 * block), 64))


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
def linear_tiles(dtype: torch.dtype, rows: int, N: int, K: int, int8: bool = False) -> LinearTiles:
    """Tiles of the product of `rows` rows with a weight (N, K).

    - Every program normalizes all rows, so with several rows a large BLOCK_N saves work; but there
      must be about as many programs as multiprocessors. From N = 2048 on there are at least 128, so
      K is not split across programs: combining would need another kernel.
    - One row with K up to 2048 is a single step, all of it in flight before x is ready.
    - BLOCK_N is at most 32 where K is below 1024 or the weights are int8: with 64, some compiler
      versions spill.
    - Tiles with BLOCK_N = 16 fit in 128 registers, so that two programs fit on a multiprocessor.
      Without the explicit limit the compiler spills to make room for a third.
    - int8 weights have to be converted, each by one warp only. Triton gives each warp whole parts
      of K, hence SPLIT_K = 8. With several rows a step is 16 KiB of weights, and there are at least
      four along K.
    """
    if rows > 16:
        return many_row_tiles(rows, N, K, int8)
    ROWS = 1 if rows == 1 else max(8, triton.next_power_of_2(rows))
    BLOCK_N = 16 if rows == 1 or N < 4096 else 32 if N < 8192 or K < 1024 or int8 else 64
    if int8 and dtype == torch.float32:
        BLOCK_N = 16
    SPLIT_K = 128 // BLOCK_N
    if dtype == torch.float32:  # no tensor cores: a thread holds a whole BLOCK_K of its rows
        BLOCK_K = {1: 64, 8: 32, 16: 16}[ROWS] if int8 else 32 if rows == 1 else 16
    elif rows == 1:
        BLOCK_K = 256 if K <= 2048 else 128
    elif int8:
        SPLIT_K = 8
        BLOCK_K = min(2048 // BLOCK_N, triton.next_power_of_2(triton.cdiv(K, 4 * SPLIT_K)))
    else:
        BLOCK_K = 64
    BLOCK_K = min(BLOCK_K, triton.next_power_of_2(triton.cdiv(K, SPLIT_K)))
    # The least that fills one tensor-core instruction.
    BLOCK_K = max(BLOCK_K, 32 if int8 and dtype != torch.float32 else 16)
    CHUNK = min(triton.next_power_of_2(K), 4096 // ROWS)
    STAGES = 3 if BLOCK_K >= 128 or (int8 and (rows == 1 or rows > 8)) else 4
    maxnreg = None
    if int8 and BLOCK_N == 32:
        maxnreg = 168  # without it, some compiler versions spill to stay at 80 or 128
    elif BLOCK_N == 16 and not int8 and (rows == 1 or dtype != torch.float32):
        maxnreg = 128
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
    maxnreg = 224 if int8 and ROWS == BLOCK_N == 64 else None  # without it, sm_100 spills 16 bytes
    return LinearTiles(ROWS, BLOCK_N, 1, BLOCK_K, 0, STAGES, 8 if BLOCK_N == 128 else 4, maxnreg)


def choose_block(parts: int) -> int:
    """How many of `parts` candidates `choose_kernel` reduces at a time."""
    return min(triton.next_power_of_2(parts), 4096)
