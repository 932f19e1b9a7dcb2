"""The sections of gpu_report.py: what is measured, on a GPU and, in small, without one."""

from __future__ import annotations

import os
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from clock import Clock
from contenders import (
    Attempt,
    Problem,
    Row,
    compete,
    make_inputs,
    measure_backward,
    measure_ceilings,
    measure_decode,
    measure_forward,
)
from gpu_report_checks import CASES, FEW_CASES, Case, check_numerics, check_parity
from gpu_report_model import (
    ModelPlan,
    cpu_model_plan,
    decode_cases,
    gpu_model_plan,
    heads_cases,
    prefill_cases,
    profile_cases,
    token_cases,
)
from gpu_report_pool import in_processes
from judge import Truth, find_truth
from torch import Tensor

from mqa_gpt import GPTConfig
from mqa_gpt.machine import describe
from mqa_kernels import attention
from mqa_kernels.tuning import Tiles

# Where the launch functions look up what is to be tuned.
TUNED = {
    "forward": "mqa_kernels.forward.forward_tiles",
    "decode": "mqa_kernels.forward.forward_tiles",
    "decode splits": "mqa_kernels.forward.split_count",
    "dq": "mqa_kernels.backward.query_tiles",
    "dkv": "mqa_kernels.backward.key_tiles",
}

COMPILING = 0.6  # share of the time of "autotune" after which no more settings are compiled


class Tuning(NamedTuple):
    """What to try for one kernel: tiles, or in how many shares decoding splits the keys."""

    kernel: str
    problem: Problem
    settings: tuple[Any, ...]


@dataclass(frozen=True)
class Plan:
    """The sizes of everything.

    Attributes:
        flex: for which problems FlexAttention is compiled too, 3 to 15 seconds each.
        parity: name of the shape, config, dtype, new tokens.
        workers: processes that compile at the same time.
    """

    repeats: int
    workers: int
    ceilings: tuple[int, int]
    numerics: tuple[Case, ...]
    parity: tuple[tuple[str, GPTConfig, str, int], ...]
    forward: tuple[Problem, ...]
    backward: tuple[Problem, ...]
    decode: tuple[Problem, ...]
    flex: frozenset[tuple[str, Problem]]
    autotune: tuple[Tuning, ...]
    most_caches: int
    model: ModelPlan


def grid(*sizes: tuple[int, ...]) -> tuple[Tiles, ...]:
    """All combinations of M, N, warps and stages."""
    return tuple(Tiles(*values) for values in product(*sizes))


def prefill_problem(T: int, H: int = 32, D: int = 128, tokens: int = 16384) -> Problem:
    """About 16k tokens in sequences of T."""
    return Problem(max(1, tokens // T), T, T, H, D)


def gpu_plan() -> Plan:
    """For one data-centre GPU of 80 GB. The most valuable comes first everywhere."""
    lengths = (8192, 2048, 16384, 1024, 4096, 512)
    forward = (*map(prefill_problem, lengths), prefill_problem(8192, H=16, D=64))
    backward = (
        *map(prefill_problem, (8192, 2048, 4096)),
        prefill_problem(8192, H=16, D=64),
        prefill_problem(16384),
        prefill_problem(512),
    )
    decode = [Problem(B, 1, 8192, 32, 128) for B in (32, 16, 1, 128)]
    decode += [Problem(B, 1, 1024, 32, 128) for B in (1, 32, 128)]
    decode += [Problem(16, T, 8192, 32, 128) for T in (4, 8)]
    decode += [Problem(B, 1, 8192, 32, 128) for B in (64, 256, 8)]
    decode += [Problem(B, 1, 1024, 32, 128) for B in (8, 16, 64, 256)]
    decode += [Problem(B, 1, 16384, 32, 128) for B in (1, 8)]
    training = prefill_problem(8192)
    parity = [
        (name, GPTConfig.preset(name), dtype, 64)
        for name, dtype in (
            ("starcoderbase-1b", "float32"),
            ("starcoderbase-7b", "bfloat16"),
            ("starcoderbase-7b", "float32"),
            ("starcoderbase-1b", "bfloat16"),
        )
    ]
    autotune = (
        Tuning("forward", training, grid((64, 128), (64, 128), (4, 8), (2, 3, 4))),
        Tuning("decode", decode[1], grid((32,), (32, 64, 128), (4, 8), (2, 3, 4))),
        Tuning("decode", decode[2], grid((32,), (32, 64, 128), (4, 8), (2, 3, 4))),
        Tuning("decode splits", decode[1], (4, 8, 12, 16, 24, 32)),
        Tuning("decode splits", decode[2], (16, 24, 32, 48, 64)),
        Tuning("dkv", training, grid((32, 64, 128), (64, 128), (4, 8), (1, 2, 3))),
        Tuning("dq", training, grid((64, 128), (32, 64), (4, 8), (1, 2, 3))),
    )
    return Plan(
        repeats=15,
        workers=max(1, min(12, (os.cpu_count() or 1) - 1)),
        ceilings=(1 << 30, 8192),
        numerics=CASES,
        parity=tuple(parity),
        forward=forward,
        backward=backward,
        decode=tuple(decode),
        flex=frozenset(
            [("forward", problem) for problem in forward]
            + [("backward", problem) for problem in backward[:2]]
            + [("decode", problem) for problem in (decode[0], decode[2], decode[4])]
        ),
        autotune=autotune,
        most_caches=16,
        model=gpu_model_plan(),
    )


def cpu_plan() -> Plan:
    """Everything once, as small as it gets: proof that the code runs."""
    small, step = Problem(1, 24, 24, 4, 16), Problem(2, 1, 40, 4, 16)
    config = GPTConfig(
        vocab_size=61, n_positions=48, n_embd=48, n_layer=2, n_head=3, n_inner=80,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    tiles = (Tiles(16, 16, 4, 1), Tiles(32, 16, 4, 1))
    return Plan(
        repeats=1,
        workers=0,
        ceilings=(1 << 16, 64),
        numerics=FEW_CASES,
        parity=(("tiny", config, "float32", 3), ("tiny", config, "bfloat16", 3)),
        forward=(small,),
        backward=(small,),
        decode=(step, Problem(1, 3, 40, 4, 16)),
        flex=frozenset([("forward", small), ("decode", step)]),
        autotune=(
            Tuning("forward", small, tiles),
            Tuning("decode splits", step, (2,)),
            Tuning("dkv", small, tiles[:1]),
            Tuning("dq", small, tiles[:1]),
        ),
        most_caches=2,
        model=cpu_model_plan(),
    )


class Context(NamedTuple):
    """What a section gets; `deadline` is by `time.monotonic`."""

    clock: Clock
    plan: Plan
    deadline: float

    def each(self, cases: Iterable[tuple[Row, Callable[[], Iterable[Row]]]]) -> Iterator[Row]:
        """The rows of every case, as long as there is time; a case that fails ends only itself.

        Args:
            cases: what is in all of a case's rows, and what yields the rest of them.
        """
        for case, measure in cases:
            begin = time.monotonic()
            if begin > self.deadline:
                yield case | {"skipped": "no time left"}
                continue
            try:
                for row in measure():
                    yield case | row | {"seconds": time.monotonic() - begin}
            except Exception:  # whatever it is, the next case is worth having
                yield case | {"passed": False, "error": traceback.format_exc()}
                self.clock.synchronize()  # unless the device is lost, which shows here
            self.clock.release()


def environment(context: Context) -> Iterator[Row]:
    """Versions and devices."""
    row: Row = describe()
    if context.clock.has_gpu:
        gpu = torch.cuda.get_device_properties(context.clock.device)
        row |= {
            "multiprocessors": gpu.multi_processor_count,
            "l2_cache_bytes": getattr(gpu, "L2_cache_size", None),
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }
    try:
        row["commit"] = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            capture_output=True, text=True, check=True, cwd=Path(__file__).parent,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        row["commit"] = None
    yield row


def ceilings(context: Context) -> Iterator[Row]:
    """The rates that everything else is a fraction of."""
    yield dict(measure_ceilings(context.clock, context.plan.repeats, *context.plan.ceilings))


def numerics(context: Context) -> Iterator[Row]:
    """The kernels by the error rule, and as PyTorch operators."""
    plan = context.plan
    yield from check_numerics(
        context.clock, plan.numerics, plan.workers, context.clock.has_gpu, context.deadline
    )


def parity(context: Context) -> Iterator[Row]:
    """Whole models against transformers."""
    return context.each(
        (
            {"model": name, "dtype": dtype},
            partial(check_parity, context.clock, config, dtype, new_tokens),
        )
        for name, config, dtype, new_tokens in context.plan.parity
    )


def timed_section(name: str) -> Callable[[Context], Iterator[Row]]:
    """The section that races all contenders over the problems of the plan's field `name`."""

    def section(context: Context) -> Iterator[Row]:
        plan = context.plan
        measures: dict[str, Callable[[Problem, Clock, int, bool], list[Row]]] = {
            "forward": measure_forward,
            "backward": measure_backward,
            "decode": partial(measure_decode, most_caches=plan.most_caches),
        }

        def race(problem: Problem) -> Iterator[Row]:
            flex = (name, problem) in plan.flex
            yield {"results": measures[name](problem, context.clock, plan.repeats, flex)}

        problems: tuple[Problem, ...] = getattr(plan, name)
        return context.each(({"problem": p.describe()}, partial(race, p)) for p in problems)

    return section


def autotune(context: Context) -> Iterator[Row]:
    """Every setting of every kernel, compiled by several processes and then raced in this one."""
    clock, plan = context.clock, context.plan
    tasks = [
        (tuning.kernel, tuning.problem, setting)
        for tuning in plan.autotune
        for setting in tuning.settings
    ]
    # What the others compile comes back through Triton's cache on disk.
    now = time.monotonic()
    until = now + COMPILING * (context.deadline - now)
    compiled = in_processes(partial(try_setting, clock.device), tasks, plan.workers, until)
    reasons = {
        row["task"]: row.get("skipped") or row["error"].strip().splitlines()[-1]
        for row in compiled
        if "compiled" not in row
    }

    def race(tuning: Tuning) -> Iterator[Row]:
        results = race_settings(clock, tuning, plan.repeats, reasons)
        right = [result for result in results if result.get("right")]
        winner = min(right, key=lambda result: result["whole"]["median"], default=None)
        yield {"winner": winner, "results": results}

    yield from context.each(
        ({"kernel": tuning.kernel, "problem": tuning.problem.describe()}, partial(race, tuning))
        for tuning in plan.autotune
    )


def try_setting(device: torch.device, kernel: str, problem: Problem, setting: Any) -> Row:
    """Compile a kernel with one setting, and see whether it runs."""
    run, _ = tuned_run(device, kernel, problem)
    with mock.patch(TUNED[kernel], return_value=setting):
        answers = run()
    # Reading waits for the device, and so finds an illegal access while it can be told whose it is.
    finite = all(bool(x.isfinite().all()) for x in answers.values() if x is not None)
    return {"task": repr((kernel, problem, setting)), "compiled": True, "finite": finite}


def race_settings(clock: Clock, tuning: Tuning, repeats: int, reasons: dict[str, str]) -> list[Row]:
    """One row per setting, "shipped" being the one in tuning.py; times are "whole" in seconds.

    For "dq" and "dkv" that is the forward and the backward pass, of which only one kernel varies.

    Args:
        reasons: why some tasks did not even compile.
    """
    run, truth = tuned_run(clock.device, tuning.kernel, tuning.problem)
    record = clock.recorder()

    def attempt(setting: Any) -> Attempt:
        if setting is None:
            return Attempt(run(), {"whole": record(run)}, {"setting": None})
        reason = reasons.get(repr((tuning.kernel, tuning.problem, setting)))
        if reason is not None:
            raise RuntimeError(reason)
        with mock.patch(TUNED[tuning.kernel], return_value=setting):
            return Attempt(run(), {"whole": record(run)}, {"setting": setting})

    attempts = {"shipped": partial(attempt, None)}
    attempts |= {setting_text(setting): partial(attempt, setting) for setting in tuning.settings}
    return compete(attempts, truth(), clock, repeats, f"tuning {tuning.kernel}")


def tuned_run(
    device: torch.device, kernel: str, problem: Problem
) -> tuple[Callable[[], dict[str, Tensor | None]], Callable[[], Truth]]:
    """What runs the kernel to be tuned, and what finds out how its answers should be."""
    q, k, v = make_inputs(problem, device)
    start = torch.full((problem.B,), problem.S - problem.T, device=device)

    def forward() -> dict[str, Tensor | None]:
        with torch.no_grad():
            return {"out": attention(q, k, v, start)}

    if kernel not in ("dq", "dkv"):
        return forward, partial(find_truth, q, k, v, problem.S - problem.T)

    do = torch.randn(q.shape, device=device, dtype=problem.dtype)

    def both() -> dict[str, Tensor | None]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]  # new: see measure_backward
        out = attention(*leaves)
        gradients = torch.autograd.grad(out, leaves, do)
        return {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}

    return both, partial(find_truth, q, k, v, 0, do)


def setting_text(setting: Any) -> str:
    """As in the table: "64x64, 4 warps, 2 stages" or "8 shares"."""
    if isinstance(setting, int):
        return f"{setting} shares"
    M, N, warps, stages = setting
    return f"{M}x{N}, {warps} warps, {stages} stages"


def model_tokens(context: Context) -> Iterator[Row]:
    """Whole models: whether the replayed loop generates what the plain one does."""
    return context.each(token_cases(context.clock, context.plan.model))


def model_decode(context: Context) -> Iterator[Row]:
    """Whole models: decoding."""
    return context.each(decode_cases(context.clock, context.plan.model, context.plan.repeats))


def model_prefill(context: Context) -> Iterator[Row]:
    """Whole models: reading prompts."""
    return context.each(prefill_cases(context.clock, context.plan.model, context.plan.repeats))


def model_profile(context: Context) -> Iterator[Row]:
    """Whole models: the kernels of a decode step."""
    return context.each(profile_cases(context.clock, context.plan.model, context.plan.repeats))


def model_heads(context: Context) -> Iterator[Row]:
    """Whole models: multi-query beside multi-head attention."""
    return context.each(heads_cases(context.clock, context.plan.model, context.plan.repeats))


SECTIONS: dict[str, Callable[[Context], Iterator[Row]]] = {
    "environment": environment,
    "ceilings": ceilings,
    "numerics": numerics,
    "parity": parity,
    "forward": timed_section("forward"),
    "backward": timed_section("backward"),
    "decode": timed_section("decode"),
    "model_tokens": model_tokens,
    "model_decode": model_decode,
    "model_prefill": model_prefill,
    "model_profile": model_profile,
    "model_heads": model_heads,
    "autotune": autotune,
}
