"""The forward pass of GPT-2 with multi-query attention as one compiled function for CPUs.

A decode step reads every weight once and computes little with it, so it can be as fast as memory
is read, if nothing stands between the products. Here nothing does: all threads run through the
phases of all layers and share out the items of each (`team`). Weights are read as they are, in the
checkpoint's layout [out, in]; 8 and 16 bits become float32 in registers.

Each token is a row: it has a slot (a row of the cache) and a position, and attends to the keys of
its slot up to its position. So decoding many rows, reading prompts of unequal lengths and checking
drafts are one computation. A row's sums run in one order (`simd`), whatever stands beside it: its
numbers are those of its solo run, bit for bit.

Dimensions: N tokens of this call, M of them whose logits are wanted; the others as in
mqa_gpt/model.py. All numbers between the weights are float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mqa_kernels.cpu.attention import attention
from mqa_kernels.cpu.linear import Linear, linear
from mqa_kernels.cpu.rows import INFINITY, NONE, layer_norm
from mqa_kernels.cpu.simd import (
    LANES,
    at,
    clamp,
    fma,
    largest,
    load,
    part,
    pointer,
    splat,
    store,
    total,
)
from mqa_kernels.cpu.team import finish, take, wait

PHASES = 13  # of a layer, at most; three more are outside the layers


class Shape(NamedTuple):
    """The model's sizes and switches."""

    L: int
    C: int
    H: int
    G: int
    D: int
    F: int
    V: int
    activation: int
    epsilon: float
    scale: float


class Scratch(NamedTuple):
    """Addresses of float32 memory that a call may write to."""

    x: int  # (N, C) residual stream
    normed: int  # (max(N, M), C)
    qkv: int  # (N, C + 2GD)
    y: int  # (N, C) attention's output
    hidden: int  # (N, F)
    parts: int  # (N, blocks, H, D + LANES): see `attend_block`; 0 if each thread keeps its own
    own: int  # of each thread: `own_size` numbers
    own_size: int
    rounded: int  # (N, max(C, F) + ROW_END) int8, or 0: see `rounds` in `forward`
    logits: int  # (M, V)


def forward(
    s: Any,
    layers: Any,
    ends: Any,
    ids: Any,
    slots: Any,
    positions: Any,
    every: Any,
    wanted: Any,
    cache: Any,
    scratch: Any,
    blocks: int,
    rounds: bool,
    counters: Any,
    kinds: Any,
    thread: int,
) -> None:
    """Logits (M, V) of the tokens that are wanted; the cache gets the keys and values of all.

    Args:
        s: a `Shape`.
        layers: (L, 17) int64: the addresses of ln_1's weight and bias; of weight, scale and bias of
            c_attn and of attn.c_proj; of ln_2; of c_fc and of mlp.c_proj; and the layer's number.
        ends: (7,) int64 addresses: of wte's weight and scale, wpe, ln_f's weight and bias, and
            lm_head's weight and scale.
        ids, slots, positions: (N,) int64, of each token.
        every: (N,) int64, 0 to N - 1: all rows, for `norms`.
        wanted: (M,) int64, the tokens whose logits are wanted.
        cache: a `Cache`.
        scratch: a `Scratch`.
        blocks: of `KEYS` keys, up to the last position.
        rounds: whether to round the rows in front of int8 weights too, and multiply integers.
        counters: zeros; see `team`.
        kinds: a `Kinds`.
        thread: the number of this thread.
    """
    team, N = pointer(counters.ctypes.data, counters), len(ids)
    x, normed = pointer(scratch.x, kinds.floats), pointer(scratch.normed, kinds.floats)
    qkv, y = pointer(scratch.qkv, kinds.floats), pointer(scratch.y, kinds.floats)
    hidden, logits = pointer(scratch.hidden, kinds.floats), pointer(scratch.logits, kinds.floats)
    own = at(pointer(scratch.own, kinds.floats), thread * scratch.own_size)
    rounded, width = pointer(scratch.rounded, kinds.integers), s.C + 2 * s.G * s.D

    p = embed(team, 0, ids, positions, ends, x, s.C, kinds)  # the next phase
    for i in range(s.L):
        a = layers[i]
        c_attn, c_proj = Linear(a[2], a[3], a[4]), Linear(a[5], a[6], a[7])
        c_fc, mlp_c_proj = Linear(a[10], a[11], a[12]), Linear(a[13], a[14], a[15])

        p = norms(team, p, x, every, a[0], a[1], normed, s, kinds)
        p = linear(
            team, p, normed, s.C, c_attn, qkv, width, N, NONE, False, rounded, rounds, own, kinds
        )
        p = append(team, p, qkv, a[16], slots, positions, cache, s, kinds)
        p = attention(
            team, p, s, a[16], qkv, slots, positions, cache, scratch, blocks, y, own, kinds
        )
        p = linear(team, p, y, s.C, c_proj, x, s.C, N, NONE, True, rounded, rounds, own, kinds)

        p = norms(team, p, x, every, a[8], a[9], normed, s, kinds)
        p = linear(
            team, p, normed, s.C, c_fc, hidden, s.F, N, s.activation, False, rounded, rounds, own,
            kinds,
        )  # fmt: skip
        p = linear(
            team, p, hidden, s.F, mlp_c_proj, x, s.C, N, NONE, True, rounded, rounds, own, kinds
        )
    M, head = len(wanted), Linear(ends[5], ends[6], 0)
    p = norms(team, p, x, wanted, ends[3], ends[4], normed, s, kinds)
    linear(team, p, normed, s.C, head, logits, s.V, M, NONE, False, rounded, False, own, kinds)


@part
def embed(
    team: Any, phase: int, ids: Any, positions: Any, ends: Any, x: Any, C: int, kinds: Any
) -> int:
    """x (N, C) = wte[id] + wpe[position]."""
    wte, wpe = pointer(ends[0], kinds.weights), pointer(ends[2], kinds.parameters)
    scales = pointer(ends[1], kinds.floats)
    while True:
        i = take(team, phase)
        if i >= len(ids):
            break
        scale = splat(scales[ids[i]] if ends[1] != 0 else 1.0)
        for c in range(0, C, LANES):
            token, position = load(at(wte, ids[i] * C), c, C), load(at(wpe, positions[i] * C), c, C)
            store(at(x, i * C), c, token * scale + position, C)
        finish(team, phase)
    wait(team, phase, len(ids))
    return phase + 1


@part
def norms(
    team: Any, phase: int, x: Any, rows: Any, weight: int, bias: int, out: Any, s: Any, kinds: Any
) -> int:
    """out (M, C): layer norms of the rows of x (N, C) that `rows` (M,) names."""
    w, b = pointer(weight, kinds.parameters), pointer(bias, kinds.parameters)
    while True:
        i = take(team, phase)
        if i >= len(rows):
            break
        layer_norm(at(x, rows[i] * s.C), w, b, at(out, i * s.C), s.C, s.epsilon)
        finish(team, phase)
    wait(team, phase, len(rows))
    return phase + 1


@part
def append(
    team: Any,
    phase: int,
    qkv: Any,
    layer: int,
    slots: Any,
    positions: Any,
    cache: Any,
    s: Any,
    kinds: Any,
) -> int:
    """Write each token's keys and values of a layer to its place in the cache."""
    kv, scales = pointer(cache.kv, kinds.keys), pointer(cache.scales, kinds.floats)
    while True:
        i = take(team, phase)
        if i >= len(slots):
            break
        place = layer * cache.layer + slots[i] * cache.slot + positions[i] * cache.position
        for half in range(2 * s.G):  # K and V of each head
            # qkv is all queries, K, V; or with G = H, query, K and V head by head.
            part = s.H + half if s.G == 1 else half // 2 * 3 + 1 + half % 2
            source = at(qkv, i * (s.C + 2 * s.G * s.D) + part * s.D)
            target, factor = at(kv, place + half * s.D), splat(1.0)
            if cache.scales != 0:
                top, nothing = splat(0.0), splat(0.0)
                for d in range(0, s.D, LANES):
                    x = load(source, d, s.D)
                    nothing = fma(x, splat(0.0), nothing)  # NaN if one is not finite
                    top = clamp(top, clamp(x, splat(0.0) - x, splat(INFINITY)), splat(INFINITY))
                scale = largest(top) / np.float32(127) + total(nothing)
                scales[place // s.D + half] = scale
                factor = splat(scale if scale != 0 else 1.0)
            for d in range(0, s.D, LANES):
                store(target, d, load(source, d, s.D) / factor, s.D)
        finish(team, phase)
    wait(team, phase, len(slots))
    return phase + 1
