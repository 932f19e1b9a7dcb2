"""The ways to compute causal attention with one key/value head that are measured side by side.

Each case gives all contenders the same random inputs, laid out as in the model, compares the
answers with float64 (see judge.py), and then times all of them in turn. A contender that cannot do
a case is recorded as a refusal, with the reason.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.clock import Action, Clock
from benchmarks.gpu.judge import Answers, Truth, find_truth, plain_attention
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

MOST_SCORES = 2**30  # B * H * T * S, for contenders that hold them all in memory
MOST_COPIED = 4 << 30  # bytes of keys (or values) repeated for every head
CACHES = 16  # that decoding runs over in one measurement, or fewer that ...
CACHES_BYTES = 1 << 30  # ... hold this together

Figures = dict[str, Any]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Problem(NamedTuple):
    """Causal attention of T new queries over S slots; one key/value head for all H."""

    B: int
    T: int
    S: int
    H: int
    D: int
    dtype: torch.dtype = torch.bfloat16

    def flops(self) -> int:
        """Operations of the forward pass."""
        return attention_flops(self.B, self.T, self.S, self.H, self.D)

    def kv_bytes(self) -> int:
        """Keys and values, each read once."""
        return 2 * self.B * self.S * self.D * self.dtype.itemsize

    def describe(self) -> Figures:
        """For JSON."""
        return self._asdict() | {"dtype": str(self.dtype).removeprefix("torch.")}


class Contender(NamedTuple):
    """One way to compute attention.

    Attributes:
        attend: q (B, T, H, D), and k and v as `arrange` returns them -> (B, T, H, D).
        arrange: k or v (B, S, 1, D) -> what `attend` takes; timed only with gradients.
    """

    name: str
    attend: Attend
    arrange: Callable[[Tensor], Tensor] = lambda x: x


def make_inputs(
    problem: Problem, device: torch.device, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, T, H, D), k and v (B, S, 1, D), random normal.

    They are views as in the model: of one projection's output (B, T, (H + 2) D), or k and v of a
    cache (B, S, 2 D).
    """
    B, T, S, H, D, dtype = problem
    generator = torch.Generator(device).manual_seed(seed)
    normal = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    qkv = normal(B, T, (H + 2) * D)
    q = qkv[..., : H * D].view(B, T, H, D)
    kv = qkv[..., H * D :] if S == T else normal(B, S, 2 * D)
    k, v = kv.view(B, S, 1, 2 * D).chunk(2, -1)
    return q, k, v


def contenders(problem: Problem, device: torch.device) -> Iterator[Contender]:
    """All of them, ours first."""
    B, T, S, H, D, dtype = problem
    first = S - T  # position of the first query
    # Ours reads the position on the device: one CUDA graph serves all steps of decoding.
    start = torch.full((B,), first, device=device) if first else 0

    def expand(x: Tensor) -> Tensor:
        return x.expand(-1, -1, H, -1)  # (B, S, H, D), without a copy

    def copy(x: Tensor) -> Tensor:
        return expand(x).contiguous()  # (B, S, H, D)

    fits = B * H * T * S <= MOST_SCORES
    copies_fit = B * S * H * D * dtype.itemsize <= MOST_COPIED
    yield Contender(OURS, lambda q, k, v: attention(q, k, v, start))
    for name, backend in SDPA.items():
        if name == "math" and not (fits and copies_fit):
            yield Contender(name, left_out)
            continue
        attend = partial(sdpa_attention, backend)
        yield Contender(f"{name}, {EXPANDED}", attend, expand)
        yield Contender(f"{name}, {GROUPED}", partial(attend, enable_gqa=True))
        if T == 1:
            yield Contender(f"{name}, {FOLDED}", partial(folded_attention, backend))
        elif copies_fit:
            yield Contender(f"{name}, {COPIED}", attend, copy)
    yield Contender(FLEX, prepared_flex_attention(problem, device))
    yield Contender(PLAIN, partial(plain_attention, start=first) if fits else left_out)


def left_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Stands for a contender that is not tried."""
    raise NotImplementedError("left out: it would fill the memory")


def sdpa_attention(
    backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool = False
) -> Tensor:
    """PyTorch's attention on one backend; k and v (B, S, H, D), or (B, S, 1, D) with enable_gqa."""
    T, S = q.shape[1], k.shape[1]
    causality: dict[str, Any] = {"is_causal": T == S and T > 1}
    if 1 < T < S:
        causality = {"attn_mask": causal_lower_right(T, S)}
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(backend):
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=enable_gqa, **causality)
    return y.transpose(1, 2)


def folded_attention(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One new token: its H heads (B, 1, H, D) are H queries of one head; k, v (B, S, 1, D)."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2))


def prepared_flex_attention(problem: Problem, device: torch.device) -> Attend:
    """FlexAttention, compiled for one problem on a GPU; on a CPU as it is."""
    T, S = problem.T, problem.S
    mask = None

    def causal(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query + (S - T) >= key

    if T > 1:
        mask = create_block_mask(causal, None, None, T, S, device=str(device))
    # Start afresh each time: after a few shapes PyTorch would compile for all shapes at once.
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
    """One contender's try at a case: its answers, what to time, by name, and other figures."""

    answers: Answers
    actions: dict[str, Action]
    figures: Figures


def compete(
    kind: str,
    problem: Problem,
    attempt: Callable[[Contender], Attempt],
    truth: Truth,
    clock: Clock,
    repeats: int,
) -> list[Figures]:
    """Try every contender, judge its answers, then time all that did not refuse, in turn.

    Returns:
        For each "contender", and either "refused", the reason, or "right", "verdicts", the
        attempt's figures, and per action its "median", "min" and "max" seconds.
    """
    found: dict[str, Figures] = {}
    actions: dict[str, Action] = {}
    for contender in contenders(problem, clock.device):
        name = contender.name
        found[name] = {"contender": name}
        with refusals(found[name], clock):
            answers, mine, figures = attempt(contender)
            verdicts = truth.judge(answers)
            found[name]["right"] = all(verdict.passed for verdict in verdicts.values())
            found[name]["verdicts"] = {part: v._asdict() for part, v in verdicts.items()}
            found[name] |= figures
            actions |= {f"{name}: {part}": action for part, action in mine.items()}
        clock.release()
    for key, seconds in clock.times(actions, repeats, f"{kind} {problem}").items():
        name, _, part = key.rpartition(": ")
        found[name][part] = {figure: seconds[figure] for figure in ("median", "min", "max")}
    return list(found.values())


@contextmanager
def refusals(figures: Figures, clock: Clock) -> Iterator[None]:
    """Record why a contender cannot do a case. PyTorch gives its reasons as warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except Exception as error:  # compilers and backends raise many kinds
            reasons = [f"{type(error).__name__}: {error}", *(str(w.message) for w in caught)]
            figures["refused"] = " | ".join(reason.strip()[:300] for reason in reasons[:6])
    if "refused" in figures:
        clock.synchronize()  # an illegal access of memory is no refusal: it ends the benchmark


def measure_forward(problem: Problem, clock: Clock, repeats: int) -> list[Figures]:
    """Time the forward pass of every contender: "forward" in seconds and "tflops"."""
    q, k, v = make_inputs(problem, clock.device)
    record = clock.recorder()

    def attempt(contender: Contender) -> Attempt:
        run = partial(contender.attend, q, contender.arrange(k), contender.arrange(v))
        return Attempt({"out": run()}, {"forward": record(run)}, {})

    with torch.no_grad():
        truth = find_truth(q, k, v, problem.S - problem.T)
        found = compete("forward", problem, attempt, truth, clock, repeats)
    for figures in measured(found):
        figures["tflops"] = problem.flops() / figures["forward"]["median"] / 1e12
    return found


def measure_backward(problem: Problem, clock: Clock, repeats: int) -> list[Figures]:
    """Time a training step: "forward", "both" and, their difference, "backward_seconds".

    "tflops" is the backward pass's, "peak_bytes" what both need beyond their inputs.
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

        answers = dict(zip(("out", "dq", "dk", "dv"), both(), strict=True))
        actions = {"forward": record(forward), "both": record(both)}
        return Attempt(answers, actions, {"peak_bytes": clock.peak_bytes(both)})

    truth = find_truth(*inputs, problem.S - problem.T, do)
    found = compete("backward", problem, attempt, truth, clock, repeats)
    for figures in measured(found):
        seconds = figures["both"]["median"] - figures["forward"]["median"]
        figures |= {
            "backward_seconds": seconds,
            "tflops": BACKWARD * problem.flops() / seconds / 1e12,
        }
    return found


def measure_decode(problem: Problem, clock: Clock, repeats: int) -> list[Figures]:
    """Time one step's attention of one layer: "microseconds" and "gb_per_s" of keys and values.

    One measurement ("steps") runs over several caches, one after the other like a model's layers:
    none of them is in the L2 cache, and the launch of the graph counts little. "eager_microseconds"
    is a call by itself from Python.
    """
    count = max(1, min(CACHES, CACHES_BYTES // problem.kv_bytes()))
    inputs = [make_inputs(problem, clock.device, seed) for seed in range(count)]
    record = clock.recorder()

    def attempt(contender: Contender) -> Attempt:
        ready = [(q, contender.arrange(k), contender.arrange(v)) for q, k, v in inputs]

        def steps() -> None:
            for q, k, v in ready:
                contender.attend(q, k, v)

        out = contender.attend(*ready[0])
        action = record(steps)
        eager = statistics.median(clock.wall(steps) for _ in range(3)) / count
        return Attempt({"out": out}, {"steps": action}, {"eager_microseconds": eager * 1e6})

    with torch.no_grad():
        truth = find_truth(*inputs[0], problem.S - problem.T)
        found = compete("decode", problem, attempt, truth, clock, repeats)
    for figures in measured(found):
        seconds = figures["steps"]["median"] / count
        figures |= {"caches": count, "microseconds": seconds * 1e6}
        figures["gb_per_s"] = problem.kv_bytes() / seconds / 1e9
    return found


def measured(found: list[Figures]) -> list[Figures]:
    """Those that were not refused."""
    return [figures for figures in found if "refused" not in figures]
