"""Which form of the forward kernel's loop is the fastest?

    PYTHONPATH=.:kernels:scripts python benchmarks/forward_forms.py
    PYTHONPATH=.:kernels:scripts python benchmarks/forward_forms.py --length 2048 --head-dim 64

Beside the kernel that is shipped, with its own tiles and others: one loop whose keys and values
travel by descriptors (TMA), with all warps alike, and with warps of their own for loading and for
products (warp specialization). That needs one loop without a branch, so every block is masked.
`gluon_form.py` holds one in Gluon, where softmax and products overlap too.
Needs a GPU. Without one it compiles the forms for sm_90, and prints what they need of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl
from clock import Clock
from contenders import Attempt, Problem, Row, compete, make_inputs, measured
from gluon_form import gluon_attention
from judge import find_truth
from measure import (
    make_parser,
    nothing_measured,
    place,
    positive,
    refuse_bad_input,
    require_memory,
    result_path,
    within,
    write_result,
)
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mqa_kernels import attention
from mqa_kernels.tiles import LOG2E, dot, narrow
from mqa_kernels.tuning import Tiles

SHIPPED = "shipped"
FORWARD_TILES = "mqa_kernels.forward.forward_tiles"


class Form(NamedTuple):
    """How a forward pass is computed.

    Attributes:
        kind: "pointers", the shipped kernel; "descriptors" and "specialized", `described_kernel`
            with warps that are all alike or not; "gluon", `gluon_kernel`.
        tiles: None for those that are shipped.
    """

    kind: str = "pointers"
    tiles: Tiles | None = None

    @property
    def name(self) -> str:
        """As in the table."""
        if self.tiles is None:
            return SHIPPED
        M, N, warps, stages = self.tiles
        return f"{self.kind}, {M}x{N}, {warps} warps, {stages} stages"


def forms_of(kind: str, *tiles: tuple[int, int, int, int]) -> tuple[Form, ...]:
    """Forms of one kind."""
    return tuple(Form(kind, Tiles(*sizes)) for sizes in tiles)


POINTERS = forms_of(
    "pointers", (64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3)
)
DESCRIBED = forms_of(
    "descriptors",
    *((64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2)),
)
# Triton 3.7.1 fails to compile the ones with 128 rows, and with 8 warps no version specializes.
SPECIALIZED = forms_of("specialized", (64, 64, 4, 2), (128, 64, 4, 2), (128, 128, 4, 2))
GLUON = forms_of("gluon", (128, 64, 9, 2), (128, 64, 9, 3), (128, 128, 9, 1), (128, 128, 9, 2))
FORMS = (Form(), *POINTERS, *DESCRIBED, *SPECIALIZED, *GLUON)


@triton.jit  # type: ignore[untyped-decorator]
def described_kernel(  # type: ignore[no-untyped-def]
    q_descriptor, k_descriptor, v_descriptor, out_ptr, lse_ptr, T, scale_log2,
    H: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """Causal attention from position 0 on of one tile of M folded rows; `forward_kernel` explains.

    Grid: (row tiles, B). The descriptors are of (B * T, D), and their blocks (N, D) tiles of keys
    or values; beyond a row's T they hold what is of no influence, but must be finite.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    b = tl.program_id(1)
    rows = tile * M + tl.arange(0, M)  # (M,)
    t = rows // H
    channels = tl.arange(0, D)
    q = q_descriptor.load([b * T * H + tile * M, 0])  # (M, D)

    end = tl.minimum((tile * M + M - 1) // H + 1, T)  # keys that the last row sees
    acc = tl.zeros([M, D], tl.float32)
    total = tl.zeros([M], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    for block in tl.range(0, tl.cdiv(end, N), warp_specialize=SPECIALIZED):
        keys = block * N + tl.arange(0, N)  # (N,)
        k = k_descriptor.load([b * T + block * N, 0])
        scores = dot(q, tl.trans(k), tl.zeros([M, N], tl.float32))  # (M, N)
        scores = tl.where(keys[None, :] <= t[:, None], scores, float("-inf"))
        # Every row sees key 0, in the first block, so that no maximum is -inf.
        new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)  # (M,)
        p = tl.exp2(scores * scale_log2 - new_top[:, None])  # (M, N)
        shrink = tl.exp2(top - new_top)  # (M,)
        total = total * shrink + tl.sum(p, 1)
        v = v_descriptor.load([b * T + block * N, 0])
        acc = dot(narrow(p, v.dtype), v, acc * shrink[:, None])  # (M, D)
        top = new_top

    out_rows = b.to(tl.int64) * T * H + rows
    tl.store(lse_ptr + out_rows, (top + tl.log2(total)) / LOG2E, mask=t < T)
    tl.store(
        out_ptr + out_rows[:, None] * D + channels[None, :],
        narrow(acc / total[:, None], out_ptr.dtype.element_ty),
        mask=(t < T)[:, None],
    )


def described_attention(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, specialized: bool) -> Tensor:
    """Causal attention of q (B, T, H, D) over k and v (B, T, 1, D), D a power of two from 16 on.

    Descriptors demand that rows of k and v begin at multiples of 16 bytes. Theirs have two
    dimensions because with more Triton specializes no warps; so queries that are parts of wider
    rows are copied first.
    """
    B, T, H, D = q.shape
    out = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, T, H), dtype=torch.float32, device=q.device)
    rows = TensorDescriptor.from_tensor(q.reshape(B * T * H, D), [tiles.M, D])
    blocks = [TensorDescriptor.from_tensor(x.view(B * T, D), [tiles.N, D]) for x in (k, v)]
    described_kernel[(triton.cdiv(T * H, tiles.M), B)](
        rows, *blocks, out, lse, T, D**-0.5 * LOG2E.value,
        H=H, D=D, M=tiles.M, N=tiles.N, SPECIALIZED=specialized,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out


def attend(form: Form, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What a form computes."""
    if form.tiles is None:
        return attention(q, k, v)
    if form.kind == "pointers":
        with mock.patch(FORWARD_TILES, return_value=form.tiles):
            return attention(q, k, v)
    if form.kind == "gluon":
        return gluon_attention(q, k, v, form.tiles.N, form.tiles.stages)
    return described_attention(q, k, v, form.tiles, form.kind == "specialized")


def race(problem: Problem, clock: Clock, forms: tuple[Form, ...], repeats: int) -> list[Row]:
    """All forms in turn; "whole" in seconds and "tflops", or why a form does not run."""
    q, k, v = make_inputs(problem, clock.device)
    record = clock.recorder()

    def attempt(form: Form) -> Attempt:
        run: Callable[[], Tensor] = partial(attend, form, q, k, v)
        return Attempt({"out": run()}, {"whole": record(run)}, {"form": form})

    with torch.no_grad():
        attempts = {form.name: partial(attempt, form) for form in forms}
        rows = compete(attempts, find_truth(q, k, v, 0), clock, repeats, f"forms {problem}")
    for row in measured(rows):
        row["tflops"] = problem.flops() / row["whole"]["median"] / 1e12
    return rows


def compile_forms(problem: Problem, forms: tuple[Form, ...]) -> Iterator[dict[str, Any]]:
    """What the forms need of sm_90, by the compiler; no GPU is needed."""
    from check_kernels import GPUS, AbsentGPU, Case, examine, verdict
    from triton.runtime import driver

    case = Case(90, str(problem.dtype).removeprefix("torch."), problem.D, 1, "forms")
    driver.set_active(AbsentGPU(case.arch))
    compile_launch = triton.JITFunction.run
    made: list[Any] = []

    def record(kernel, *arguments, grid, warmup, **options):  # type: ignore[no-untyped-def]
        made.append(compile_launch(kernel, *arguments, grid=grid, warmup=True, **options))

    q, k, v = make_inputs(problem, torch.device("cpu"))
    with (
        mock.patch.object(triton.JITFunction, "run", record),
        mock.patch("mqa_kernels.launch.runs_on", return_value=True),
        mock.patch("mqa_kernels.launch.architecture", return_value=case.arch),
        mock.patch(
            "mqa_kernels.forward.multiprocessors", return_value=GPUS[case.arch].multiprocessors
        ),
    ):
        for form in forms:
            row: dict[str, Any] = {"form": form.name}
            try:
                attend(form, q, k, v)
                compiled = made.pop()
                usage = examine(case, described_kernel.__name__, form.name, compiled)
                row |= {
                    "registers": usage.registers,
                    "shared": usage.shared,
                    "blocks": usage.blocks,
                    "specialized": "setmaxnreg" in compiled.asm["ptx"],
                    "problem": verdict(case, usage),
                }
            except Exception as error:  # the compiler raises many kinds
                row["problem"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            yield row


@refuse_bad_input
def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "forward_forms_*.json")
    parser.add_argument("--batch", type=positive, default=2, help="sequences")
    parser.add_argument("--length", type=positive, default=8192, help="tokens of each")
    parser.add_argument("--heads", type=positive, default=32, help="query heads")
    parser.add_argument("--head-dim", type=within(1, 256), default=128, help="numbers per head")
    parser.add_argument("--repeats", type=positive, default=15, help="rounds of measurement")
    options = parser.parse_args(arguments)
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    where = place(device) if has_gpu else f"sm_90_triton_{triton.__version__}"
    output = result_path(options.output, f"forward_forms_{where}.json")
    problem = Problem(
        options.batch, options.length, options.length, options.heads, options.head_dim
    )
    inputs = problem.B * problem.T * (problem.H + 2) * problem.D * problem.dtype.itemsize
    require_memory(inputs, device)
    if has_gpu:
        rows = race(problem, Clock(device), FORMS, options.repeats)
        for row in sorted(rows, key=lambda row: -row.get("tflops", 0)):
            speed = f"{row['tflops']:.0f} TFLOP/s" if "tflops" in row else row["refused"]
            print(f"{row['contender']:40}{speed}{'' if row.get('right', True) else ', NOT RIGHT'}")
    else:
        print("no GPU: what the compiler makes of the forms for sm_90")
        rows = list(compile_forms(problem, FORMS))
        for row in rows:
            print(f"{row['form']:40}{needs(row)}{row['problem']}")
    if not any("tflops" in row or "registers" in row for row in rows):
        return nothing_measured()
    return write_result(output, __doc__.split("\n")[0], options, rows)


def needs(row: Row) -> str:
    """What a form that compiles needs of a multiprocessor."""
    if "registers" not in row:
        return ""
    text = "{registers} registers, {shared:,} bytes shared, {blocks} blocks".format(**row)
    return text + ", specialized" * row["specialized"] + " "


if __name__ == "__main__":
    sys.exit(main())
