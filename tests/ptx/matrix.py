"""Which cases are run: a sample of every family of kernels, and every tile that is shipped."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from mqa_kernels import tuning

Case = tuple[str, dict[str, Any]]  # a name in `cases.CASES`, and arguments
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# H and D of the official models, with C = H D.
OFFICIAL = ((12, 64), (16, 128), (22, 128), (32, 128), (48, 128))


def case(name: str, **arguments: Any) -> Case:
    return name, arguments


def name_of(case: Case) -> str:
    name, arguments = case
    return name + "".join(f"-{key}={value}" for key, value in arguments.items())


# One or two of each family, with the tiles that the official models use.
SAMPLE = [
    case("linear", rows=1, K=2048, N=20),
    case("linear", rows=8, K=1000, N=20, activation=None, int8=True),
    case("linear", rows=20, K=1024, N=70, shipped=4096),
    case("linear", rows=20, K=1024, N=70, shipped=4096, int8=True),
    case("qkv", B=2, T=3, H=4, G=1, D=64, lengths=[4, 0]),
    case("argmax", rows=3, C=768, V=20),
    case("decode", B=1, T=1, S=600, H=32, G=1, D=128, start=[590]),
    case("train", B=1, T=9, S=80, H=32, G=1, D=128, start=[70]),
    case(
        "train", B=2, T=9, S=30, H=4, G=2, D=64, start=[21, 14], lengths=[9, 5], left=[0, 3], p=0.2
    ),
]  # fmt: skip


def official_products() -> list[Case]:
    """A few outputs of every kind of tile that an official model's products use."""
    found: dict[Any, Case] = {}
    for (H, D), int8, (dtype, rows) in itertools.product(
        OFFICIAL,
        (False, True),
        [*itertools.product((BF16, F32), (1, 8, 16)), (BF16, 32), (BF16, 64)],
    ):
        C = H * D
        common = {"dtype": dtype, "int8": int8}
        B = 1 if rows == 1 else 4
        activation = "gelu" if H > 22 else "gelu_tanh"
        products = [
            (C + 2 * D, C, case("qkv", B=B, T=rows // B, H=H, G=1, D=D, lengths=[8, 0, 3, -1][:B])),
            (49_152, C, case("argmax", rows=rows, C=C)),
            (4 * C, C, case("linear", rows=rows, K=C, activation=activation)),
            (C, C, case("linear", rows=rows, K=C, activation=None)),
            (C, 4 * C, case("linear", rows=rows, K=4 * C, activation=None)),
        ]
        for N, K, (name, arguments) in products:
            tiles = tuning.linear_tiles(dtype, rows, N, K, int8)
            key = [name, dtype, int8, tiles, arguments.get("activation")]
            if name == "linear":  # also the loop's length and end
                step = tiles.SPLIT_K * tiles.BLOCK_K
                key += [tiles.STAGES * step < K, K % step == 0]
            few = {
                "qkv": {},
                "argmax": {"V": tiles.BLOCK_N + 5},
                "linear": {"N": tiles.BLOCK_N + 5},
            }
            more = {**arguments, **few[name], **common, "shipped": N}
            found.setdefault(tuple(key), case(name, **more))
    return list(found.values())


def more_products() -> list[Case]:
    """Widths that no tile divides, float16, other activations, no bias."""
    found = []
    for dtype, int8 in itertools.product((BF16, F16, F32), (False, True)):
        common = {"dtype": dtype, "int8": int8}
        found += [
            case("linear", rows=3, K=2000, N=40, activation="relu", bias=False, **common),
            case("linear", rows=5, K=768, N=72, activation="gelu_tanh", **common),
            case("linear", rows=16, K=51, N=17, activation=None, **common),
            case("qkv", B=3, T=2, H=6, G=3, D=20, lengths=[8, -1, 2], **common),
            case("argmax", rows=9, C=300, V=130, **common),
        ]
        if dtype != F32:
            found.append(case("linear", rows=37, K=600, N=72, activation="relu", **common))
            found.append(case("argmax", rows=50, C=300, V=130, **common))
    for rows, K in ((17, 2048), (32, 768), (33, 600), (64, 2048)):
        found += [case("int8_linear", rows=rows, K=K, N=70, dtype=dtype) for dtype in (BF16, F16)]
    return [*found, case("int8_linear", rows=9, K=2048, N=40, dtype=F32)]


def attentions() -> list[Case]:
    """Every tile of the attention kernels: head dims, numbers of heads, dtypes, ragged batches."""
    found = []
    for dtype, H, G, D in [
        (BF16, 32, 1, 128), (BF16, 12, 1, 64), (BF16, 8, 1, 256), (BF16, 22, 1, 80),
        (BF16, 3, 1, 96), (BF16, 16, 1, 32), (BF16, 4, 2, 128), (BF16, 4, 4, 128),
        (BF16, 6, 2, 64), (BF16, 2, 2, 256), (BF16, 5, 1, 16), (BF16, 48, 1, 128),
        (BF16, 3, 3, 24), (F16, 16, 1, 128), (F16, 4, 2, 64), (F16, 3, 1, 256),
        (F32, 4, 1, 64), (F32, 16, 1, 128), (F32, 4, 2, 80), (F32, 2, 1, 256), (F32, 6, 2, 16),
    ]:  # fmt: skip
        common = {"H": H, "G": G, "D": D, "dtype": dtype}
        found += [
            case("train", B=1, T=20, S=20, start=[0], **common),
            case("train", B=2, T=7, S=150, start=[143, 60], **common),
            case("decode", B=2, T=1, S=1030, start=[1029, 64], **common),
            case("decode", B=1, T=3, S=600, start=[590], **common),
        ]
    # Rows of a whole forward tile, and splits of its keys: wgmma in a loop with and without a mask.
    found.append(case("decode", B=1, T=4, S=1030, H=32, G=1, D=128, start=[1026]))
    found.append(case("decode", B=1, T=128, S=270, H=1, G=1, D=128, start=[130]))
    ragged = {"B": 3, "T": 13, "S": 90, "start": [70, 0, 77], "lengths": [13, 6, 1]}
    for dtype, D in (
        (BF16, 64), (BF16, 128), (BF16, 256), (F16, 128), (F32, 64), (F32, 128), (F32, 256),
    ):  # fmt: skip
        for H, G in ((8, 1), (2, 2)):
            common = {**ragged, "H": H, "G": G, "D": D, "dtype": dtype}
            found.append(case("train", left=[37, 0, 2], **common))
            found.append(case("train", left=[75, 9, 0], p=0.3, **common))
    return found


def everything() -> list[Case]:
    return SAMPLE + attentions() + more_products() + official_products()
