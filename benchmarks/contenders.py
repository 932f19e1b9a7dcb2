"""The ways to compute causal attention with one key/value head that are measured side by side.

Each case gives every contender the same random inputs, laid out as the model has them, compares the
answers with float64 (see judge.py), and then times all of them in turn. What a contender cannot do
is in its result as a refusal with the reason.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from clock import Action, Clock
from judge import Truth, find_truth, plain_attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from mqa_gpt.bench.counts import BACKWARD, attention_flops
from mqa_kernels import attention

OURS, PLAIN, FLEX = "mqa_kernels", "plain PyTorch", "FlexAttention"
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
EXPANDED, COPIED, GROUPED, FOLDED = "heads expanded", "heads copied", "enable_gqa", "heads folded"

MOST_SCORES = 2**30  # B * H * T * S of those that hold them all in memory
MOST_COPIED = 4 << 30  # bytes of keys (or values) repeated for every head
CACHES = 16  # that decoding runs over in one measurement, or fewer that ...
CACHES_BYTES = 1 << 30  # ... hold this together

Row = dict[str, Any]


class Problem(NamedTuple):
    """Causal attention of T new queries over S slots; one key/value head for all H."""

    B: int
    T: int
    S: int
    H: int
    D: int
    dtype: torch.dtype = torch.bfloat16

    def flops(self) -> int:
        """Multiplications and additions of both products, hidden scores left out."""
        return attention_flops(self.B, self.T, self.S, self.H, self.D)

    def kv_bytes(self) -> int:
        """Keys and values, each read once."""
        return 2 * self.B * self.S * self.D * self.dtype.itemsize

    def describe(self) -> Row:
        """For JSON."""
        return self._asdict() | {"dtype": str(self.dtype).removeprefix("torch.")}


class Contender(NamedTuple):
    """One way to compute attention.

    Attributes:
        attend: q (B, T, H, D) and what `arrange` made of k and v -> (B, T, H, D).
        arrange: k or v (B, S, 1, D) -> what `attend` wants; not timed, except with gradients.
    """

    name: str
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    arrange: Callable[[Tensor], Tensor] = lambda x: x


def make_inputs(
    problem: Problem, device: torch.device, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, T, H, D), k and v (B, S, 1, D), random normal.

    They are views as the model makes them: of one projection's output (B, T, (H + 2) D), or k and v
    of a cache (B, S, 2 D).
    """
    B, T, S, H, D, dtype = problem
    generator = torch.Generator(device).manual_seed(seed)
    normal = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    qkv = normal(B, T, (H + 2) * D)
    q = qkv[..., : H * D].view(B, T, H, D)
    kv = qkv[..., H * D :] if S == T else normal(B, S, 2 * D)
    k, v = kv.view(B, S, 1, 2 * D).chunk(2, -1)
    return q, k, v


def contenders(problem: Problem, device: torch.device, flex: bool) -> list[Contender]:
    """All of them, ours first.

    Args:
        flex: FlexAttention too, which takes seconds to compile for each problem.
    """
    B, T, S, H, D, dtype = problem
    first = S - T  # position of the first query
    # Ours reads the position on the device, as one CUDA graph for all steps of decoding needs it.
    start = torch.full((B,), first, device=device) if first else 0

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, start)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain_attention(q, k, v, first)

    def expand(x: Tensor) -> Tensor:
        return x.expand(-1, -1, H, -1)  # (B, S, H, D), without a copy

    def copy(x: Tensor) -> Tensor:
        return expand(x).contiguous()  # (B, S, H, D)

    too_many_scores = B * H * T * S > MOST_SCORES
    too_many_copies = B * S * H * D * dtype.itemsize > MOST_COPIED
    everyone = [Contender(OURS, ours)]
    for name, backend in SDPA.items():
        attend = partial(sdpa_attention, backend)
        if name == "math" and (too_many_scores or too_many_copies):
            everyone.append(Contender(name, refusing("left out: it would fill the memory")))
            continue
        everyone.append(Contender(f"{name}, {EXPANDED}", attend, expand))
        everyone.append(Contender(f"{name}, {GROUPED}", partial(attend, enable_gqa=True)))
        if T == 1:
            everyone.append(Contender(f"{name}, {FOLDED}", partial(folded_attention, backend)))
        elif not too_many_copies:
            everyone.append(Contender(f"{name}, {COPIED}", attend, copy))
    if flex:
        everyone.append(Contender(FLEX, prepared_flex_attention(problem, device)))
    else:
        everyone.append(Contender(FLEX, refusing("left out: compiling it takes seconds")))
    if too_many_scores:
        everyone.append(Contender(PLAIN, refusing("left out: it would fill the memory")))
    else:
        everyone.append(Contender(PLAIN, plain))
    return everyone


def refusing(reason: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """What stands for a contender that is not even tried."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError(reason)

    return attend


def sdpa_attention(
    backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool = False
) -> Tensor:
    """PyTorch's attention on one backend; k and v (B, S, H, D), or (B, S, 1, D) with enable_gqa."""
    T, S = q.shape[1], k.shape[1]
    causality: dict[str, Any] = {"is_causal": T == S and T > 1}
    if 1 < T < S:
        causality = {"attn_mask": causal_lower_right(T, S)}
    with sdpa_kernel(backend):
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            enable_gqa=enable_gqa,
            **causality,
        )
    return y.transpose(1, 2)


def folded_attention(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One new token: its H heads (B, 1, H, D) are H queries of one head; k, v (B, S, 1, D)."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2))


def prepared_flex_attention(
    problem: Problem, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention, compiled for one problem on a GPU; on a CPU it is tried out as it is."""
    T, S = problem.T, problem.S
    mask = None

    def causal(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query + (S - T) >= key

    if T > 1:
        mask = create_block_mask(causal, None, None, T, S, device=str(device))
    # From nothing each time: after a few shapes PyTorch would compile for all shapes at once.
    torch.compiler.reset()
    run: Callable[..., Any] = flex_attention
    if device.type == "cuda":
        run = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        y: Tensor = run(*heads_first, block_mask=mask, enable_gqa=True)
        return y.transpose(1, 2)

    return attend


class Attempt(NamedTuple):
    """What one contender makes of a case.

    Attributes:
        answers: "out", "dq", "dk", "dv", as far as it computes them.
        actions: what is to be timed, by name.
        figures: what else there is to say.
    """

    answers: dict[str, Tensor | None]
    actions: dict[str, Action]
    figures: Row


def compete(
    attempts: Mapping[str, Callable[[], Attempt]],
    truth: Truth,
    clock: Clock,
    repeats: int,
    label: str,
) -> list[Row]:
    """Try every contender, judge its answers, then time all that did not refuse, in turn.

    Args:
        attempts: by the contender's name.

    Returns:
        One row each: "contender", and either "refused", the reason, or "right", "verdicts", the
        attempt's figures, and per action its "median", "min" and "max" seconds.
    """
    rows: list[Row] = []
    actions: dict[str, Action] = {}
    for name, attempt in attempts.items():
        row: Row = {"contender": name}
        rows.append(row)
        with refusals(row, clock):
            answers, mine, figures = attempt()
            verdicts = truth.judge(answers)
            row["right"] = all(verdict.passed for verdict in verdicts.values())
            row["verdicts"] = {part: verdict._asdict() for part, verdict in verdicts.items()}
            row |= figures
            actions |= {f"{name}: {part}": action for part, action in mine.items()}
        clock.release()
    times = clock.times(actions, repeats, label)
    by_name = {row["contender"]: row for row in rows}
    for key, seconds in times.items():
        name, _, part = key.rpartition(": ")
        by_name[name][part] = {figure: seconds[figure] for figure in ("median", "min", "max")}
    return rows


@contextmanager
def refusals(row: Row, clock: Clock) -> Iterator[None]:
    """Note in the row why a contender cannot do a case. PyTorch gives its reasons as warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except Exception as error:  # compilers and backends raise many kinds
            reasons = [f"{type(error).__name__}: {error}", *(str(w.message) for w in caught)]
            row["refused"] = " | ".join(reason.strip()[:300] for reason in reasons[:6])
    if "refused" in row:
        clock.synchronize()  # an illegal access of memory is no refusal: it ends the section here


def measure_forward(problem: Problem, clock: Clock, repeats: int, flex: bool) -> list[Row]:
    """Time the forward pass of every contender; "forward" in seconds and "tflops"."""
    q, k, v = make_inputs(problem, clock.device)
    record = clock.recorder()

    def attempt(contender: Contender) -> Attempt:
        run = partial(contender.attend, q, contender.arrange(k), contender.arrange(v))
        return Attempt({"out": run()}, {"forward": record(run)}, {})

    with torch.no_grad():
        rows = compete(
            {c.name: partial(attempt, c) for c in contenders(problem, clock.device, flex)},
            find_truth(q, k, v, problem.S - problem.T),
            clock,
            repeats,
            f"forward {problem}",
        )
    for row in measured(rows):
        row["tflops"] = problem.flops() / row["forward"]["median"] / 1e12
    return rows


def measure_backward(problem: Problem, clock: Clock, repeats: int, flex: bool) -> list[Row]:
    """Time what a training step takes: "forward", "both" and, their difference, "backward_seconds".

    "tflops" is the backward pass's, which has 2.5 times the products of the forward pass;
    "peak_bytes" what both need beyond their inputs.
    """
    inputs = make_inputs(problem, clock.device)
    generator = torch.Generator(clock.device).manual_seed(1)
    do = torch.randn(inputs[0].shape, generator=generator, device=clock.device, dtype=problem.dtype)
    record = clock.recorder()

    def attempt(contender: Contender) -> Attempt:
        def forward() -> tuple[Tensor, list[Tensor]]:
            # New leaves each time: autograd remembers the stream on which it first met one, and
            # work for another stream cannot be captured.
            q, k, v = leaves = [x.detach().requires_grad_() for x in inputs]
            return contender.attend(q, contender.arrange(k), contender.arrange(v)), leaves

        def both() -> tuple[Tensor, ...]:
            out, leaves = forward()
            return out.detach(), *torch.autograd.grad(out, leaves, do)

        answers: dict[str, Tensor | None] = dict(
            zip(("out", "dq", "dk", "dv"), both(), strict=True)
        )
        actions = {"forward": record(forward), "both": record(both)}
        return Attempt(answers, actions, {"peak_bytes": clock.peak_bytes(both)})

    q, k, v = inputs
    rows = compete(
        {c.name: partial(attempt, c) for c in contenders(problem, clock.device, flex)},
        find_truth(q, k, v, problem.S - problem.T, do),
        clock,
        repeats,
        f"backward {problem}",
    )
    for row in measured(rows):
        row["backward_seconds"] = row["both"]["median"] - row["forward"]["median"]
        row["tflops"] = BACKWARD * problem.flops() / row["backward_seconds"] / 1e12
    return rows


def measure_decode(
    problem: Problem, clock: Clock, repeats: int, flex: bool, most_caches: int = CACHES
) -> list[Row]:
    """Time one step's attention of one layer: "microseconds" and "gb_per_s" of keys and values.

    One measurement ("steps") runs over several caches, one after the other like a model's layers:
    none of them is in the L2 cache, and the launch of the graph counts little. "eager_microseconds"
    is a call by itself from Python.
    """
    count = max(1, min(most_caches, CACHES_BYTES // problem.kv_bytes()))
    inputs = [make_inputs(problem, clock.device, seed) for seed in range(count)]
    record = clock.recorder()

    def attempt(contender: Contender) -> Attempt:
        ready = [(q, contender.arrange(k), contender.arrange(v)) for q, k, v in inputs]

        def steps() -> None:
            for q, k, v in ready:
                contender.attend(q, k, v)

        answers: dict[str, Tensor | None] = {"out": contender.attend(*ready[0])}
        action = record(steps)
        eager = statistics.median(clock.wall(steps) for _ in range(3)) / count
        return Attempt(answers, {"steps": action}, {"eager_microseconds": eager * 1e6})

    with torch.no_grad():
        rows = compete(
            {c.name: partial(attempt, c) for c in contenders(problem, clock.device, flex)},
            find_truth(*inputs[0], problem.S - problem.T),
            clock,
            repeats,
            f"decode {problem}",
        )
    for row in measured(rows):
        seconds = row["steps"]["median"] / count
        row |= {"caches": count, "microseconds": seconds * 1e6}
        row["gb_per_s"] = problem.kv_bytes() / seconds / 1e9
    return rows


def measured(rows: list[Row]) -> list[Row]:
    """Those that were not refused."""
    return [row for row in rows if "refused" not in row]


def measure_ceilings(
    clock: Clock, repeats: int, elements: int = 1 << 30, size: int = 8192
) -> dict[str, float]:
    """What the device can do at most, as a large copy and a large matrix product show it.

    Args:
        elements: bfloat16 numbers copied.
        size: rows and columns of the bfloat16 matrices.

    Returns:
        "copy_gb_per_s", bytes read and written; "matmul_tflops".
    """
    normal = partial(torch.randn, device=clock.device, dtype=torch.bfloat16)
    source, a, b = normal(elements), normal(size, size), normal(size, size)
    target, product = torch.empty_like(source), torch.empty_like(a)
    actions: dict[str, Action] = {
        "copy": lambda: target.copy_(source),
        "matmul": lambda: torch.mm(a, b, out=product),
    }
    times = clock.times(actions, repeats, "ceilings")
    return {
        "copy_gb_per_s": 4 * elements / times["copy"]["median"] / 1e9,
        "matmul_tflops": 2 * size**3 / times["matmul"]["median"] / 1e12,
    }
