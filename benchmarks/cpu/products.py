"""Why does a compiled pass multiply on a CPU, and not PyTorch's operators?

    python -m benchmarks.cpu.products
    python -m benchmarks.cpu.products --sizes 2048x8192 --rows 1 8

The product of a few rows with a weight matrix, in the shapes of the official checkpoints, by the
compiled pass (`mqa_kernels.cpu.linear`) and by what PyTorch has: the plain product, which
transformers uses, oneDNN's with weights in a layout of its own, FBGEMM's of 8-bit integers, and
`_int_mm`. A step meets weights that no cache holds, so each walks through `--megabytes` of copies
of its weight, PyTorch's in one call for each, as in a step. The time is that of one product, and
GB/s are the weight's bytes over it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import (
    interleaved,
    make_parser,
    nothing_measured,
    positive,
    refuse_bad_input,
    require_memory,
    result_path,
    write_result,
)
from mqa_gpt.errors import shown
from mqa_gpt.fast.int8 import quantize_rows

MOST_COPIES = 10_000  # of a weight so small that more would only measure Python

# Multiplies x (R, K) float32 by all copies of a weight (N, K); the last product (R, N).
Walk = Callable[[Tensor], Tensor]


class Product(NamedTuple):
    """A way to multiply: bytes of a weight, and (weight, copies) -> a `Walk`."""

    itemsize: int
    make: Callable[[Tensor, int], Walk]


def compiled(weight: Tensor, copies: int, **options: Any) -> Walk:
    return import_module("benchmarks.cpu.compiled_product").walk(weight, copies, **options)


def one_by_one(make: Callable[[Tensor], Walk]) -> Callable[[Tensor, int], Walk]:
    """A call for each copy."""

    def walk(weight: Tensor, copies: int) -> Walk:
        products = [make(weight) for _ in range(copies)]
        return lambda x: [product(x) for product in products][-1]

    return walk


def plain(weight: Tensor, dtype: torch.dtype) -> Walk:
    weight = weight.to(dtype, copy=True)
    return lambda x: F.linear(x.to(dtype), weight)


def onednn(weight: Tensor, dtype: torch.dtype) -> Walk:
    operators = torch.ops.mkldnn
    if dtype == torch.bfloat16 and not operators._is_mkldnn_bf16_supported():
        raise ValueError("the processor does not multiply bfloat16")
    packed = operators._reorder_linear_weight(weight.to(dtype), None)
    return lambda x: operators._linear_pointwise(x.to(dtype), packed, None, "none", [], "")


def fbgemm(weight: Tensor) -> Walk:
    """With one scale for all rows of x."""
    integers, scale = quantize_rows(weight)
    zeros = torch.zeros(len(scale), dtype=torch.int64)
    quantized = torch._make_per_channel_quantized_tensor(integers, scale.double(), zeros, 0)
    packed = torch.ops.quantized.linear_prepack(quantized, None)
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed)


def int_mm(weight: Tensor) -> Walk:
    integers, scale = quantize_rows(weight)

    def product(x: Tensor) -> Tensor:
        rows, factors = quantize_rows(x)
        return torch._int_mm(rows, integers.T) * (factors[:, None] * scale)

    return product


PRODUCTS = {
    "float32 compiled": Product(4, partial(compiled, dtype=torch.float32)),
    "float32 plain": Product(4, one_by_one(partial(plain, dtype=torch.float32))),
    "float32 oneDNN": Product(4, one_by_one(partial(onednn, dtype=torch.float32))),
    "bfloat16 compiled": Product(2, partial(compiled, dtype=torch.bfloat16)),
    "bfloat16 oneDNN": Product(2, one_by_one(partial(onednn, dtype=torch.bfloat16))),
    "int8 compiled": Product(1, partial(compiled, dtype=torch.int8)),
    "int8 compiled, rounded rows": Product(1, partial(compiled, dtype=torch.int8, rounds=True)),
    "int8 FBGEMM": Product(1, one_by_one(fbgemm)),
    "int8 _int_mm": Product(1, one_by_one(int_mm)),
}


def measure(K: int, N: int, options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """The figures of all products, for one number of rows after another; then why others cannot."""
    weight = 0.02 * torch.randn(N, K)
    walks: dict[str, tuple[int, Walk]] = {}  # copies, and the walk through them
    reasons = {}
    for name, product in PRODUCTS.items():
        room = options.megabytes * 1_000_000 // (product.itemsize * K * N)
        copies = min(max(2, room), MOST_COPIES)
        try:
            walks[name] = copies, product.make(weight, copies)
            walks[name][1](torch.randn(1, K))
        # This machine or this PyTorch does not have it, or not in this size.
        except (ImportError, AttributeError, RuntimeError, ValueError) as error:
            walks.pop(name, None)
            reasons[name] = str(error).splitlines()[0]
    for R in options.rows:
        x = torch.randn(R, K)
        actions = {name: partial(walk, x) for name, (_, walk) in walks.items()}
        times = interleaved(actions, options.repeats, f"{K} x {N}, {R} rows")
        rows = []
        for name, time in times.items():
            copies, seconds = walks[name][0], time["median"] / walks[name][0]
            figures = {"K": K, "N": N, "rows": R, "product": name, "ms": 1000 * seconds}
            figures["gb_per_s"] = PRODUCTS[name].itemsize * K * N / seconds / 1e9
            figures |= {f"{end}_ms": 1000 * time[end] / copies for end in ("min", "max")}
            rows.append(figures | {"copies": copies})
        yield rows
    yield [{"K": K, "N": N, "product": name, "reason": reason} for name, reason in reasons.items()]


def line(rows: list[dict[str, Any]]) -> str:
    """Milliseconds of all products for one size and number of rows."""
    found = {row["product"]: f"{row['ms']:.3f}" for row in rows}
    cells = [found.get(name, "-").rjust(len(name)) for name in PRODUCTS]
    case = "{K} x {N}, {rows}".format(**rows[0])
    return " | ".join([case.rjust(18), *cells])


def size(text: str) -> tuple[int, int]:
    """K and N of a text such as 768x3072; for argparse."""
    K, found, N = text.partition("x")
    if not found:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a size such as 768x3072")
    return positive(K), positive(N)


def require_room(K: int, N: int, options: argparse.Namespace) -> None:
    """Raise InputError if weight, rows and copies, of 4 bytes a number at most, do not fit."""
    copies_bytes = max(2 * 4 * K * N, options.megabytes * 1_000_000)
    needed = len(PRODUCTS) * copies_bytes + 3 * 4 * K * N + 3 * 4 * max(options.rows) * (K + N)
    require_memory(needed, torch.device("cpu"))


@refuse_bad_input
def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "cpu_products.json")
    parser.add_argument(
        "--sizes",
        type=lambda text: "{}x{}".format(*size(text)),
        nargs="+",
        default=["768x3072", "768x49152", "2048x8192"],
        metavar="KxN",
        help="inputs times outputs of the weights",
    )
    parser.add_argument(
        "--rows", type=positive, nargs="+", default=[1, 2, 4, 8, 16], help="rows at once"
    )
    parser.add_argument("--repeats", type=positive, default=9, help="rounds of measurement")
    parser.add_argument("--megabytes", type=positive, default=200, help="of copies per product")
    options = parser.parse_args(arguments)
    output = result_path(options.output, "cpu_products.json")
    sizes = [size(text) for text in options.sizes]
    for K, N in sizes:
        require_room(K, N, options)

    torch.manual_seed(0)
    figures: list[dict[str, Any]] = []
    print(" | ".join(["K x N, rows; in ms", *PRODUCTS]))
    with torch.inference_mode():
        for K, N in sizes:
            for rows in measure(K, N, options):
                figures += rows
                if rows and "ms" in rows[0]:
                    print(line(rows), flush=True)
    for row in figures:
        if "reason" in row:
            print("{K} x {N}, {product}: {reason}".format(**row))
    if not any("ms" in row for row in figures):
        return nothing_measured()
    return write_result(output, __file__, __doc__, options, figures)


if __name__ == "__main__":
    sys.exit(main())
