"""Section of gpu_report.py: which tiles are the fastest? For a call of its own.

    python3 scripts/gpu_report.py --out tiles --only autotune --limit 550

Times each kernel with other tiles than `mqa_kernels.tuning` chooses, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from itertools import product
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from gpu_kernels import Row, each, recorded
from gpu_models import seconds_of
from gpu_speed import D, inputs
from torch import Tensor

from mqa_kernels import attention, norm_argmax, norm_linear, norm_qkv_to_cache

Change = dict[str, int | None]  # fields of the chosen tiles, and what they become


def tiles(text: str) -> list[Change]:
    """Of attention: rows, keys, warps and stages of each candidate."""
    names = ("M", "N", "warps", "stages")
    return [
        dict(zip(names, map(int, candidate.split("x")), strict=True)) for candidate in text.split()
    ]


FORWARD = tiles("128x64x8x2 128x64x8x3 128x128x8x2 64x64x4x2 64x64x4x3 64x128x4x2 128x32x8x4")
DQ = tiles("64x64x4x2 64x64x4x3 64x32x4x3 128x64x8x2 128x32x8x3")
DKV = tiles("32x128x8x3 32x128x8x2 64x128x8x2 64x64x4x2 32x64x4x3")
DECODE = tiles("32x64x4x3 32x64x4x2 32x64x4x4 32x128x4x2 32x128x4x3 32x32x4x4")
# Warps stay 8: each takes 16 outputs of one part of K.
LINEAR: list[Change] = [
    {"BLOCK_N": N, "SPLIT_K": 128 // N, "BLOCK_K": K, "STAGES": stages,
     "maxnreg": 128 if N == 16 else None}
    for N, K, stages in (
        (16, 64, 4), (16, 128, 3), (16, 128, 4), (16, 256, 2), (16, 256, 3),
        (32, 64, 4), (32, 128, 3), (32, 256, 3), (64, 64, 4), (64, 128, 3),
    )
]  # fmt: skip

MANY_ROWS: list[Change] = [
    {"BLOCK_N": N, "BLOCK_K": K, "STAGES": stages, "num_warps": 8 if N == 128 else 4}
    for N, K, stages in product((32, 64, 128), (64, 128), (3, 4, 6))
]


class Search(NamedTuple):
    """What is tuned: the module and function that choose the tiles, and a call to be timed."""

    name: str
    module: str
    function: str
    changes: list[Change]
    make: Callable[[torch.device], Callable[[], Any]]
    is_short: bool = False  # shorter than Python takes to launch it


def autotune(device: torch.device) -> Iterator[Row]:
    """A row per kernel and shape: the tiles that are chosen and the fastest, and all times."""
    gpu = device.type == "cuda"
    T, S, C, F = (4096, 8192, 4096, 16_384) if gpu else (9, 40, 32, 64)
    forward, backward, fused = (
        "mqa_kernels.forward",
        "mqa_kernels.backward",
        "mqa_kernels.fused_ops",
    )
    searches = [
        Search("forward", forward, "forward_tiles", FORWARD, partial(forward_call, T)),
        Search("decode", forward, "forward_tiles", DECODE, partial(decode_call, 16, S), True),
        Search("dQ", backward, "query_tiles", DQ, partial(backward_call, T)),
        Search("dK, dV", backward, "key_tiles", DKV, partial(backward_call, T)),
    ]
    searches += [
        Search(f"linear {C} to {N}, {rows} rows", fused, "linear_tiles", changes,
               partial(linear_call, rows, C, N), True)
        for rows, changes in ((1, LINEAR), (8, LINEAR), (16, LINEAR), (64, MANY_ROWS))
        for N in (C, F)
    ]  # fmt: skip
    cases = (
        (
            {"kernel": search.name},
            partial(fastest, device, search if gpu else search._replace(changes=[])),
        )
        for search in searches
    )
    yield from each(cases, may_refuse=True)


def fastest(device: torch.device, search: Search) -> Row:
    """Times of all candidates, and the largest distance of their results from the first ones."""
    action = search.make(device)
    choose = getattr(import_module(search.module), search.function)
    chosen: list[Any] = []
    found: list[Row] = []
    expected: list[Tensor] = []
    for change in ({}, *search.changes):

        def changed(*arguments: Any, change: Change = change, **options: Any) -> Any:
            chosen.append(choose(*arguments, **options))
            return chosen[-1]._replace(**change)

        with patch(f"{search.module}.{search.function}", changed):
            try:
                results = results_of(action)
                seconds = seconds_of(recorded(action, device) if search.is_short else action)
            except Exception as error:  # too large for the GPU, or for the compiler
                found.append({"change": change, "error": str(error).splitlines()[0][:200]})
                continue
        expected = expected or results
        distances = [(a - b).abs().max().item() for a, b in zip(results, expected, strict=True)]
        found.append({"change": change, "us": seconds * 1e6, "difference": max(distances)})
    timed = [row for row in found if "us" in row]
    best = min(timed, key=lambda row: row["us"], default={"change": "none runs"})
    return {
        "shipped": str(chosen[0]),
        "shipped_us": found[0].get("us"),
        "best": str(best["change"] or "shipped"),
        "best_us": best.get("us"),
        "candidates": found,
    }


def results_of(action: Callable[[], Any]) -> list[Tensor]:
    """What the action returns, one tensor or several."""
    result = action()
    return [result] if isinstance(result, Tensor) else list(result)


def forward_call(T: int, device: torch.device) -> Callable[[], Tensor]:
    q, k, v = inputs(device, 2, T, T)
    return lambda: attention(q, k, v)


def decode_call(B: int, S: int, device: torch.device) -> Callable[[], Tensor]:
    q, k, v = inputs(device, B, 1, S)
    start = torch.full((B,), S - 1, device=device)
    return lambda: attention(q, k, v, start)


def backward_call(T: int, device: torch.device) -> Callable[[], Any]:
    leaves = [x.detach().requires_grad_() for x in inputs(device, 2, T, T)]
    out = attention(*leaves)
    do = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, do, retain_graph=True)


def linear_call(rows: int, K: int, N: int, device: torch.device) -> Callable[[], Tensor]:
    x, norm, weight = product_inputs(rows, K, N, device)
    return lambda: norm_linear(x, norm[0], norm[1], 1e-5, weight)


def qkv_call(rows: int, K: int, device: torch.device) -> Callable[[], Tensor]:
    size = min(D, K)  # of the one key/value head
    x, norm, weight = product_inputs(rows, K, K + 2 * size, device)
    slots = torch.zeros(rows, 1024, 1, 2 * size, dtype=x.dtype, device=device)
    lengths = torch.full((rows,), 500, device=device)
    return lambda: norm_qkv_to_cache(x, norm[0], norm[1], 1e-5, weight, None, slots, lengths)


def argmax_call(rows: int, K: int, N: int, device: torch.device) -> Callable[[], Any]:
    x, norm, weight = product_inputs(rows, K, N, device)
    return lambda: norm_argmax(x, norm[0], norm[1], 1e-5, weight)


def product_inputs(rows: int, K: int, N: int, device: torch.device) -> list[Tensor]:
    """x (rows, K), scale and offset of its norm (2, K), and a weight (N, K)."""
    shapes = ((rows, K), (2, K), (N, K))
    return [torch.randn(*shape, dtype=torch.bfloat16, device=device) for shape in shapes]
