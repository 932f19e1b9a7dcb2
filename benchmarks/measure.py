"""What the benchmarks share: interleaved timing, and results that say where they come from."""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mqa_gpt.bench import take_turns
from mqa_gpt.environment import describe

RESULTS = Path(__file__).parent / "results"


def interleaved(
    actions: Mapping[str, Callable[[], object]], repeats: int, label: str
) -> dict[str, dict[str, Any]]:
    """Run each action once as a warm-up, then all of them in turn, `repeats` times.

    Args:
        actions: name -> what to time (see `take_turns`).

    Returns:
        name -> {"median", "min", "max", "seconds": all repeats in order}, in seconds.
    """
    for action in actions.values():
        action()
    seconds = take_turns(actions, repeats, label)
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
