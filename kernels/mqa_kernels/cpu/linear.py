"""Products of a few rows or many with weights as the checkpoint holds them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mqa_kernels.cpu.rows import INFINITY, NONE, activate
from mqa_kernels.cpu.simd import (
    LANES,
    at,
    cast,
    clamp,
    fma,
    inlined,
    largest,
    load,
    nearest,
    part,
    pointer,
    splat,
    store,
    total,
)
from mqa_kernels.cpu.team import finish, take, wait
from mqa_kernels.cpu.tiles import dot_tile

# A tile of ROWS x 4 sums stays in registers: of 32 with AVX-512, of 16 elsewhere.
ROWS = 6 if LANES == 16 else 2
# Terms of a sum that are added before the next: a tile's x and w of a block stay in the first-level
# cache. In 8 bits there is room for four times as many.
BLOCK = 1024
FEW_ROWS = 24  # see `dots`
PANEL = 96  # rows whose blocks stay in the second-level cache while weights pass by
WIDTH = 64  # columns of the weights that a thread takes at a time
ROW_END = 64  # bytes after a row of integers: see `round_rows`


class Linear(NamedTuple):
    """Addresses of a layer's tensors; 0 for what it lacks."""

    weight: int  # (out, in)
    scale: int  # (out,) float32, of int8 weights
    bias: int  # (out,)


class Kinds(NamedTuple):
    """Empty arrays that carry the dtypes of the memory at the addresses."""

    weights: Any  # of the linear layers and wte
    parameters: Any  # of all others
    keys: Any  # of the cache
    floats: Any  # float32
    integers: Any  # int8
    offsets: Any  # int32


@inlined
def dots(
    x: Any, ldx: int, w: Any, ldw: int, K: int, block: int, out: Any, ldo: int, R: int, N: int
) -> None:
    """out[r, n] = x[r] . w[n] for R rows and N columns: block by block, tile by tile.

    A few rows meet a tile's weights one after the other, so that the next tile's can arrive from
    memory meanwhile. Of many, a tile's rows meet all weights, so that both stay in near caches.
    """
    whole, side = N - N % 4, 4 if R <= FEW_ROWS else N
    for k in range(0, K, block):
        depth, end = min(block, K - k), K - k + k // block * 4
        for first in range(0, whole, side):
            for r in range(0, R, ROWS):
                rows, u = min(ROWS, R - r), at(x, r * ldx + k)
                for n in range(first, min(first + side, whole), 4):
                    v = at(w, n * ldw + k)
                    if r != 0:
                        following = v  # which is here
                    elif n + 4 == whole and k + block < K:
                        following = at(w, k + block)
                    else:
                        following = at(v, 4 * ldw)
                    o = at(out, r * ldo + n)
                    tile(u, ldx, v, ldw, depth, following, end, o, ldo, k > 0, rows)
        for n in range(whole, N):
            for r in range(R):
                u, v, o = at(x, r * ldx + k), at(w, n * ldw + k), at(out, r * ldo + n)
                dot_tile(u, ldx, v, ldw, depth, v, end, o, ldo, k > 0, 1, 1)


@inlined
def tile(
    x: Any,
    ldx: int,
    w: Any,
    ldw: int,
    K: int,
    following: Any,
    end: int,
    out: Any,
    ldo: int,
    adds: bool,
    rows: int,
) -> None:
    """`dot_tile` of up to `ROWS` rows and four columns."""
    if rows == 1:
        dot_tile(x, ldx, w, ldw, K, following, end, out, ldo, adds, 1, 4)
    elif rows == 2:
        dot_tile(x, ldx, w, ldw, K, following, end, out, ldo, adds, 2, 4)
    elif ROWS > 2:
        if rows == 3:
            dot_tile(x, ldx, w, ldw, K, following, end, out, ldo, adds, 3, 4)
        elif rows == 4:
            dot_tile(x, ldx, w, ldw, K, following, end, out, ldo, adds, 4, 4)
        elif rows == 5:
            dot_tile(x, ldx, w, ldw, K, following, end, out, ldo, adds, 5, 4)
        else:
            dot_tile(x, ldx, w, ldw, K, following, end, out, ldo, adds, 6, 4)


@part
def round_rows(team: Any, phase: int, x: Any, K: int, N: int, out: Any, kinds: Any) -> int:
    """Each row of x (N, K) as integers from -127 to 127 times max |x| / 127.

    After a row's integers, `out` (N, K + ROW_END) int8 holds an int32 for each block, -128 times
    the sum of its integers (see `dot_tile`), and last the float32 factor (`LLM.int8()`, Dettmers
    et al. 2022, section 2).
    """
    while True:
        i = take(team, phase)
        if i >= N:
            break
        row, rounded = at(x, i * K), at(out, i * (K + ROW_END))
        top, nothing = splat(0.0), splat(0.0)
        for k in range(0, K, LANES):
            x_k = load(row, k, K)
            top = clamp(x_k, top, splat(INFINITY))
            top = clamp(splat(0.0) - x_k, top, splat(INFINITY))
            nothing = fma(x_k, splat(0.0), nothing)  # NaN if one is not finite
        factor = largest(top) / np.float32(127) + total(nothing)
        inverse = splat(np.float32(1) / factor if factor > 0 else 0.0)
        for k in range(0, K, 4 * BLOCK):
            sums, end = splat(0.0), min(k + 4 * BLOCK, K)
            for j in range(k, end, LANES):
                integers = nearest(load(row, j, end) * inverse)
                sums = sums + integers
                store(rounded, j, integers, end)
            cast(at(rounded, K), kinds.offsets)[k // (4 * BLOCK)] = -128 * int(total(sums))
        cast(at(rounded, K + ROW_END - 4), kinds.floats)[0] = factor
        finish(team, phase)
    wait(team, phase, N)
    return phase + 1


@inlined
def linear(
    team: Any,
    phase: int,
    x: Any,
    K: int,
    layer: Any,
    out: Any,
    columns: int,
    N: int,
    activation: int,
    adds: bool,
    rounded: Any,
    rounds: bool,
    own: Any,
    kinds: Any,
) -> int:
    """out (N, columns) = act(x (N, K) @ weight.T + bias), or is increased by that.

    Args:
        rounded: memory for the rows of x as integers.
        rounds: whether to multiply those.
    """
    w = pointer(layer.weight, kinds.weights)
    if not rounds:
        return product(
            team, phase, x, K, w, K, layer, out, columns, N, activation, adds, own, kinds
        )
    phase = round_rows(team, phase, x, K, N, rounded, kinds)
    ldx = K + ROW_END
    return product(
        team, phase, rounded, ldx, w, K, layer, out, columns, N, activation, adds, own, kinds
    )


@part
def product(
    team: Any,
    phase: int,
    x: Any,
    ldx: int,
    w: Any,
    K: int,
    layer: Any,
    out: Any,
    columns: int,
    N: int,
    activation: int,
    adds: bool,
    own: Any,
    kinds: Any,
) -> int:
    """See `linear`. An item is a chunk of columns, whose weights are read from memory once and
    meet all rows, panel by panel."""
    block = BLOCK if ldx == K else 4 * BLOCK
    items = (columns + WIDTH - 1) // WIDTH
    while True:
        item = take(team, phase)
        if item >= items:
            break
        first = item * WIDTH
        count = min(WIDTH, columns - first)
        for begin in range(0, N, PANEL):
            R = min(PANEL, N - begin)
            dots(at(x, begin * ldx), ldx, at(w, first * K), K, K, block, own, WIDTH, R, count)
            for r in range(begin, begin + R):
                factor = np.float32(1)
                if ldx != K:
                    factor = cast(at(x, r * ldx + K + ROW_END - 4), kinds.floats)[0]
                sums, target = at(own, (r - begin) * WIDTH), at(out, r * columns + first)
                finish_row(sums, factor, target, first, count, layer, activation, adds, kinds)
        finish(team, phase)
    wait(team, phase, items)
    return phase + 1


@part
def finish_row(
    sums: Any,
    factor: float,
    out: Any,
    first: int,
    count: int,
    layer: Any,
    activation: int,
    adds: bool,
    kinds: Any,
) -> None:
    """What follows a product: scales of integers, the bias, then activation or residual."""
    scale, bias = pointer(layer.scale, kinds.floats), pointer(layer.bias, kinds.parameters)
    for i in range(0, count, LANES):
        y = load(sums, i, count)
        if layer.scale != 0:
            y = y * (splat(factor) * load(scale, first + i, first + count))
        if layer.bias != 0:
            y = y + load(bias, first + i, first + count)
        if activation != NONE:
            y = activate(y, activation)
        if adds:
            y = y + load(out, i, count)
        store(out, i, y, count)
