"""Products of a few rows or many with weights as the checkpoint holds them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mqa_kernels.cpu.rows import BIG, NONE, activate
from mqa_kernels.cpu.simd import (
    LANES,
    at,
    cast,
    clamp,
    dot_tile,
    kernel,
    largest,
    load,
    nearest,
    pointer,
    splat,
    store,
    total,
)
from mqa_kernels.cpu.team import finish, take, wait

# A tile of ROWS x 4 sums stays in registers: of 32 with AVX-512, of 16 elsewhere.
ROWS = 6 if LANES == 16 else 2
PANEL = 1 << 16  # numbers of x that stay in the second-level cache while weights pass by
MOST_PANEL_ROWS = 96
CHUNK = 1 << 17  # weights that a thread takes at a time
MOST_COLUMNS = 64  # columns of such a chunk
ROW_END = 64  # bytes after a row of integers: see `round_rows`


class Linear(NamedTuple):
    """Addresses of a layer's tensors; 0 for what it lacks."""

    weight: int  # (out, in)
    scale: int  # (out,) float32, of int8 weights
    bias: int  # (out,)


class Kinds(NamedTuple):
    """Empty arrays, whose dtypes are those of the memory behind the addresses."""

    weights: Any  # of the linear layers and wte
    parameters: Any  # of all others
    keys: Any  # of the cache
    floats: Any  # float32
    integers: Any  # int8
    offsets: Any  # int32


@kernel
def dots(x: Any, ldx: int, w: Any, ldw: int, K: int, out: Any, ldo: int, R: int, N: int) -> None:
    """out[r, n] = x[r] . w[n] for R rows and N columns, tile by tile."""
    whole = N - N % 4
    for n in range(0, whole, 4):
        v = at(w, n * ldw)
        r = 0
        while R - r >= ROWS:
            dot_tile(at(x, r * ldx), ldx, v, ldw, K, at(out, r * ldo + n), ldo, ROWS, 4)
            r += ROWS
        u, o, rest = at(x, r * ldx), at(out, r * ldo + n), R - r
        if rest == 1:
            dot_tile(u, ldx, v, ldw, K, o, ldo, 1, 4)
        elif ROWS > 2:
            if rest == 2:
                dot_tile(u, ldx, v, ldw, K, o, ldo, 2, 4)
            elif rest == 3:
                dot_tile(u, ldx, v, ldw, K, o, ldo, 3, 4)
            elif rest == 4:
                dot_tile(u, ldx, v, ldw, K, o, ldo, 4, 4)
            elif rest == 5:
                dot_tile(u, ldx, v, ldw, K, o, ldo, 5, 4)
    for n in range(whole, N):
        for r in range(R):
            dot_tile(at(x, r * ldx), ldx, at(w, n * ldw), ldw, K, at(out, r * ldo + n), ldo, 1, 1)


@kernel
def round_rows(team: Any, phase: int, x: Any, K: int, N: int, out: Any, kinds: Any) -> int:
    """Each row of x (N, K) as integers from -127 to 127 times max |x| / 127.

    A row of `out` (N, K + ROW_END) int8 ends with an int32, -128 times the sum of its integers (see
    `dot_tile`), and the float32 factor (`LLM.int8()`, Dettmers et al. 2022, section 2).
    """
    while True:
        i = take(team, phase)
        if i >= N:
            break
        row, rounded = at(x, i * K), at(out, i * (K + ROW_END))
        top = splat(0.0)
        for k in range(0, K, LANES):
            top = clamp(load(row, k, K), top, splat(BIG))
            top = clamp(splat(0.0) - load(row, k, K), top, splat(BIG))
        factor = largest(top) / np.float32(127)
        inverse = splat(np.float32(1) / factor if factor != 0 else 0.0)
        sums = splat(0.0)
        for k in range(0, K, LANES):
            integers = nearest(load(row, k, K) * inverse)
            sums = sums + integers
            store(rounded, k, integers, K)
        cast(at(rounded, K), kinds.offsets)[0] = -128 * int(total(sums))
        cast(at(rounded, K + 4), kinds.floats)[0] = factor
        finish(team, phase)
    wait(team, phase, N)
    return phase + 1


@kernel
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


@kernel
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
    width = max(16, min(MOST_COLUMNS, CHUNK // K // 16 * 16))
    panel = max(ROWS, min(MOST_PANEL_ROWS, PANEL // K // ROWS * ROWS))
    items = (columns + width - 1) // width
    while True:
        item = take(team, phase)
        if item >= items:
            break
        first = item * width
        count = min(width, columns - first)
        for begin in range(0, N, panel):
            R = min(panel, N - begin)
            dots(at(x, begin * ldx), ldx, at(w, first * K), K, K, own, width, R, count)
            for r in range(begin, begin + R):
                factor = np.float32(1)
                if ldx != K:
                    factor = cast(at(x, r * ldx + K + 4), kinds.floats)[0]
                sums, target = at(own, (r - begin) * width), at(out, r * columns + first)
                finish_row(sums, factor, target, first, count, layer, activation, adds, kinds)
        finish(team, phase)
    wait(team, phase, items)
    return phase + 1


@kernel
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
