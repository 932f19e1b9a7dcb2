"""The PTX of every shipped kernel, interpreted and judged by the error rule.

A sample runs by default, and everything with MQA_GPT_PTX=all (`make check-kernels`).
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not available on this platform")

from mqa_kernels import tuning
from tests.ptx import cases
from tests.ptx.machine import ORDERS

EVERYTHING = os.environ.get("MQA_GPT_PTX") == "all"
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

pytestmark = pytest.mark.slow

# One or two of each family, of the tiles that the official models use.
SAMPLE: list[tuple[str, dict[str, Any]]] = [
    ("linear", dict(rows=1, K=2048, N=40)),
    ("linear", dict(rows=8, K=1024, N=40, activation=None, int8=True)),
    ("qkv", dict(B=2, T=3, H=4, G=1, D=64, lengths=[4, 0])),
    ("argmax", dict(rows=3, C=768, V=70)),
    ("decode", dict(B=2, T=1, S=1030, H=32, G=1, D=128, start=[700, 3])),
    ("train", dict(B=1, T=9, S=80, H=32, G=1, D=128, start=[70])),
    ("train", dict(B=2, T=9, S=30, H=4, G=2, D=64, start=[21, 14], lengths=[9, 5], left=[0, 3], p=0.2)),
]  # fmt: skip


def name_of(case: tuple[str, dict[str, Any]]) -> str:
    name, arguments = case
    return name + "".join(f"-{key}={value}" for key, value in arguments.items()).replace("torch.", "")


def official_products() -> list[tuple[str, dict[str, Any]]]:
    """A few outputs of each kind of tile that an official model's products use."""
    seen, found = set(), []
    for H, D in ((12, 64), (16, 128), (22, 128), (32, 128), (48, 128)):
        C = H * D
        for int8 in (False, True):
            for dtype in (BF16, F32):
                for rows in (1, 8, 16):
                    for kind, N, K in (
                        ("qkv", C + 2 * D, C), ("proj", C, C), ("fc", 4 * C, C),
                        ("proj", C, 4 * C), ("argmax", 49_152, C),
                    ):  # fmt: skip
                        tiles = tuning.linear_tiles(dtype, rows, N, K, int8)
                        step = tiles.SPLIT_K * tiles.BLOCK_K
                        key = (kind, dtype, int8, tiles, K > tiles.STAGES * step, K % step == 0)
                        if key in seen:
                            continue
                        seen.add(key)
                        common = dict(dtype=dtype, int8=int8, shipped=N)
                        few = tiles.BLOCK_N + 5
                        if kind == "qkv":
                            B = 1 if rows == 1 else 4
                            more = dict(B=B, T=rows // B, H=H, G=1, D=D, lengths=[8, 0, 3, -1][:B])
                        elif kind == "argmax":
                            more = dict(rows=rows, C=C, V=few)
                        else:
                            activation = None if kind == "proj" else "gelu" if H > 22 else "gelu_tanh"
                            more = dict(rows=rows, K=K, N=few, activation=activation)
                        found.append((kind if kind in ("qkv", "argmax") else "linear", more | common))
    return found


def more_products() -> list[tuple[str, dict[str, Any]]]:
    """Widths that no tile divides, float16, other activations, no bias."""
    found: list[tuple[str, dict[str, Any]]] = []
    for dtype in (BF16, F16, F32):
        for int8 in (False, True):
            common = dict(dtype=dtype, int8=int8)
            found += [
                ("linear", dict(rows=3, K=2000, N=40, activation="relu", bias=False) | common),
                ("linear", dict(rows=5, K=768, N=72, activation="gelu_tanh") | common),
                ("linear", dict(rows=16, K=51, N=17, activation=None) | common),
                ("qkv", dict(B=3, T=2, H=6, G=3, D=20, lengths=[8, -1, 2]) | common),
                ("argmax", dict(rows=9, C=300, V=130) | common),
            ]
    for rows, K in ((17, 2048), (32, 768), (33, 600), (64, 2048)):
        found += [("int8_linear", dict(rows=rows, K=K, N=70, dtype=dtype)) for dtype in (BF16, F16)]
    found.append(("int8_linear", dict(rows=9, K=2048, N=40, dtype=F32)))
    return found


def attentions() -> list[tuple[str, dict[str, Any]]]:
    """Every tile of the attention kernels: head dims, numbers of heads, dtypes, ragged batches."""
    found: list[tuple[str, dict[str, Any]]] = []
    shapes = [
        (BF16, 32, 1, 128), (BF16, 12, 1, 64), (BF16, 8, 1, 256), (BF16, 22, 1, 80), (BF16, 3, 1, 96),
        (BF16, 16, 1, 32), (BF16, 4, 2, 128), (BF16, 4, 4, 128), (BF16, 6, 2, 64), (BF16, 2, 2, 256),
        (BF16, 5, 1, 16), (BF16, 48, 1, 128), (BF16, 3, 3, 24),
        (F16, 16, 1, 128), (F16, 4, 2, 64), (F16, 3, 1, 256),
        (F32, 4, 1, 64), (F32, 16, 1, 128), (F32, 4, 2, 80), (F32, 2, 1, 256), (F32, 6, 2, 16),
    ]  # fmt: skip
    for dtype, H, G, D in shapes:
        common = dict(H=H, G=G, D=D, dtype=dtype)
        found += [
            ("train", dict(B=1, T=20, S=20, start=[0]) | common),
            ("train", dict(B=2, T=7, S=150, start=[143, 60]) | common),
            ("decode", dict(B=2, T=1, S=1030, start=[1029, 64]) | common),
            ("decode", dict(B=1, T=3, S=600, start=[590]) | common),
        ]
    for dtype, D in ((BF16, 64), (BF16, 128), (BF16, 256), (F16, 128), (F32, 64), (F32, 128), (F32, 256)):
        common = dict(B=3, T=13, S=90, G=1, D=D, dtype=dtype, start=[70, 0, 77], lengths=[13, 6, 1])
        for H, G in ((8, 1), (2, 2)):
            found += [
                ("train", common | dict(H=H, G=G, left=[37, 0, 2])),
                ("train", common | dict(H=H, G=G, left=[75, 9, 0], p=0.3)),
            ]
    return found


def everything() -> list[tuple[str, dict[str, Any]]]:
    return SAMPLE + official_products() + more_products() + attentions()


@pytest.mark.parametrize("case", everything() if EVERYTHING else SAMPLE, ids=name_of)
def test_compiled_kernels_are_as_accurate_as_plain_pytorch(case, compiling):
    assert compiling(cases.run, *case)


@pytest.mark.parametrize("order", ORDERS[1:] if EVERYTHING else ["reverse"])
@pytest.mark.parametrize("case", SAMPLE if EVERYTHING else SAMPLE[2:4], ids=name_of)
def test_warps_may_run_in_any_order(case, order, compiling):
    assert compiling(cases.run, *case, order=order)
