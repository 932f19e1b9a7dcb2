"""Where does the time of one decode step, or of a prefill, go?

    python -m benchmarks.step_profile                                     # CPU, a minute or two
    python -m benchmarks.step_profile --quantize int8
    python -m benchmarks.step_profile --prefill --batch 8 --context 128
    python -m benchmarks.step_profile --one-thread                        # on a CPU in use
    python -m benchmarks.step_profile --shape starcoderbase-1b --dtype bfloat16    # GPU

A model of random weights computes what the plain loop of `generate` does: the newest token of each
row after a cache of `context` tokens, or with `--prefill` prompts of that length, and the argmax.
The table has the time of each part of the model and the least it can take (roofline): its bytes at
this machine's memory bandwidth or its operations at the rate of a matrix product, whichever is
longer, both measured between steps. (Caches are read faster than that.)

On a CPU the parts are the phases of the compiled forward pass, timed while it runs
(`cpu/phases.py`); GELU and residual sums belong to the product before them, and the rest is Python
and the argmax. On a GPU, or without numba, the model's modules run: a part's time is that of its
kernels or operators as torch.profiler sees them, and the ones that take most of it are listed. With
`--one-thread` times are the processor's (see mqa_vs_mha.py).
"""

from __future__ import annotations

import statistics
import sys
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.clock import Clock
from benchmarks.measure import (
    add_model,
    can_plot,
    make_parser,
    open_plot,
    positive,
    read_device,
    refuse_bad_input,
    require_context,
    require_memory,
    result_path,
    several,
    write_result,
)
from mqa_gpt import GPT, GPTConfig, KVCache
from mqa_gpt.bench.ceilings import Ceilings, probes, reached
from mqa_gpt.bench.counts import Work, weight_bytes, work_by_part
from mqa_gpt.bench.run import Workload, random_model, random_prompts
from mqa_gpt.bench.timing import take_turns
from mqa_gpt.cache import cache_bytes
from mqa_gpt.errors import InputError
from mqa_gpt.fast.compiled import compiled_forward, step_forward
from mqa_gpt.fast.int8 import METHODS, quantize
from mqa_gpt.generation.prefill import prefill
from mqa_gpt.progress import status

Step = Callable[[], None]
SUMS = ("undivided", "sum_of_parts", "least")  # of a step
PREFIX = "part: "  # marks the ranges of parts among the profiler's operators


def profiler_part(name: str) -> AbstractContextManager[Any]:
    """Record the block for torch.profiler, under the part's name."""
    return record_function(PREFIX + name)


@contextmanager
def named_parts(model: GPT) -> Iterator[None]:
    """Record every part of the model under its name; what lies between them belongs to none."""
    with ExitStack() as changes:

        def named(owner: Any, method: str, name: str) -> None:
            run = getattr(owner, method)

            def inside(*args: Any, **kwargs: Any) -> Any:
                with profiler_part(name):
                    return run(*args, **kwargs)

            changes.enter_context(patch.object(owner, method, inside))

        named(KVCache, "append", "cache")  # of the class, since a prefill writes to views
        transformer = model.transformer
        for embedding in (transformer.wte, transformer.wpe):
            named(embedding, "forward", "wte, wpe")
        named(transformer.ln_f, "forward", "ln_f")
        named(model.lm_head, "forward", "lm_head")
        for block in transformer.h:
            named(block.attn, "split", "split")
            named(block.attn, "attend", "attention")
            named(block.mlp, "activate", "GELU")
            for norm in (block.ln_1, block.ln_2):
                named(norm, "forward", "ln_1, ln_2")
            for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
                named(block.get_submodule(name), "forward", name)
        yield


def make_step(model: GPT, cache: KVCache, is_prefill: bool) -> Step:
    """A function that chooses the token after a full cache, or after prompts that fill it, each
    time it is called."""
    prompts = random_prompts(model.config, Workload(cache.batch_size, cache.max_length, 1))
    ids = torch.full((cache.batch_size, 1), 1, device=model.device)  # (B, 1)
    forward = step_forward(model)

    def read() -> None:
        cache.set_lengths([0] * cache.batch_size)
        prefill(model, cache, prompts).argmax(-1)

    def decode() -> None:
        cache.end = cache.max_length - 1
        with torch.inference_mode():
            forward(ids, cache)[:, 0].argmax(-1)

    return read if is_prefill else decode


def compiled_parts(
    model: GPT, cache: KVCache, is_prefill: bool, repeats: int, one_thread: bool = False
) -> dict[str, float]:
    """Median seconds per step of every part of the compiled pass, on the clock of `measure`."""
    from benchmarks.cpu.phases import timed_forward

    step, clock = make_step(model, cache, is_prefill), read_clock(one_thread)
    steps: list[dict[str, float]] = []
    with timed_forward(model.config.n_layer, of_process=one_thread) as seconds, status() as say:
        say("compiling the forward pass with a clock in it")
        step()
        for repeat in range(1, repeats + 1):
            say(f"parts: round {repeat} of {repeats}")
            seconds.clear()
            begin = clock()
            step()
            whole = clock() - begin
            steps.append(seconds | {"rest": whole - sum(seconds.values())})
    return {name: statistics.median(parts[name] for parts in steps) for name in steps[0]}


def read_clock(one_thread: bool) -> Callable[[], float]:
    return time.process_time if one_thread else time.perf_counter


@contextmanager
def step_of_parts(model: GPT, cache: KVCache, is_prefill: bool) -> Iterator[Step]:
    """The same step by the model's modules, running as named parts while the context lasts."""
    with named_parts(model):
        inner = make_step(model, cache, is_prefill)

        def step() -> None:
            with profiler_part("rest"):
                inner()

        yield step


def profiled(step: Step, clock: Clock, repeats: int) -> dict[tuple[str, str], float]:
    """Median seconds per step of every operator, on a GPU of every kernel, by part and name.

    Python's share of a part is called "Python".
    """
    steps: list[dict[tuple[str, str], float]] = []
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if clock.has_gpu else []
    for _ in range(repeats):
        with profile(activities=activities) as profiler:
            step()
            clock.synchronize()
        seconds: dict[tuple[str, str], float] = defaultdict(float)
        for event in profiler.events() or []:
            part = nearest_part(event)
            if part is None:
                continue
            if clock.has_gpu:
                for kernel in event.kernels:
                    seconds[part, kernel.name] += kernel.duration / 1e6
            else:
                name = "Python" if event.name.startswith(PREFIX) else event.name
                seconds[part, name] += event.self_cpu_time_total / 1e6
        steps.append(seconds)
    keys = {key for seconds in steps for key in seconds}
    return {key: statistics.median(seconds[key] for seconds in steps) for key in keys}


def nearest_part(event: Any) -> str | None:
    """The innermost part that a host event belongs to; None outside of a step."""
    while event is not None and not event.name.startswith(PREFIX):
        event = event.cpu_parent
    return None if event is None else event.name.removeprefix(PREFIX)


def table(
    parts: dict[str, float], least: dict[str, Work], ceilings: Ceilings
) -> list[dict[str, Any]]:
    """A row per part, the longest first: seconds, work, rates, and the share of the roofline."""
    whole = sum(parts.values())
    rows = []
    for name, seconds in sorted(parts.items(), key=lambda item: -item[1]):
        work = least[name]
        to_move = work.bytes / (ceilings.gb_per_s * 1e9)
        to_compute = work.flops / (ceilings.tflops(work.itemsize) * 1e12)
        rows.append(
            {
                "part": name,
                "seconds": seconds,
                "share": seconds / whole,
                "bytes": work.bytes,
                "flops": work.flops,
                "gb_per_s": work.bytes / seconds / 1e9,
                "gflops": work.flops / seconds / 1e9,
                "least_seconds": max(to_move, to_compute),
                "limited_by": "memory" if to_move >= to_compute else "arithmetic",
                "of_roofline": max(to_move, to_compute) / seconds,
            }
        )
    return rows


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """A bar per part, and a line where the roofline would end it."""
    shown = [row for row in rows if row["share"] > 0.005][::-1]
    with open_plot(path, 1, title, width=8) as axes:
        axes.barh([row["part"] for row in shown], [1000 * row["seconds"] for row in shown])
        for i, row in enumerate(shown):
            axes.plot([1000 * row["least_seconds"]] * 2, [i - 0.4, i + 0.4], color="black")
            label = f" {row['share']:.0%}, {row['of_roofline']:.0%} of roofline"
            axes.text(1000 * row["seconds"], i, label, va="center", fontsize=8)
        axes.set(xlabel="milliseconds (black: the least possible)")
        axes.margins(x=0.35)


@refuse_bad_input
def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "step_profile_*.json")
    add_model(parser)
    parser.add_argument("--quantize", choices=METHODS, help="8-bit weights, on a CPU")
    parser.add_argument(
        "--prefill", action="store_true", help="profile reading prompts of that context"
    )
    parser.add_argument("--batch", type=positive, default=1, help="rows at once")
    parser.add_argument("--context", type=positive, default=1024, help="tokens per row")
    parser.add_argument("--repeats", type=several, default=30, help="steps to measure")
    options = parser.parse_args(arguments)

    device, dtype, where = read_device(options)
    kind = "_int8" * (options.quantize is not None) + "_prefill" * options.prefill
    output = result_path(options.output, f"step_profile_{options.shape}_{where}{kind}.json")
    if options.quantize is not None and device.type != "cpu":
        parser.error("--quantize is for a CPU: on a GPU `generate` runs other kernels in 8 bits")
    model = make_model(options, device, dtype)
    figures = measure(model, Clock(device), options)
    show(figures)
    status = write_result(output, __file__, __doc__, options, figures)
    if can_plot():
        threads = ", one thread" if options.one_thread else ""
        what = "A prefill" if options.prefill else "One decode step"
        weights = options.quantize or options.dtype
        title = f"{what} of {options.shape}, {weights}, {where}{threads}\n"
        title += f"batch {options.batch}, context {options.context}"
        plot(figures["parts"], title, output.with_suffix(".png"))
    return status


def make_model(options: Namespace, device: torch.device, dtype: torch.dtype) -> GPT:
    """Random weights, as `LLM.load` keeps them; InputError if they or the cache do not fit."""
    config = GPTConfig.preset(options.shape)
    require_context(config, options.context)
    held = cache_bytes(config, dtype, options.batch, options.context)
    require_memory(weight_bytes(config, dtype.itemsize) + held, device)
    model = random_model(config, dtype, device)
    if options.quantize is not None:
        quantize(model)
    return model


def measure(model: GPT, clock: Clock, options: Namespace) -> dict[str, Any]:
    """The step as a whole between the ceilings, then its parts."""
    is_compiled = compiled_forward(model) is not None
    if options.one_thread and not is_compiled:
        raise InputError(
            "--one-thread needs numba, the extra 'cpu': torch.profiler counts no processor time"
        )
    cache = model.new_cache(options.batch, options.context)
    cache.kv.normal_()
    seconds_now = read_clock(options.one_thread)
    whole_step = make_step(model, cache, options.prefill)

    def undivided() -> float:
        # The second of two, since what ran in between has emptied the caches.
        for _ in range(2):
            begin = seconds_now()
            whole_step()
            clock.synchronize()
        return seconds_now() - begin

    limits = probes(clock.device, model.dtype, options.quantize is not None)
    actions: dict[str, Callable[[], object]] = {"step": undivided}
    actions |= {name: probe.run for name, probe in limits.items()}
    for action in actions.values():
        action()
    seconds = take_turns(actions, options.repeats, "step and ceilings", seconds_now)
    ceilings = reached(limits, seconds)

    operators: dict[tuple[str, str], float] = {}
    if is_compiled:
        times = compiled_parts(model, cache, options.prefill, options.repeats, options.one_thread)
    else:
        with step_of_parts(model, cache, options.prefill) as step:
            profiled(step, clock, 2)  # a warm-up
            operators = profiled(step, clock, options.repeats)
        times = defaultdict(float)
        for (part, _), spent in operators.items():
            times[part] += spent
    least_work = work_by_part(
        model.config,
        options.batch,
        options.context,
        model.dtype,
        itemsize=model.dtype.itemsize if options.quantize is None else 1,
        is_prefill=options.prefill,
    )
    if is_compiled:  # residual sums are in the products
        logits = options.batch * model.config.vocab_size
        least_work["rest"] = Work(logits * torch.float32.itemsize, 0)
    parts = table(times, least_work, ceilings)
    whole = sum(times.values())
    return {
        "step_seconds": {
            "undivided": statistics.median(seconds["step"]),
            "undivided_quartiles": statistics.quantiles(seconds["step"], n=4)[::2],
            "sum_of_parts": whole,
            "least": sum(part["least_seconds"] for part in parts),
        },
        "ceilings": asdict(ceilings),
        "parts": parts,
        "operators": [
            {"part": part, "name": name, "seconds": spent, "share": spent / whole}
            for (part, name), spent in sorted(operators.items(), key=lambda item: -item[1])[:15]
        ],
    }


def show(figures: dict[str, Any]) -> None:
    """Print the tables of the parts and of the operators, and the sums."""
    print(f"{'part':20}{'ms':>8}{'share':>7}{'MB':>8}{'GB/s':>7}{'GFLOP/s':>9}  of roofline")
    for row in figures["parts"]:
        print(
            f"{row['part']:20}{1000 * row['seconds']:>8.2f}{row['share']:>7.1%}"
            f"{row['bytes'] / 1e6:>8.1f}{row['gb_per_s']:>7.1f}{row['gflops']:>9.1f}"
            f"{row['of_roofline']:>9.0%} {row['limited_by']}"
        )
    print()
    for row in figures["operators"]:
        print(f"{row['part']:20}{row['name'][:60]:60}{1000 * row['seconds']:>8.2f} ms")
    step = {name: 1000 * figures["step_seconds"][name] for name in SUMS}
    print("\nstep {undivided:.1f} ms, sum of parts {sum_of_parts:.1f} ms, at least "
          "{least:.1f} ms".format(**step))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
