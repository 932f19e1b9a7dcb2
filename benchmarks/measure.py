"""What the benchmarks share: interleaved timing, and results that say where they come from."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mqa_gpt.environment import describe

RESULTS = Path(__file__).parent / "results"


def interleaved(
    actions: dict[str, Callable[[], float | None]], repeats: int, label: str
) -> dict[str, dict[str, Any]]:
    """Run each action once as a warm-up, then all of them in turn, `repeats` times.

    Taking turns gives every action the same share of a noisy machine's good and bad moments.

    Args:
        actions: name -> what to time. An action that returns a number has timed itself.

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
            seconds[name].append(elapsed if measured is None else measured)
    return {
        name: {
            "median": statistics.median(values),
            "min": min(values),
            "max": max(values),
            "seconds": [round(value, 5) for value in values],
        }
        for name, values in seconds.items()
    }


def write_result(path: Path, question: str, settings: dict[str, Any], figures: Any) -> None:
    """Write one benchmark's JSON: what was asked, how, where, when, and what came out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "question": question,
        "command": "python " + " ".join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "environment": describe(),
        "settings": settings,
        "figures": figures,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}", file=sys.stderr)
