"""Tile sizes and launch settings, by shape and dtype.

In all that `make check-kernels` compiles none spills registers, and all fit into shared memory, on
every supported GPU.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


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
def key_tiles(dtype: torch.dtype, D: int, dropout: bool = False) -> Tiles:
    """Tiles of the kernel for dK and dV."""
    if dtype == torch.float32:
        return Tiles(32, 16 if 64 < D <= 128 else 32, 8, 1)
    if D > 128:
        return Tiles(32, 64, 8, 1)
    if dropout:
        return Tiles(64, 32, 8, 2) if D <= 64 else Tiles(32, 64, 8, 2)
    return Tiles(64, 64, 8, 2)


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
