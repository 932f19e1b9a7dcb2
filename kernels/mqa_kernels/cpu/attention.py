"""Attention of each token to the keys of its slot, block by block of keys."""

from __future__ import annotations

from typing import Any, NamedTuple

from mqa_kernels.cpu.linear import BLOCK, ROWS, dots
from mqa_kernels.cpu.rows import INFINITY, exp
from mqa_kernels.cpu.simd import (
    LANES,
    at,
    clamp,
    fma,
    inlined,
    largest,
    load,
    part,
    pointer,
    splat,
    store,
    total,
)
from mqa_kernels.cpu.team import finish, take, wait
from mqa_kernels.cpu.tiles import weighted_tile

KEYS = 256  # of a block whose scores are computed together


class Cache(NamedTuple):
    """The addresses of keys and values (L, B, S, G, 2D) and, if these are int8, of the scales
    (L, B, S, G, 2) of each K and V, else 0; the strides of kv in elements."""

    kv: int
    scales: int
    layer: int
    slot: int
    position: int


@part
def part_size(D: int) -> int:
    """Numbers of a head's part: D in whole vectors, then m and l; see `attend_block`."""
    return (D + LANES - 1) // LANES * LANES + LANES


@inlined
def attend_block(
    q: Any,
    k: Any,
    stride: int,
    scales: Any,
    is_scaled: bool,
    n: int,
    heads: int,
    D: int,
    scale: float,
    scores: Any,
    out: Any,
) -> None:
    """Attention of one query, `heads` heads that share K and V, over a block of n keys.

    Writes for each head the sum of e^(score - m) v, then m, the block's largest score, and l, the
    sum of e^(score - m): what the online softmax needs (Milakov and Gimelshein 2018).
    """
    dots(q, D, k, stride, D, BLOCK, scores, KEYS, heads, n)
    padded = (n + LANES - 1) // LANES * LANES
    step = part_size(D)
    for h in range(heads):
        row = at(scores, h * KEYS)
        if is_scaled:
            for i in range(n):
                row[i] *= scales[i * (stride // D)]
        for i in range(n, padded):
            row[i] = -INFINITY
        top = load(row, 0, padded)
        for i in range(LANES, padded, LANES):
            top = clamp(load(row, i, padded), top, splat(INFINITY))
        m = largest(top) * scale
        sums = splat(0.0)
        for i in range(0, padded, LANES):
            p = exp(fma(load(row, i, padded), splat(scale), splat(-m)))
            sums = sums + p
            store(row, i, p, padded)
        end = at(out, (h + 1) * step - LANES)
        end[0], end[1] = m, total(sums)
        if is_scaled:
            for i in range(n):
                row[i] *= scales[i * (stride // D) + 1]
    v = at(k, D)
    h = 0
    while heads - h >= ROWS:
        weigh(at(scores, h * KEYS), v, stride, n, at(out, h * step), step, D, ROWS)
        h += ROWS
    while h < heads:
        weigh(at(scores, h * KEYS), v, stride, n, at(out, h * step), step, D, 1)
        h += 1


@part
def weigh(p: Any, v: Any, stride: int, n: int, out: Any, step: int, D: int, R: Any) -> None:
    """out[r] = sum of p[r, s] v[s] over n keys, for the `ROWS` heads of a tile or for one."""
    d = 0
    while D - d >= 2 * LANES:
        if R == 1:
            weighted_tile(p, KEYS, at(v, d), stride, n, D - d, at(out, d), step, 1, 2)
        else:
            weighted_tile(p, KEYS, at(v, d), stride, n, D - d, at(out, d), step, ROWS, 2)
        d += 2 * LANES
    while d < D:
        if R == 1:
            weighted_tile(p, KEYS, at(v, d), stride, n, D - d, at(out, d), step, 1, 1)
        else:
            weighted_tile(p, KEYS, at(v, d), stride, n, D - d, at(out, d), step, ROWS, 1)
        d += LANES


@part
def combine(parts: Any, blocks: int, block_step: int, heads: int, D: int, y: Any) -> None:
    """y (heads, D) of the blocks' parts: sum of e^(m_j - m) acc_j over sum of e^(m_j - m) l_j."""
    step = part_size(D)
    last = step - LANES
    for h in range(heads):
        m = parts[h * step + last]
        for j in range(1, blocks):
            m = max(m, parts[j * block_step + h * step + last])
        weights = splat(0.0)
        for j in range(blocks):
            part = at(parts, j * block_step + h * step)
            weights = fma(exp(splat(part[last] - m)), splat(part[last + 1]), weights)
        for d in range(0, D, LANES):
            sums = splat(0.0)
            for j in range(blocks):
                part = at(parts, j * block_step + h * step)
                sums = fma(exp(splat(part[last] - m)), load(part, d, last), sums)
            store(y, h * D + d, sums / weights, h * D + D)


@inlined
def attention(
    team: Any,
    phase: int,
    s: Any,
    layer: int,
    qkv: Any,
    slots: Any,
    positions: Any,
    cache: Any,
    scratch: Any,
    blocks: int,
    y: Any,
    own: Any,
    kinds: Any,
) -> int:
    """y (N, C): attention of all tokens; returns the next phase.

    With few tokens an item is a token's attention over one block of keys, so that many threads
    share a long row. With many it is a token with all its blocks, whose parts the thread keeps.
    """
    N, heads, step = len(slots), s.H // s.G, part_size(s.D)
    shared, keys = pointer(scratch.parts, kinds.floats), pointer(cache.kv, kinds.keys)
    scales, is_shared = pointer(cache.scales, kinds.floats), scratch.parts != 0
    shares = blocks if is_shared else 1
    items = N * s.G * shares
    while True:
        item = take(team, phase)
        if item >= items:
            break
        i, g, share = item // (s.G * shares), item // shares % s.G, item % shares
        end = positions[i] + 1
        used = (end + KEYS - 1) // KEYS
        q = at(qkv, i * (s.C + 2 * s.G * s.D) + (0 if s.G == 1 else g * 3 * s.D))
        place = layer * cache.layer + slots[i] * cache.slot + g * 2 * s.D
        if is_shared:
            parts, block_step = at(shared, (i * blocks * s.H + g * heads) * step), s.H * step
        else:
            parts, block_step = at(own, heads * KEYS), heads * step
        for j in range(share, used, shares):
            first = j * KEYS
            n, part = min(KEYS, end - first), at(parts, j * block_step)
            here = place + first * cache.position
            attend_block(
                q, at(keys, here), cache.position, at(scales, here // s.D), cache.scales != 0, n,
                heads, s.D, s.scale, own, part,
            )  # fmt: skip
        if not is_shared:
            combine(parts, used, block_step, heads, s.D, at(y, i * s.C + g * heads * s.D))
        finish(team, phase)
    wait(team, phase, items)
    if not is_shared:
        return phase + 1
    phase += 1
    items = N * s.G
    while True:
        item = take(team, phase)
        if item >= items:
            break
        i, g = item // s.G, item % s.G
        parts = at(shared, (i * blocks * s.H + g * heads) * step)
        used = (positions[i] + KEYS) // KEYS
        combine(parts, used, s.H * step, heads, s.D, at(y, i * s.C + g * heads * s.D))
        finish(team, phase)
    wait(team, phase, items)
    return phase + 1
