"""Where does the time of one decode step, or of a prefill, go?

    python benchmarks/step_profile.py                                     # CPU, a minute or two
    python benchmarks/step_profile.py --quantize int8
    python benchmarks/step_profile.py --prefill --batch 8 --context 128
    python benchmarks/step_profile.py --one-thread                        # on a CPU in use
    python benchmarks/step_profile.py --shape starcoderbase-1b --dtype bfloat16    # GPU

A model of random weights as `LLM.load` makes it, on a CPU with packed weights, computes what the
plain loop of `generate` does: the newest token of each row behind a cache of `context` tokens, or
with `--prefill` prompts of that length, and the largest logit. The time of each part of the model
stands beside the least it can take (roofline): its bytes at the memory bandwidth of this machine or
its operations at the rate of a matrix product, whichever is longer, both measured between steps.
(What the caches hold is read faster.) Then come the operators, or on a GPU the kernels, that take
most of it.

On a CPU parts are timed as the model runs, Python included, and operators by torch.profiler, which
slows them down; the step as a whole is measured without either. On a GPU a part's time is that of
its kernels. With `--one-thread` times are the processor's (see mqa_vs_mha.py), which torch.profiler
does not have: there are no operators then.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from clock import Clock
from measure import (
    add_shape,
    can_plot,
    make_parser,
    open_plot,
    place,
    positive,
    refuse_bad_input,
    require_context,
    require_memory,
    result_path,
    several,
    write_result,
)
from torch.profiler import ProfilerActivity, profile, record_function

from mqa_gpt import GPT, GPTConfig, KVCache
from mqa_gpt.bench.ceilings import Ceilings, probes, reached
from mqa_gpt.bench.counts import Work, weight_bytes, work_by_part
from mqa_gpt.bench.run import (
    Request,
    random_model,
    random_prompts,
    take_turns,
)
from mqa_gpt.cache import cache_bytes
from mqa_gpt.checkpoints.load import DTYPES, as_device, as_dtype
from mqa_gpt.fast.flat import Forward, flat_forward, without_modules
from mqa_gpt.fast.int8 import METHODS, quantize
from mqa_gpt.fast.packing import can_pack, pack
from mqa_gpt.generation.prefill import prefill

Part = AbstractContextManager[Any]
Step = Callable[[], None]
PREFIX = "part: "  # of the ranges' names, to tell them from operators


class PartTimer:
    """Seconds of each part, without the parts inside it, added up in `seconds`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside = [0.0]  # seconds of inner parts, for every part that is under way

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the block as a part."""
        self._inside.append(0.0)
        begin = self.clock()
        yield
        elapsed = self.clock() - begin
        self.seconds[name] += elapsed - self._inside.pop()
        self._inside[-1] += elapsed


def profiler_part(name: str) -> Part:
    """The block under the part's name for torch.profiler."""
    return record_function(PREFIX + name)


@contextmanager
def named_parts(model: GPT, part: Callable[[str], Part]) -> Iterator[None]:
    """Make every part of the model run as a `part`, but for what stands between them."""
    with ExitStack() as changes:

        def named(owner: Any, method: str, name: str) -> None:
            run = getattr(owner, method)

            def inside(*args: Any, **kwargs: Any) -> Any:
                with part(name):
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


def make_step(
    model: GPT, cache: KVCache, is_prefill: bool, inlined: Callable[[GPT], Forward] = flat_forward
) -> Step:
    """What chooses the token behind a full cache, or behind prompts that fill it, again and again.

    Args:
        inlined: what makes a decode step of a model.
    """
    prompts = random_prompts(model.config, Request(cache.batch_size, cache.max_length, 1))
    ids = torch.full((cache.batch_size, 1), 1, device=model.device)  # (B, 1)
    forward = inlined(model)

    def read() -> None:
        cache.set_lengths([0] * cache.batch_size)
        prefill(model, cache, prompts).argmax(-1)

    def decode() -> None:
        cache.end = cache.max_length - 1
        with torch.inference_mode():
            forward(ids, cache)[:, 0].argmax(-1)

    return read if is_prefill else decode


@contextmanager
def step_of_parts(
    model: GPT, cache: KVCache, is_prefill: bool, part: Callable[[str], Part]
) -> Iterator[Step]:
    """The same, running as named parts as long as the context lasts."""
    with named_parts(model, part):
        # What wraps the parts must not send it back to the modules.
        inner = make_step(model, cache, is_prefill, without_modules)

        def step() -> None:
            with part("rest"):
                inner()

        yield step


def timed_parts(step: Callable[[], object], timer: PartTimer, repeats: int) -> dict[str, float]:
    """Seconds per step of every part on a CPU, medians."""
    step()
    steps = []
    for _ in range(repeats):
        timer.seconds.clear()
        step()
        steps.append(dict(timer.seconds))
    return {name: statistics.median(seconds[name] for seconds in steps) for name in steps[0]}


def profiled(step: Step, clock: Clock, repeats: int) -> dict[tuple[str, str], float]:
    """Seconds per step of every operator, on a GPU of every kernel, by part and name; medians.

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
    """The innermost part that an event on the host belongs to; None outside of a step."""
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
        moved, flops, itemsize = least[name]
        to_move = moved / (ceilings.gb_per_s * 1e9)
        to_compute = flops / (ceilings.tflops(itemsize) * 1e12)
        rows.append(
            {
                "part": name,
                "seconds": seconds,
                "share": seconds / whole,
                "bytes": moved,
                "flops": flops,
                "gb_per_s": moved / seconds / 1e9,
                "gflops": flops / seconds / 1e9,
                "least_seconds": max(to_move, to_compute),
                "limited_by": "memory" if to_move >= to_compute else "arithmetic",
                "of_roofline": max(to_move, to_compute) / seconds,
            }
        )
    return rows


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """A bar per part, and a line where it would end at the roofline."""
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
    add_shape(parser)
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    parser.add_argument("--quantize", choices=METHODS, help="8-bit weights, on a CPU")
    parser.add_argument(
        "--prefill", action="store_true", help="profile reading prompts of that context"
    )
    parser.add_argument("--batch", type=positive, default=1, help="rows at once")
    parser.add_argument("--context", type=positive, default=1024, help="tokens per row")
    parser.add_argument("--repeats", type=several, default=30, help="steps that are measured")
    parser.add_argument("--one-thread", action="store_true", help="for a CPU that others use")
    parser.add_argument("--note", help="kept with the result: what else this machine did")
    options = parser.parse_args(arguments)

    device, dtype = as_device(options.device), as_dtype(options.dtype)
    where = place(device)
    kind = "_int8" * (options.quantize is not None) + "_prefill" * options.prefill
    output = result_path(options.output, f"step_profile_{options.shape}_{where}{kind}.json")
    if options.one_thread:
        if device.type != "cpu":
            parser.error("--one-thread is for a CPU: add --device cpu")
        torch.set_num_threads(1)
    if options.quantize is not None and device.type != "cpu":
        parser.error(
            "--quantize is for a CPU, since on a GPU `generate` runs 8-bit weights by other kernels"
        )
    clock = Clock(device)
    config = GPTConfig.preset(options.shape)
    require_context(config, options.context)
    held = cache_bytes(config, dtype, options.batch, options.context)
    require_memory(weight_bytes(config, dtype.itemsize) + held, device)
    model = random_model(config, dtype, device)
    itemsize = dtype.itemsize
    if options.quantize is not None:
        quantize(model)
        itemsize = 1
    if can_pack(model):
        pack(model)
    cache = KVCache(config, options.batch, options.context, dtype=dtype, device=device)
    cache.kv.normal_()
    read_clock = time.process_time if options.one_thread else time.perf_counter
    whole_step = make_step(model, cache, options.prefill)

    def undivided() -> float:
        # Behind one more, since what took its turn before this has emptied the caches.
        for _ in range(2):
            begin = read_clock()
            whole_step()
            clock.synchronize()
        return read_clock() - begin

    limits = probes(device, dtype, options.quantize is not None)
    actions: dict[str, Callable[[], object]] = {"step": undivided}
    actions |= {name: probe.run for name, probe in limits.items()}
    for action in actions.values():
        action()
    seconds = take_turns(actions, options.repeats, "step and ceilings", read_clock)
    ceilings = reached(limits, seconds)

    times: dict[str, float] = defaultdict(float)
    operators: dict[tuple[str, str], float] = {}
    if not clock.has_gpu:
        timer = PartTimer(read_clock)
        with step_of_parts(model, cache, options.prefill, timer.part) as step:
            times |= timed_parts(step, timer, options.repeats)
    if not options.one_thread:  # the profiler has no processor time
        with step_of_parts(model, cache, options.prefill, profiler_part) as step:
            profiled(step, clock, 2)  # a warm-up
            operators = profiled(step, clock, options.repeats)
    if clock.has_gpu:
        for (part, _), spent in operators.items():
            times[part] += spent
    least_work = work_by_part(
        config,
        options.batch,
        options.context,
        dtype,
        itemsize=itemsize,
        is_prefill=options.prefill,
    )
    parts = table(times, least_work, ceilings)
    whole = sum(times.values())
    longest = sorted(operators.items(), key=lambda item: -item[1])[:15]
    without = statistics.median(seconds["step"])
    least = sum(part["least_seconds"] for part in parts)
    figures = {
        "step_seconds": {
            "undivided": without,
            "undivided_quartiles": statistics.quantiles(seconds["step"], n=4)[::2],
            "sum_of_parts": whole,
            "least": least,
        },
        "ceilings": asdict(ceilings),
        "parts": parts,
        "operators": [
            {"part": part, "name": name, "seconds": spent, "share": spent / whole}
            for (part, name), spent in longest
        ],
    }

    print(f"{'part':20}{'ms':>8}{'share':>7}{'MB':>8}{'GB/s':>7}{'GFLOP/s':>9}  of roofline")
    for row in parts:
        print(
            f"{row['part']:20}{1000 * row['seconds']:>8.2f}{row['share']:>7.1%}"
            f"{row['bytes'] / 1e6:>8.1f}{row['gb_per_s']:>7.1f}{row['gflops']:>9.1f}"
            f"{row['of_roofline']:>9.0%} {row['limited_by']}"
        )
    print()
    for (part, name), spent in longest:
        print(f"{part:20}{name[:60]:60}{1000 * spent:>8.2f} ms")
    print(
        f"\nstep {1000 * without:.1f} ms, sum of parts {1000 * whole:.1f} ms, at least "
        f"{1000 * least:.1f} ms; {ceilings.gb_per_s:.1f} GB/s, "
        f"{ceilings.tflops(itemsize):.3g} TFLOP/s"
    )
    status = write_result(output, __doc__.split("\n")[0], options, figures)
    threads = ", one thread" if options.one_thread else ""
    what = "A prefill" if options.prefill else "One decode step"
    weights = options.quantize or options.dtype
    title = f"{what} of {options.shape}, {weights}, {where}{threads}\n"
    title += f"batch {options.batch}, context {options.context}"
    if can_plot():
        plot(parts, title, output.with_suffix(".png"))
    return status


if __name__ == "__main__":
    sys.exit(main())
