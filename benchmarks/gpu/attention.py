"""How fast are the kernels, forward, backward and decoding, and how much memory does training take?

    PYTHONPATH=kernels python -m benchmarks.gpu.attention
    PYTHONPATH=kernels python -m benchmarks.gpu.attention --only decode

Needs a GPU. Every case times ours, every backend of scaled_dot_product_attention, FlexAttention and
plain PyTorch in turn (contenders.py), and says which of them are as exact as they should be
(judge.py); the tables show only these, each backend in its fastest form. Everything is written to
`out/attention_<GPU>.json`, with plots next to it if matplotlib is installed.
"""

from __future__ import annotations

import math
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.clock import Clock
from benchmarks.gpu.contenders import (
    EXPANDED,
    FLEX,
    OURS,
    PLAIN,
    SDPA,
    Figures,
    Problem,
    measure_backward,
    measure_decode,
    measure_forward,
    measured,
)
from benchmarks.measure import (
    can_plot,
    device_name,
    make_parser,
    nothing_measured,
    open_plot,
    positive,
    refuse_bad_input,
    result_path,
    write_result,
)
from mqa_gpt.bench.ceilings import measure_ceilings

LINES = (OURS, *SDPA, FLEX, PLAIN)
MEASURES = {"forward": measure_forward, "backward": measure_backward, "decode": measure_decode}

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
BATCHES = (1, 8, 16, 32, 64, 128, 256)
TOKENS = 16384  # of a forward or backward pass, in sequences of T


class Chart(NamedTuple):
    """One table and plot: a figure of every contender over the problems' field `x`.

    Attributes:
        figure: its name in the results.
        unit: what it is divided by.
        ceiling: the ceiling that it is a share of, too.
    """

    name: str
    kind: str
    x: str
    problems: tuple[Problem, ...]
    figure: str
    label: str
    unit: float = 1.0
    ceiling: str | None = None


def training(H: int, D: int) -> tuple[Problem, ...]:
    return tuple(Problem(max(1, TOKENS // T), T, T, H, D) for T in LENGTHS)


def charts() -> list[Chart]:
    """What is measured on a GPU."""
    found = []
    tflops = ("tflops", "TFLOP/s", 1.0, "matmul_tflops")
    gb_per_s = ("gb_per_s", "GB/s", 1.0, "copy_gb_per_s")
    for H, D in ((32, 128), (16, 64)):
        for kind in ("forward", "backward"):
            name = f"{kind}, causal, H {H}, D {D}"
            found.append(Chart(name, kind, "T", training(H, D), *tflops))
    memory = "memory of training, H 32, D 128"
    found.append(Chart(memory, "backward", "T", training(32, 128), "peak_bytes", "GB", 1e9))
    for S in (1024, 8192):
        problems = tuple(Problem(B, 1, S, 32, 128) for B in BATCHES)
        found.append(Chart(f"decode, context {S}", "decode", "B", problems, *gb_per_s))
    for B in (1, 16):
        problems = tuple(Problem(B, 1, S, 32, 128) for S in LENGTHS)
        found.append(Chart(f"decode, batch {B}", "decode", "S", problems, *gb_per_s))
    return found


Results = dict[tuple[str, Problem], list[Figures]]


def measure_all(clock: Clock, chosen: list[Chart], repeats: int) -> Results:
    """The results of every problem of the charts, each measured once."""
    results: Results = {}
    for chart in chosen:
        for problem in chart.problems:
            if (chart.kind, problem) not in results:
                results[chart.kind, problem] = MEASURES[chart.kind](problem, clock, repeats)
                clock.release()
    return results


def value(found: list[Figures], line: str, chart: Chart) -> float:
    """A line's figure for one problem; NaN if it refused or is not as exact as it should be.

    An SDPA backend has several forms: the fastest counts, but for memory the one whose heads are
    views of the one key/value head.
    """

    def counts(figures: Figures) -> bool:
        if chart.figure == "peak_bytes":
            return figures["contender"] in (line, f"{line}, {EXPANDED}")
        return bool(figures["contender"].partition(",")[0] == line)

    values = [f[chart.figure] / chart.unit for f in found if counts(f) and f.get("right")]
    return max(values, default=math.nan)


def table(chart: Chart, results: Results, ceiling: float) -> str:
    """One line per problem; with a ceiling, our share of it last."""
    lines = [f"{chart.name}: {chart.label}"]
    head = f"{chart.x:>6}" + "".join(f"{line[:13]:>14}" for line in LINES)
    lines.append(head + (f"{'of ceiling':>12}" if chart.ceiling else ""))
    for problem in chart.problems:
        values = [value(results[chart.kind, problem], line, chart) for line in LINES]
        text = f"{getattr(problem, chart.x):>6}"
        text += "".join(f"{'-':>14}" if math.isnan(v) else f"{v:>14.4g}" for v in values)
        lines.append(text + (f"{values[0] / ceiling:>12.2f}" if chart.ceiling else ""))
    return "\n".join(lines)


def plot(chart: Chart, results: Results, ceiling: float, path: Path) -> None:
    """A line per contender, and one for the ceiling."""
    with open_plot(path, 1, chart.name, width=8) as axes:
        xs = [getattr(problem, chart.x) for problem in chart.problems]
        for line in LINES:
            ys = [value(results[chart.kind, problem], line, chart) for problem in chart.problems]
            axes.plot(xs, ys, "o-", label=line)
        if chart.ceiling:
            axes.axhline(ceiling, color="black", label="ceiling")
        axes.set_xscale("log", base=2)
        axes.set_xticks(xs, labels=map(str, xs))
        axes.set(xlabel=chart.x, ylabel=chart.label)
        axes.legend(fontsize=8)


def report(chosen: list[Chart], results: Results, ceilings: dict[str, Any], output: Path) -> None:
    """Print the tables, and draw the plots if matplotlib is installed."""
    draws = can_plot()
    for chart in chosen:
        ceiling = ceilings.get(chart.ceiling or "", math.nan)
        print(table(chart, results, ceiling), end="\n\n")
        if draws:
            name = re.sub(r"\W+", "_", chart.name)
            plot(chart, results, ceiling, output.with_name(f"{output.stem}_{name}.png"))


@refuse_bad_input
def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "attention_*.json")
    parser.add_argument(
        "--only", nargs="+", choices=MEASURES, default=list(MEASURES), help="what to measure"
    )
    parser.add_argument("--repeats", type=positive, default=30, help="rounds of measurement")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.gpu.attention needs a GPU: PyTorch sees none", file=sys.stderr)
        return 1

    device = torch.device("cuda")
    output = result_path(options.output, f"attention_{device_name(device)}.json")
    clock = Clock(device)
    chosen = [chart for chart in charts() if chart.kind in options.only]
    ceilings = asdict(measure_ceilings(device, torch.bfloat16, options.repeats))
    clock.release()
    results = measure_all(clock, chosen, options.repeats)
    if not any(map(measured, results.values())):
        return nothing_measured()
    figures: dict[str, Any] = {"ceilings": ceilings}
    for (kind, problem), found in results.items():
        figures.setdefault(kind, []).append({"problem": problem.describe(), "results": found})
    status = write_result(
        output,
        __file__,
        __doc__,
        options,
        figures,
        dtype="bfloat16",
        timing="CUDA events around replays of CUDA graphs, L2 flushed, contenders in turn, medians",
    )
    report(chosen, results, ceilings, output)
    return status


if __name__ == "__main__":
    sys.exit(main())
