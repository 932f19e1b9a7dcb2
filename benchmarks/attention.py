"""How fast are the kernels, forward, backward and decoding, and how much memory does training take?

    PYTHONPATH=.:kernels python benchmarks/attention.py
    PYTHONPATH=.:kernels python benchmarks/attention.py --only decode

Needs a GPU. Every case times ours, every backend of scaled_dot_product_attention, FlexAttention and
plain PyTorch in turn (contenders.py), and says which of them are as exact as they should be
(judge.py); the tables show these only, each backend in its fastest form. Everything is written to
`out/attention_<GPU>.json`, and plots beside it if matplotlib and pandas are installed.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton.testing
from clock import Clock
from contenders import (
    EXPANDED,
    FLEX,
    OURS,
    PLAIN,
    SDPA,
    Problem,
    Row,
    measure_backward,
    measure_ceilings,
    measure_decode,
    measure_forward,
    measured,
)
from measure import (
    make_parser,
    nothing_measured,
    place,
    positive,
    refuse_bad_input,
    replacing,
    result_path,
    write_result,
)

LINES = (OURS, *SDPA, FLEX, PLAIN)
MEASURES = {"forward": measure_forward, "backward": measure_backward, "decode": measure_decode}

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
BATCHES = (1, 8, 16, 32, 64, 128, 256)
TOKENS = 16384  # of a forward or backward pass: sequences of T, as many as this has


class Chart(NamedTuple):
    """One table and plot: `figure` of every line over the problem's field `x`.

    Attributes:
        unit: what one of the figure is divided by, for the axis.
        ceiling: which of the ceilings' rates the figure is also shown as a share of.
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


def decoding(context: int, heads: int = 32) -> tuple[Problem, ...]:
    return tuple(Problem(B, 1, context, heads, 128) for B in BATCHES)


def charts() -> list[Chart]:
    """What is measured on a GPU."""
    found = []
    for H, D in ((32, 128), (16, 64)):
        problems = training(H, D)
        for kind in ("forward", "backward"):
            name = f"{kind}, causal, H {H}, D {D}"
            found.append(
                Chart(name, kind, "T", problems, "tflops", "TFLOP/s", ceiling="matmul_tflops")
            )
    # Beside ours: heads as views of the one key/value head, whose gradients come head by head.
    found.append(
        Chart("memory of training, H 32, D 128", "backward", "T", training(32, 128),
              "peak_bytes", "GB", 1e9)
    )  # fmt: skip
    for context in (1024, 8192):
        found.append(
            Chart(f"decode, context {context}", "decode", "B", decoding(context),
                  "gb_per_s", "GB/s", ceiling="copy_gb_per_s")
        )  # fmt: skip
    for B in (1, 16):
        problems = tuple(Problem(B, 1, S, 32, 128) for S in LENGTHS)
        found.append(
            Chart(f"decode, batch {B}", "decode", "S", problems,
                  "gb_per_s", "GB/s", ceiling="copy_gb_per_s")
        )  # fmt: skip
    return found


def measure_all(
    clock: Clock, chosen: list[Chart], repeats: int
) -> dict[tuple[str, Problem], list[Row]]:
    """The results of every problem of the charts, each measured once."""
    results: dict[tuple[str, Problem], list[Row]] = {}
    for chart in chosen:
        for problem in chart.problems:
            if (chart.kind, problem) not in results:
                measure = MEASURES[chart.kind]
                results[chart.kind, problem] = measure(problem, clock, repeats, True)
                clock.release()
    return results


def value(rows: list[Row], line: str, chart: Chart) -> float:
    """A line's figure for one problem; NaN if it refused or is not as exact as it should be.

    An SDPA backend has several forms: the fastest counts, but for memory the one without copies.
    """

    def counts(row: Row) -> bool:
        if chart.figure == "peak_bytes":
            return row["contender"] in (line, f"{line}, {EXPANDED}")
        return bool(row["contender"].partition(",")[0] == line)

    found = [row[chart.figure] / chart.unit for row in rows if counts(row) and row.get("right")]
    return max(found, default=math.nan)


def table(chart: Chart, results: dict[tuple[str, Problem], list[Row]], ceiling: float) -> str:
    """One line per problem; with a ceiling, our share of it last."""
    lines = [f"{chart.name}: {chart.label}"]
    head = f"{chart.x:>6}" + "".join(f"{line[:13]:>14}" for line in LINES)
    lines.append(head + (f"{'of ceiling':>12}" if chart.ceiling else ""))
    for problem in chart.problems:
        rows = results[chart.kind, problem]
        values = [value(rows, line, chart) for line in LINES]
        text = f"{getattr(problem, chart.x):>6}"
        text += "".join(f"{'-':>14}" if math.isnan(v) else f"{v:>14.4g}" for v in values)
        lines.append(text + (f"{values[0] / ceiling:>12.2f}" if chart.ceiling else ""))
    return "\n".join(lines)


def plot(
    chart: Chart, results: dict[tuple[str, Problem], list[Row]], ceiling: float, path: Path
) -> None:
    """A PNG by triton.testing, which wants a folder of its own; the ceiling is one more line."""
    by_x = {getattr(problem, chart.x): problem for problem in chart.problems}
    names = [*LINES, "ceiling"] if chart.ceiling else list(LINES)

    def figure(contender: str, **x: int) -> float:
        if contender == "ceiling":
            return ceiling
        return value(results[chart.kind, by_x[x[chart.x]]], contender, chart)

    benchmark = triton.testing.Benchmark(
        x_names=[chart.x], x_vals=list(by_x), x_log=True, line_arg="contender",
        line_vals=names, line_names=names, ylabel=chart.label, plot_name=path.stem, args={},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        triton.testing.perf_report(benchmark)(figure).run(save_path=folder)
        with replacing(path) as part:
            part.write_bytes((Path(folder) / path.name).read_bytes())


def report(
    chosen: list[Chart],
    results: dict[tuple[str, Problem], list[Row]],
    ceilings: dict[str, float],
    output: Path,
) -> None:
    """Print the tables, and draw the plots if that is possible here."""
    draws = all(importlib.util.find_spec(name) for name in ("matplotlib", "pandas"))
    for chart in chosen:
        ceiling = ceilings.get(chart.ceiling or "", math.nan)
        print(table(chart, results, ceiling), end="\n\n")
        if draws:
            name = re.sub(r"\W+", "_", chart.name)
            plot(chart, results, ceiling, output.with_name(f"{output.stem}_{name}.png"))
    if not draws:
        print("no plots: matplotlib and pandas are not installed", file=sys.stderr)


@refuse_bad_input
def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "attention_*.json")
    parser.add_argument(
        "--only", nargs="+", choices=MEASURES, default=list(MEASURES), help="what to measure"
    )
    parser.add_argument("--repeats", type=positive, default=30, help="rounds of measurement")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks/attention.py needs a GPU: none is visible to PyTorch", file=sys.stderr)
        return 1

    os.environ.setdefault("MPLBACKEND", "Agg")  # plots go to files
    device = torch.device("cuda")
    output = result_path(options.output, f"attention_{place(device)}.json")
    clock = Clock(device)
    chosen = [chart for chart in charts() if chart.kind in options.only]
    ceilings = measure_ceilings(clock, options.repeats)
    clock.release()
    results = measure_all(clock, chosen, options.repeats)
    if not any(map(measured, results.values())):
        return nothing_measured()
    figures: dict[str, Any] = {"ceilings": ceilings}
    for (kind, problem), rows in results.items():
        figures.setdefault(kind, []).append({"problem": problem.describe(), "results": rows})
    status = write_result(
        output,
        __doc__.split("\n")[0],
        options,
        figures,
        dtype="bfloat16",
        timing="CUDA events around replays of CUDA graphs, L2 flushed, contenders in turn, medians",
    )
    report(chosen, results, ceilings, output)
    return status


if __name__ == "__main__":
    sys.exit(main())
