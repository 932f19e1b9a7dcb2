"""A picture of a run: losses, learning rate, gradient norm and speed over its steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from mqa_gpt.errors import InputError
from mqa_gpt.machine import INSTALL_PEERS
from mqa_gpt.training.config import require_run
from mqa_gpt.training.log import LOG_FILE, LOSSES, read_log

SMOOTHED_POINTS = 200  # of a curve: more steps than these are averaged in groups


def plot_run(run: Path, output: Path | None = None) -> Path:
    """Draw a run's log.

    Args:
        run: folder of the run.
        output: a file whose ending says the format; None for `RUN/plot.png`.

    Returns:
        The file.

    Raises:
        InputError: there is no log with a step in it, or no matplotlib.
    """
    records = read_log(run)
    steps = [record for record in records if record["kind"] == "train"]
    if not steps:
        require_run(run)
        raise InputError(f"{run / LOG_FILE} holds no steps yet: there is nothing to draw")
    try:
        import matplotlib as mpl
    except ImportError:
        raise InputError(f"matplotlib is not installed: {INSTALL_PEERS}") from None
    mpl.use("agg")  # no window
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), sharex=True, layout="constrained")
    (losses, rate), (norm, speed) = axes
    losses.plot(*_curve(steps, "loss"), color="0.7", linewidth=1, label="training")
    held_out = [record for record in records if record["kind"] == "held_out"]
    for (name, meaning), color in zip(LOSSES.items(), ("C0", "C2", "C1"), strict=True):
        points = [(r["step"], r[name]) for r in held_out if r.get(name) is not None]
        if points:
            label = f"held out, {meaning}"
            losses.plot(*zip(*points, strict=True), ".-", color=color, label=label)
    losses.set_ylabel("loss, nats per token")
    losses.legend()
    rate.plot(*_curve(steps, "lr"), color="C0")
    rate.set_ylabel("learning rate")
    norm.plot(*_curve(steps, "grad_norm"), color="C0")
    norm.set_ylabel("gradient norm before clipping")
    norm.set_yscale("log")
    speed.plot(*_curve(steps, "tokens_per_second"), color="C0")
    speed.set_ylabel("tokens per second")
    speed.set_ylim(bottom=0)
    for row in axes:
        for axis in row:
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.suptitle(run.resolve().name)
    path = output or run / "plot.png"
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:  # an ending that matplotlib does not know
        raise InputError(f"{path} cannot be drawn: {error}") from None
    pyplot.close(figure)
    return path


def _curve(records: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values, averaged in groups if there are many; what is not finite is left out."""
    points = [(r["step"], r[key]) for r in records if r[key] is not None]
    group = math.ceil(len(points) / SMOOTHED_POINTS) or 1
    parts = [points[i : i + group] for i in range(0, len(points), group)]
    return (
        [sum(step for step, _ in part) / len(part) for part in parts],
        [sum(value for _, value in part) / len(part) for part in parts],
    )
