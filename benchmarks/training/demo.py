"""Draw how the demo checkpoint's held-out losses fell.

    python -m benchmarks.training.demo

Reads `results/demo_checkpoint.json`, which `scripts/demo/evaluate_demo.py` wrote, and writes a PNG
of the same name next to it. Each run draws its own held-out sequences (by its seed and infilling
rate), so a curve can be compared with itself only.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, open_plot

FIGURES = ROOT / "benchmarks/results/demo_checkpoint.json"
KINDS = {"left_to_right": "left to right", "infilling": "middles of holes"}


def curves(training: list[dict[str, Any]], kind: str) -> list[tuple[list[float], list[float]]]:
    """Each run's held-out losses of a kind over all tokens read so far, in millions."""
    found, before = [], 0
    for run in training:
        tokens_per_step = run["tokens"] / run["steps"]
        points = [(before + p["step"] * tokens_per_step, p[kind]) for p in run["held_out"]]
        found.append(([x / 1e6 for x, _ in points], [loss for _, loss in points]))
        before += run["tokens"]
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("figures", type=Path, nargs="?", default=FIGURES)
    path = parser.parse_args(arguments).figures
    training = json.loads(path.read_text("utf-8"))["training"]
    with open_plot(path.with_suffix(".png"), 1, "The demo checkpoint") as axes:
        for color, (kind, label) in zip(("C2", "C1"), KINDS.items(), strict=True):
            for i, (tokens, losses) in enumerate(curves(training, kind)):
                style = ".-" if i == 0 else ".--"
                axes.plot(tokens, losses, style, color=color, label=f"{label}, run {i + 1}")
        axes.set(xlabel="million tokens", ylabel="held-out loss, nats per token")
        axes.grid(alpha=0.3)
        axes.legend()


if __name__ == "__main__":
    main()
