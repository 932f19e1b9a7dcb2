"""What does one key/value head for all queries save over one for each, when decoding?

    python -m benchmarks.mqa_vs_mha                                       # CPU, some minutes
    python -m benchmarks.mqa_vs_mha --one-thread                          # on a CPU in use
    python -m benchmarks.mqa_vs_mha --shape starcoderbase-1b --dtype bfloat16 \
        --batch 1 8 32 --context 512 2048 8192                            # GPU

Two models of random weights take turns: the shape with multi-query attention, and with multi-head
attention. Both have the same width, layers and, as in Shazeer (2019), the same number of weights:
the first has a smaller `c_attn` and a wider MLP. A measurement is one decode step of the whole
model after `context` tokens per row, as `generate` runs it: on a CPU as one compiled function, on
a GPU as a CUDA graph, with fused kernels where the rows are few. The largest batch is computed from
the sizes.

`--one-thread` counts the processor's time of one thread, which leaves out the turns of other
programs: on a machine that others use, several threads would mostly wait for each other.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import Clock
from benchmarks.measure import (
    add_model,
    can_plot,
    interleaved,
    make_parser,
    nothing_measured,
    open_plot,
    positive,
    read_device,
    refuse_bad_input,
    require_context,
    require_memory,
    result_path,
    several,
    within,
    write_result,
)
from mqa_gpt import GPT, GPTConfig, KVCache
from mqa_gpt.bench.run import random_model
from mqa_gpt.cache import cache_bytes
from mqa_gpt.fast.compiled import step_forward
from mqa_gpt.fast.decode_step import greedy_step
from mqa_gpt.generation.replay import can_replay
from mqa_gpt.machine import available_memory

NAMES = ("MQA", "MHA")


def both_configs(config: GPTConfig) -> dict[str, GPTConfig]:
    """A config with one key/value head and one with H, with as many weights in their matrices."""
    mha = dataclasses.replace(config, multi_query=False)
    # K and V of MHA have 2 C (C - D) weights more; a unit of the MLP has 2 C.
    wider = config.inner_size + config.n_embd - config.head_dim
    return {"MQA": dataclasses.replace(config, n_inner=wider), "MHA": mha}


def decode_step(model: GPT, batch: int, context: int) -> Callable[[], object]:
    """A function that decodes the token at the end of `context` tokens per row, its own included;
    every call does so in the same slot. The cache holds random numbers.
    """
    cache = KVCache(model.config, batch, context, dtype=model.dtype, device=model.device)
    cache.kv.normal_()
    if can_replay(model):  # as `generate` does on a GPU
        run, state = greedy_step(model, cache)

        def step() -> None:
            state.lengths.fill_(context - 1)  # each run adds a token
            run()
    else:
        ids = torch.randint(model.config.vocab_size, (batch, 1), device=model.device)  # (B, 1)
        forward = step_forward(model)

        def step() -> None:
            cache.end = context - 1
            forward(ids, cache)

    inference_step = torch.inference_mode()(step)
    for _ in range(2):
        inference_step()  # on a GPU the second run records the graph
    return inference_step


def largest_batch(config: GPTConfig, dtype: torch.dtype, context: int, memory: float) -> int:
    """Rows of `context` tokens whose cache fits into the memory that the weights leave."""
    left = memory - config.parameters * dtype.itemsize
    return max(0, int(left // cache_bytes(config, dtype, 1, context)))


def measure(
    models: dict[str, GPT], batch: int, context: int, repeats: int, one_thread: bool
) -> dict[str, Any]:
    """One case: seconds per step of both, and MHA's over MQA's in the same round."""
    any_model = models["MQA"]
    clock = Clock(any_model.device)
    case: dict[str, Any] = {"batch": batch, "context": context}
    case["cache_bytes"] = {
        name: cache_bytes(model.config, model.dtype, batch, context)
        for name, model in models.items()
    }
    room = available_memory(any_model.device)
    if room is not None and sum(case["cache_bytes"].values()) > 0.8 * room:
        return case | {"left_out": "the caches do not fit into the free memory"}
    actions = {name: decode_step(model, batch, context) for name, model in models.items()}
    label = f"batch {batch}, context {context}"
    if one_thread:
        times = interleaved(actions, repeats, label, time.process_time)
    else:
        times = clock.times(actions, repeats, label)
    rounds = zip(times["MHA"]["seconds"], times["MQA"]["seconds"], strict=True)
    ratios = [mha / mqa for mha, mqa in rounds]
    low, middle, high = statistics.quantiles(ratios, n=4)
    del actions
    clock.release()
    return case | {"times": times, "ratio": {"median": middle, "quartiles": [low, high]}}


def plot(figures: dict[str, Any], title: str, path: Path) -> None:
    """Time per step and its ratio over the context, a line per batch; the largest batch."""
    cases = [case for case in figures["cases"] if "times" in case]
    batches = sorted({case["batch"] for case in cases})
    colours = {batch: f"C{i}" for i, batch in enumerate(batches)}
    with open_plot(path, 3, title) as (seconds, ratio, largest):
        for batch in batches:
            mine = [case for case in cases if case["batch"] == batch]
            xs = [case["context"] for case in mine]
            for name, style in zip(NAMES, ("o-", "s--"), strict=True):
                ys = [1000 * case["times"][name]["median"] for case in mine]
                seconds.plot(xs, ys, style, color=colours[batch], label=f"{name}, batch {batch}")
            middle = [case["ratio"]["median"] for case in mine]
            ends = [case["ratio"]["quartiles"] for case in mine]
            ratio.plot(xs, middle, "o-", color=colours[batch], label=f"batch {batch}")
            ratio.fill_between(xs, *zip(*ends, strict=True), color=colours[batch], alpha=0.2)
        for name, style in zip(NAMES, ("o-", "s--"), strict=True):
            rows = figures["largest_batch"]["rows"]
            points = [(int(context), both[name]) for context, both in rows.items() if both[name]]
            largest.plot(*zip(*points, strict=True), style, color="black", label=name)
        seconds.set(ylabel="milliseconds per decode step", yscale="log")
        ratio.set(ylabel="MHA's time / MQA's (shaded: quartiles)")
        ratio.axhline(1, color="grey", linewidth=0.8)
        memory = figures["largest_batch"]["memory_gb"]
        largest.set(ylabel=f"largest batch in {memory:g} GB (computed)", yscale="log")
        for axes in (seconds, ratio, largest):
            axes.set_xscale("log")
            axes.set_xticks(sorted({case["context"] for case in cases}), minor=False)
            axes.set_xticks([], minor=True)
            axes.xaxis.set_major_formatter("{x:.0f}")
            axes.set(xlabel="context, tokens")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)


def show(case: dict[str, Any]) -> None:
    """Print a line of the table."""
    line = f"{case['batch']:>6}{case['context']:>9}"
    if "left_out" in case:
        print(f"{line}  {case['left_out']}", flush=True)
        return
    mqa, mha = (1000 * case["times"][name]["median"] for name in NAMES)
    low, high = case["ratio"]["quartiles"]
    line += f"{mqa:>10.1f}{mha:>10.1f}{case['ratio']['median']:>8.2f}"
    print(f"{line}  {low:.2f} to {high:.2f}", flush=True)


@refuse_bad_input
def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "mqa_vs_mha_*.json")
    add_model(parser)
    parser.add_argument("--batch", type=positive, nargs="+", default=[1, 2, 8], help="rows at once")
    parser.add_argument(
        "--context", type=positive, nargs="+", default=[256, 1024, 4096], help="tokens per row"
    )
    parser.add_argument(
        "--memory-gb", type=within(0.001, 1e6), default=16.0, help="for the largest batch"
    )
    parser.add_argument("--repeats", type=several, default=15, help="rounds of measurement")
    options = parser.parse_args(arguments)

    device, dtype, where = read_device(options)
    output = result_path(options.output, f"mqa_vs_mha_{options.shape}_{where}.json")
    configs = both_configs(GPTConfig.preset(options.shape))
    require_context(configs["MQA"], max(options.context))
    require_memory(sum(config.parameters for config in configs.values()) * dtype.itemsize, device)
    models = {name: random_model(config, dtype, device) for name, config in configs.items()}
    print(f"{'batch':>6}{'context':>9}{'MQA, ms':>10}{'MHA, ms':>10}{'MHA/MQA':>8}  quartiles")
    cases = []
    for batch in options.batch:
        for context in options.context:
            cases.append(measure(models, batch, context, options.repeats, options.one_thread))
            show(cases[-1])
    if not any("times" in case for case in cases):
        return nothing_measured()
    figures: dict[str, Any] = {
        "parameters": {name: config.parameters for name, config in configs.items()},
        "n_inner": {name: config.inner_size for name, config in configs.items()},
        "cache_bytes_per_token": {
            name: cache_bytes(config, dtype) for name, config in configs.items()
        },
        "cases": cases,
        "largest_batch": {
            "memory_gb": options.memory_gb,
            "rows": {
                str(context): {
                    name: largest_batch(config, dtype, context, options.memory_gb * 1e9)
                    for name, config in configs.items()
                }
                for context in options.context
            },
        },
    }
    status = write_result(output, __file__, __doc__, options, figures)
    title = f"One key/value head (MQA) or one per query head (MHA): {options.shape}, "
    title += f"{options.dtype}, {where}{', one thread' if options.one_thread else ''}"
    if can_plot():
        plot(figures, title, output.with_suffix(".png"))
    return status


if __name__ == "__main__":
    sys.exit(main())
