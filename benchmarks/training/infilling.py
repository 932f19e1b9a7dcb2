"""What does learning to infill cost a model that reads left to right?

    OMP_NUM_THREADS=1 nice python -m benchmarks.training.infilling --work RUNS

Bavarian et al. (2022) train models with and without documents rearranged for infilling, on equally
many tokens, and find the same loss on text that is read left to right. Here small multi-query
models of the standard library's sources are trained for equally many steps, for each rate of
infilling and each seed. Runs of one seed begin with the same weights and read the documents in the
same order. All are measured on the same held-out text, read left to right, and at the end on the
middles of the same holes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import (
    can_plot,
    make_parser,
    open_plot,
    positive,
    refuse_bad_input,
    within,
    write_result,
)
from benchmarks.training.small import add_sizes, load, result_file, run_config, train
from mqa_gpt.model import GPT
from mqa_gpt.training.config import RunConfig
from mqa_gpt.training.data import Data
from mqa_gpt.training.loop import Trainer
from mqa_gpt.training.parallel import World


def config(options: argparse.Namespace, rate: float, seed: int = 0) -> RunConfig:
    """A run with this rate of infilling; holes and orders are StarCoder's."""
    return run_config(
        options,
        data={"infilling": {"rate": rate}},
        optimizer={"name": "muon", "lr": options.lr},
        run={"seed": seed, "steps": options.steps},
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The held-out losses of every rate and seed."""
    rates = sorted({0.0, *options.rate})
    read = load(options, config(options, 0.0))  # all left to right
    holes = load(options, config(options, 1.0))  # all infilled
    figures: dict[str, Any] = {}
    for rate in rates:
        figures[f"{rate:g}"] = runs = []
        for seed in range(options.seeds):
            of_run = config(options, rate, seed)
            data = load(options, of_run)._replace(held_out=read.held_out)
            model, curve = train(f"rate-{rate:g}-seed-{seed}", of_run, data, options)
            runs.append(
                {
                    "left_to_right": curve.held_out,
                    "infilling": infilling_loss(of_run, model, holes),
                    "seconds_per_step": curve.seconds_per_step,
                }
            )
    return figures


def infilling_loss(config: RunConfig, model: GPT, holes: Data) -> float:
    """The held-out loss of middles, nats per token."""
    alone = World(0, 1, model.device)
    loss = Trainer(config, model, holes.training, holes.held_out, alone).evaluate()["infilling"]
    assert loss is not None
    return loss


def mean_losses(runs: list[dict[str, Any]]) -> tuple[float, float]:
    """Left to right and of middles at the end, mean of the seeds."""
    left_to_right = statistics.mean(run["left_to_right"][-1][1] for run in runs)
    return left_to_right, statistics.mean(run["infilling"] for run in runs)


def differences(figures: dict[str, Any], rate: str) -> list[list[float]]:
    """By how much a rate's left-to-right losses lie above those of rate 0, of each seed."""
    return [
        [loss - without for (_, loss), (_, without) in zip(*curves, strict=True)]
        for curves in zip(
            [run["left_to_right"] for run in figures[rate]],
            [run["left_to_right"] for run in figures["0"]],
            strict=True,
        )
    ]


def plot(figures: dict[str, Any], title: str, path: Path) -> None:
    """Left-to-right loss over the steps, and by how much it differs from that without infilling."""
    with open_plot(path, 2, title) as (curves, gaps):
        for i, (rate, runs) in enumerate(figures.items()):
            name = f"infilling rate {rate}"
            for seed, run in enumerate(runs):
                steps, losses = zip(*run["left_to_right"], strict=True)
                curves.plot(steps, losses, f"C{i}", linewidth=1, label=None if seed else name)
            if rate == "0":
                continue
            found = differences(figures, rate)
            for seed, gap in enumerate(found):
                label = None if seed else f"{name}, each seed"
                gaps.plot(steps, gap, f"C{i}", linewidth=1, alpha=0.5, label=label)
            mean = [statistics.mean(at_step) for at_step in zip(*found, strict=True)]
            gaps.plot(steps, mean, f"C{i}", linewidth=3, label=f"{name}, mean of the seeds")
        gaps.axhline(0, color="black", linewidth=0.8)
        curves.set(ylabel="held-out loss, left to right, nats per token")
        gaps.set(ylabel="difference from rate 0 with the same seed, nats")
        for axes in (curves, gaps):
            axes.set(xlabel="step")
            axes.grid(alpha=0.3)
            axes.legend()


@refuse_bad_input
def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "training_infilling_*.json")
    add_sizes(parser, steps=1000)
    parser.add_argument(
        "--rate", type=within(0.0, 1.0), nargs="+", default=[0.5], help="compared with 0"
    )
    parser.add_argument("--seeds", type=positive, default=4)
    parser.add_argument("--lr", type=within(1e-6, 1.0), default=4e-3, help="peak, of Muon")
    options = parser.parse_args(arguments)
    output = result_file(options, "infilling")
    figures = measure(options)
    for rate, runs in figures.items():
        left_to_right, infilling = mean_losses(runs)
        print(f"rate {rate}: left to right {left_to_right:.4f}, infilling {infilling:.4f}")
    status = write_result(output, __file__, __doc__, options, figures)
    if can_plot():
        title = f"Infilling and left-to-right loss: {options.layers} layers, width "
        title += f"{options.width}, {options.steps:,} steps of "
        title += f"{options.batch * options.length:,} tokens"
        plot(figures, title, output.with_suffix(".png"))
    return status


if __name__ == "__main__":
    sys.exit(main())
