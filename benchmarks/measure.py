"""What the benchmarks share: interleaved timing, results that say where they come from, plots."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mqa_gpt.bench import take_turns
from mqa_gpt.environment import describe

RESULTS = Path(__file__).parent / "results"


def interleaved(
    actions: Mapping[str, Callable[[], object]],
    repeats: int,
    label: str,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, Any]]:
    """Run each action once as a warm-up, then all of them in turn, `repeats` times.

    Args:
        actions, clock: what to time, by name, and how (see `take_turns`).

    Returns:
        name -> {"median", "min", "max", "seconds": all repeats in order}, in seconds.
    """
    for action in actions.values():
        action()
    seconds = take_turns(actions, repeats, label, clock)
    return {
        name: {
            "median": statistics.median(values),
            "min": min(values),
            "max": max(values),
            "seconds": [float(f"{value:.4g}") for value in values],
        }
        for name, values in seconds.items()
    }


def write_result(
    path: Path, question: str, options: argparse.Namespace, figures: Any, **settings: Any
) -> None:
    """Write one benchmark's JSON: what was asked, how, where, when, and what came out.

    Args:
        options: the benchmark's own; paths are left out, since they do not change the figures.
        settings: what else was fixed.
    """
    given = {
        name: value
        for name, value in vars(options).items()
        if value is not None and value is not False and not isinstance(value, Path)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "question": question,
        "command": command(Path(sys.argv[0]).name, given),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "environment": describe(),
        "settings": given | settings,
        "figures": figures,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}", file=sys.stderr)


def can_plot() -> bool:
    """Whether matplotlib is here; says so if not."""
    found = importlib.util.find_spec("matplotlib") is not None
    if not found:
        print("no plot: matplotlib is not installed", file=sys.stderr)
    return found


@contextmanager
def open_plot(path: Path, panels: int, title: str, width: float = 5.5) -> Iterator[Any]:
    """Axes side by side to draw on, `width` inches each, written as a PNG in the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, figsize=(width * panels, 4.5), layout="constrained")
    figure.suptitle(title)
    yield axes
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    print(f"drawn to {path}", file=sys.stderr)


def command(script: str, options: Mapping[str, Any]) -> str:
    """What repeats a benchmark from the root of the repository, defaults spelled out."""
    words = ["python", f"benchmarks/{script}"]
    for name, value in options.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)
