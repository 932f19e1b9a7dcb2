"""Which product with a weight matrix is the fastest on this CPU, for how many rows?

    python benchmarks/cpu_products.py
    python benchmarks/cpu_products.py --sizes 2048x8192 --rows 1 8

A decode step is products of a few rows with weights that no cache holds, so each contender walks
through as many copies of its weight as `--megabytes` hold. Its time is that of one product, and its
GB/s the weight's bytes over that. The answer decides what `mqa_gpt.packing` does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import RESULTS, interleaved, write_result
from torch import Tensor, nn

from mqa_gpt.packing import PackedInt8Linear, PackedLinear, can_pack
from mqa_gpt.quantization import Int8Linear, quantize_rows

INT4_GROUP = 32  # columns that share a scale

# One more copy of a weight (N, K): its bytes, and the product of x (R, K) float32 with it.
Copy = tuple[int, Callable[[Tensor], Tensor]]


def plain_float32(weight: Tensor) -> Copy:
    weight = weight.clone()
    return weight.nbytes, lambda x: F.linear(x, weight)


def plain_bfloat16(weight: Tensor) -> Copy:
    weight = weight.bfloat16()
    return weight.nbytes, lambda x: F.linear(x.bfloat16(), weight)


def packed_float32(weight: Tensor) -> Copy:
    return weight.nbytes, PackedLinear(as_layer(weight))


def packed_int8(weight: Tensor) -> Copy:
    return weight.numel(), PackedInt8Linear(Int8Linear(as_layer(weight)))


def int8_weights_only(weight: Tensor) -> Copy:
    integers, scale = quantize_rows(weight)
    scale = scale.bfloat16()
    return integers.nbytes, lambda x: torch._weight_int8pack_mm(x.bfloat16(), integers, scale)


def int4_weights_only(weight: Tensor) -> Copy:
    N, K = weight.shape
    integers = torch.randint(16, (N, K), dtype=torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(integers, 1)
    scales = torch.rand(K // INT4_GROUP, N, 2).bfloat16()  # and zero points
    return packed.nbytes + scales.nbytes, lambda x: torch._weight_int4pack_mm_for_cpu(
        x.bfloat16(), packed, INT4_GROUP, scales
    )


CONTENDERS = {
    "float32": plain_float32,
    "float32 packed": packed_float32,
    "bfloat16": plain_bfloat16,
    "int8 packed": packed_int8,
    "int8 weights only, bfloat16": int8_weights_only,
    "int4 weights only, bfloat16": int4_weights_only,
}


def as_layer(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def copies(contender: Callable[[Tensor], Copy], weight: Tensor, total: int) -> list[Copy]:
    """At least two, and as many as `total` bytes hold."""
    first = contender(weight)
    return [first, *(contender(weight) for _ in range(max(1, total // first[0] - 1)))]


def walk(held: list[Copy], x: Tensor) -> None:
    for _, product in held:
        product(x)


def measure(K: int, N: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row of figures for each contender and number of rows."""
    weight = 0.02 * torch.randn(N, K)
    held, bytes_, reasons = {}, {}, {}
    for name, contender in CONTENDERS.items():
        try:
            held[name] = copies(contender, weight, options.megabytes * 1_000_000)
            bytes_[name] = held[name][0][0]
            walk(held[name][:1], torch.randn(1, K))
        except (AttributeError, RuntimeError) as error:  # this PyTorch does not have it
            held.pop(name, None)
            reasons[name] = str(error).splitlines()[0]
    for R in options.rows:
        x = torch.randn(R, K)
        actions = {name: partial(walk, copies_, x) for name, copies_ in held.items()}
        times = interleaved(actions, options.repeats, f"{K} x {N}, {R} rows")
        for name, time in times.items():
            seconds = time["median"] / len(held[name])
            yield {
                "K": K,
                "N": N,
                "rows": R,
                "product": name,
                "ms": 1000 * seconds,
                "gb_per_s": bytes_[name] / seconds / 1e9,
                "min_ms": 1000 * time["min"] / len(held[name]),
                "max_ms": 1000 * time["max"] / len(held[name]),
                "copies": len(held[name]),
            }
    for name, reason in reasons.items():
        yield {"K": K, "N": N, "product": name, "reason": reason}


def table(figures: list[dict[str, Any]]) -> Iterator[str]:
    """Milliseconds, one line for each size and number of rows."""
    names = list(CONTENDERS)
    yield " | ".join(["  K x N, rows", *names])
    timed = [row for row in figures if "ms" in row]
    for K, N, R in dict.fromkeys((row["K"], row["N"], row["rows"]) for row in timed):
        found = {
            row["product"]: row["ms"]
            for row in timed
            if (row["K"], row["N"], row["rows"]) == (K, N, R)
        }
        cells = [f"{found[name]:.3f}" if name in found else "-" for name in names]
        cells = [cell.rjust(len(name)) for cell, name in zip(cells, names, strict=True)]
        yield " | ".join([f"{K} x {N}, {R}".rjust(13), *cells])


def size(text: str) -> tuple[int, int]:
    K, N = map(int, text.split("x"))
    return K, N


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--sizes", nargs="+", default=["768x3072", "768x49152", "2048x8192"], help="K x N"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 128])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--megabytes", type=int, default=200, help="of copies per contender")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/cpu_products.json")
    options = parser.parse_args(arguments)
    if not can_pack(nn.Linear(1, 1)):
        parser.exit(message="this PyTorch has no packed products on this machine\n")

    torch.manual_seed(0)
    figures: list[dict[str, Any]] = []
    with torch.inference_mode():
        for K, N in map(size, options.sizes):
            figures += measure(K, N, options)
    print("\n".join(table(figures)))
    for row in figures:
        if "reason" in row:
            print(f"{row['product']}: {row['reason']}")
    write_result(
        options.output or RESULTS / "cpu_products.json", __doc__.split("\n")[0], options, figures
    )


if __name__ == "__main__":
    main()
