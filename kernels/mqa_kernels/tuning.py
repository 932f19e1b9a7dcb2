"""Tile sizes and launch settings, by shape and dtype.

In all that `make check-kernels` compiles none spills registers, and all fit into shared memory, on
every supported GPU.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton


class Tiles(NamedTuple):
    """M folded rows against N keys, and how the compiler is to schedule them."""

    M: int
    N: int
    warps: int
    stages: int


@functools.cache
def forward_tiles(dtype: torch.dtype, D: int, rows: int, dropout: bool = False) -> Tiles:
    """Tiles of the forward kernel for `rows` = T * H / G folded rows.

    Here and below, dropout takes smaller tiles: its random numbers need many registers.
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
    """Tiles of the kernel for dQ."""
    if dtype == torch.float32:
        if D <= 64:
            return Tiles(32, 32, 8, 1)
        return Tiles(16, 16, 4, 2) if D <= 128 or dropout else Tiles(16, 32, 8, 3)
    if D <= 128:
        return Tiles(128, 32, 8, 2) if dropout else Tiles(64, 64, 4, 2)
    return Tiles(64, 16 if dropout else 32, 8, 2)


@functools.cache
def key_tiles(dtype: torch.dtype, D: int, dropout: bool = False, architecture: int = 90) -> Tiles:
    """Tiles of the kernel for dK and dV on a GPU of this architecture.

    The keys are the large side of its first products, which the warps divide among them by 16.
    """
    if dtype == torch.float32:
        return Tiles(16 if D > 128 else 32, 16 if 64 < D <= 128 else 32, 8, 1)
    if D > 128:
        return Tiles(16, 32 if dropout else 64, 8, 2)
    if D <= 64:
        return Tiles(32, 64, 4, 2 if dropout or D < 32 else 3)
    if 90 <= architecture < 120:  # sm_90 and sm_100, with the most shared memory
        return Tiles(32, 128, 8, 2 if dropout else 3)
    return Tiles(32, 64, 8 if dropout else 4, 2)


def split_count(programs: int, size: int, block: int, multiprocessors: int) -> int:
    """How many shares to split a loop over `size` in steps of `block` into, so that a launch of
    `programs` fills the device about twice.

    A share has at least four steps: below that, joining them costs more than it wins.
    """
    wanted = 2 * multiprocessors // programs
    return max(1, min(wanted, size // (4 * block), 64))


def combine_warps(D: int, splits: int) -> int:
    """Warps for joining `splits` parts of D channels."""
    return 4 if D * splits >= 2048 else 1


class LinearTiles(NamedTuple):
    """BLOCK_N outputs of ROWS rows, by SHARES * BLOCK_K columns at a time (see `fused.py`)."""

    ROWS: int
    BLOCK_N: int
    SHARES: int
    BLOCK_K: int
    CHUNK: int
    STAGES: int
    num_warps: int
    maxnreg: int | None  # registers per thread; None leaves them to the compiler


@functools.cache
def linear_tiles(dtype: torch.dtype, R: int, N: int, K: int, int8: bool = False) -> LinearTiles:
    """Tiles of a product of R rows with a weight (N, K), for 8 warps; above 16 rows of int8 only.

    Each program normalises all rows for itself, so a large BLOCK_N saves work where there are
    several rows; but there must be about as many programs as a GPU has multiprocessors. That leaves
    at least 128 programs for N from 2048 on, so K is not split among programs: whoever joins them
    would have to wait once more. One row with K up to 2048 is read in a single step, which is all
    under way before x is there.

    Rows of fewer than 1024 columns meet tiles of 32 at most: with 64 some compilers spill.

    The smallest tiles need fewer than 128 registers, with which two programs fit a multiprocessor.
    The limit says so to the compiler, which would else spill to make room for a third.

    8-bit weights are converted, each by one warp. Triton gives a warp whole shares, so there is one
    for each. Several rows meet them in steps of 16 KiB, at least four of them along K, and in tiles
    of 32 at most: with 64 some compilers spill. More than 16 rows of x, which every program reads
    from the L2 cache, are more bytes than the weights, so there a tile is 32 wide even if there are
    few programs, and its steps are of 8 KiB, which leaves room for x in shared memory.
    """
    ROWS = 1 if R == 1 else max(8, triton.next_power_of_2(R))
    BLOCK_N = 16 if R == 1 or N < 4096 else 32 if N < 8192 or K < 1024 or int8 else 64
    if R > 16:
        BLOCK_N = 32
    if int8 and dtype == torch.float32:
        BLOCK_N = 16
    SHARES = 128 // BLOCK_N
    if dtype == torch.float32:  # no tensor cores: a thread holds a whole BLOCK_K of its rows
        BLOCK_K = {1: 64, 8: 32, 16: 16}[ROWS] if int8 else 32 if R == 1 else 16
    elif R == 1:
        BLOCK_K = 256 if K <= 2048 else 128
    elif int8:
        SHARES = 8
        step = 2048 if R <= 16 else 1024  # weights of a share
        BLOCK_K = min(step // BLOCK_N, triton.next_power_of_2(triton.cdiv(K, 4 * SHARES)))
    else:
        BLOCK_K = 64
    BLOCK_K = min(BLOCK_K, triton.next_power_of_2(triton.cdiv(K, SHARES)))
    # What fills a tensor core's registers.
    BLOCK_K = max(BLOCK_K, 32 if int8 and dtype != torch.float32 else 16)
    CHUNK = min(triton.next_power_of_2(K), 4096 // ROWS)
    STAGES = 3 if BLOCK_K >= 128 or (int8 and (R == 1 or R > 8)) else 4
    maxnreg = None
    if int8 and BLOCK_N == 32:
        maxnreg = 168  # else some compilers spill to keep to 80 or 128
    elif BLOCK_N == 16 and not int8 and (R == 1 or dtype != torch.float32):
        maxnreg = 128
    return LinearTiles(ROWS, BLOCK_N, SHARES, BLOCK_K, CHUNK, STAGES, 8, maxnreg)


def choose_block(parts: int) -> int:
    """How many of `parts` candidates to look at together."""
    return min(triton.next_power_of_2(parts), 4096)
