"""What the benchmarks share: interleaved timing, and results that say where they come from."""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from mqa_gpt.environment import describe

RESULTS = Path(__file__).parent / "results"


def interleaved(
    actions: Mapping[str, Callable[[], object]], repeats: int, label: str
) -> dict[str, dict[str, Any]]:
    """Run each action once as a warm-up, then all of them in turn, `repeats` times.

    Taking turns gives every action the same share of a noisy machine's good and bad moments.

    Args:
        actions: name -> what to time. An action that returns a float has timed itself.

    Returns:
        name -> {"median", "min", "max", "seconds": all repeats in order}, in seconds.
    """
    for action in actions.values():
        action()
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in tqdm(range(repeats), desc=label, disable=None):
        for name, action in actions.items():
            begin = time.perf_counter()
            measured = action()
            elapsed = time.perf_counter() - begin
            seconds[name].append(measured if isinstance(measured, float) else elapsed)
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
        if value is not None and not isinstance(value, Path)
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


def command(script: str, options: Mapping[str, Any]) -> str:
    """What repeats a benchmark from the root of the repository, defaults spelled out."""
    words = ["python", f"benchmarks/{script}"]
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)
