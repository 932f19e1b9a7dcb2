"""Which product with a weight matrix is the fastest on this CPU, for how many rows?

    python -m benchmarks.cpu.products
    python -m benchmarks.cpu.products --sizes 2048x8192 --rows 1 8

A decode step multiplies a few rows by weights that no cache holds, so each product walks through
`--megabytes` of copies of its weight. The time is that of one product, and GB/s are the weight's
bytes over it. "Repeated" makes four rows of one or two. `mqa_gpt.fast.packing` acts on the answer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from mqa_gpt.fast.int8 import Int8Linear, quantize_rows
from mqa_gpt.fast.packing import PackedInt8Linear, PackedLinear, can_pack

INT4_GROUP = 32  # columns that share a scale
INT8_STEP = 16  # columns that PyTorch's product with 8-bit weights reads at a time
MOST_COPIES = 10_000  # of a weight so small that more would only measure Python

# A copy of a weight (N, K): its bytes, and its product with x (R, K) float32.
Copy = tuple[int, Callable[[Tensor], Tensor]]


def plain_float32(weight: Tensor) -> Copy:
    weight = weight.clone()
    return weight.nbytes, lambda x: F.linear(x, weight)


def plain_bfloat16(weight: Tensor) -> Copy:
    weight = weight.bfloat16()
    return weight.nbytes, lambda x: F.linear(x.bfloat16(), weight)


def onednn_float32(weight: Tensor) -> Copy:
    weight = weight.clone()
    return weight.nbytes, lambda x: torch.ops.mkldnn._linear_pointwise(
        x, weight, None, "none", [], ""
    )


def packed_float32(weight: Tensor, repeat_to: int = 1) -> Copy:
    return weight.nbytes, PackedLinear(as_layer(weight), repeat_to)


def packed_bfloat16(weight: Tensor, repeat_to: int = 1) -> Copy:
    layer = as_layer(weight.bfloat16())
    if not can_pack(layer):
        raise ValueError("the processor has no AVX512-BF16")
    product = PackedLinear(layer, repeat_to)
    return 2 * weight.numel(), lambda x: product(x.bfloat16())


def packed_int8(weight: Tensor, fbgemm: bool) -> Copy:
    return weight.numel(), PackedInt8Linear(Int8Linear(as_layer(weight)), fbgemm=fbgemm)


def int8_weights_only(weight: Tensor) -> Copy:
    K = weight.shape[1]
    if K % INT8_STEP:  # PyTorch does not check, and reads and writes other memory
        raise ValueError(f"K is {K}: it takes multiples of {INT8_STEP} only")
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


PRODUCTS: dict[str, Callable[[Tensor], Copy]] = {
    "float32": plain_float32,
    "float32 oneDNN": onednn_float32,
    "float32 packed": packed_float32,
    "float32 packed, repeated": partial(packed_float32, repeat_to=4),
    "bfloat16": plain_bfloat16,
    "bfloat16 packed": packed_bfloat16,
    "bfloat16 packed, repeated": partial(packed_bfloat16, repeat_to=4),
    "int8 oneDNN": partial(packed_int8, fbgemm=False),
    "int8 FBGEMM": partial(packed_int8, fbgemm=True),
    "int8 weights only, bfloat16": int8_weights_only,
    "int4 weights only, bfloat16": int4_weights_only,
}


def as_layer(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def copies(make: Callable[[Tensor], Copy], weight: Tensor, total: int) -> list[Copy]:
    """As many as fit into `total` bytes, at least two and at most `MOST_COPIES` more."""
    first = make(weight)
    more = min(max(1, total // first[0] - 1), MOST_COPIES)
    return [first, *(make(weight) for _ in range(more))]


def walk(held: list[Copy], x: Tensor) -> None:
    for _, product in held:
        product(x)


def measure(K: int, N: int, options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """The figures of all products, for one number of rows after another; then why others cannot."""
    weight = 0.02 * torch.randn(N, K)
    held, bytes_, reasons = {}, {}, {}
    for name, make in PRODUCTS.items():
        try:
            held[name] = copies(make, weight, options.megabytes * 1_000_000)
            bytes_[name] = held[name][0][0]
            walk(held[name][:1], torch.randn(1, K))
        # This PyTorch does not have it, or not in this size.
        except (AttributeError, RuntimeError, ValueError) as error:
            held.pop(name, None)
            reasons[name] = str(error).splitlines()[0]
    for R in options.rows:
        x = torch.randn(R, K)
        actions = {name: partial(walk, copies_, x) for name, copies_ in held.items()}
        times = interleaved(actions, options.repeats, f"{K} x {N}, {R} rows")
        seconds = {name: time["median"] / len(held[name]) for name, time in times.items()}
        yield [
            {
                "K": K,
                "N": N,
                "rows": R,
                "product": name,
                "ms": 1000 * seconds[name],
                "gb_per_s": bytes_[name] / seconds[name] / 1e9,
                "min_ms": 1000 * time["min"] / len(held[name]),
                "max_ms": 1000 * time["max"] / len(held[name]),
                "copies": len(held[name]),
            }
            for name, time in times.items()
        ]
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
        "--rows", type=positive, nargs="+", default=[1, 2, 4, 8, 16, 128], help="rows at once"
    )
    parser.add_argument("--repeats", type=positive, default=9, help="rounds of measurement")
    parser.add_argument("--megabytes", type=positive, default=200, help="of copies per product")
    options = parser.parse_args(arguments)
    output = result_path(options.output, "cpu_products.json")
    sizes = [size(text) for text in options.sizes]
    for K, N in sizes:
        require_room(K, N, options)
    if not can_pack(nn.Linear(1, 1)):
        parser.exit(1, "this PyTorch has no packed products on this machine\n")

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
