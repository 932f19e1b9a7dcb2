"""In how many steps does Muon, with c_attn whole or taken apart, reach AdamW's held-out loss?

    OMP_NUM_THREADS=1 nice python -m benchmarks.training.optimizers --work RUNS

A small multi-query model of the standard library's sources. Every optimizer's learning rate is
chosen among `--lr` with one seed and `--steps` steps; AdamW's is also the rate of the embeddings
and norms under Muon. Then each runs with every seed, Muon also for the shares `--shares` of the
steps, each time with a whole schedule: a run that is to be short is compared with one that is to be
long, not with the middle of one. How far Muon has to go is interpolated between these.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from benchmarks.training.small import (
    Curve,
    add_sizes,
    load,
    result_file,
    run_config,
    steps_to_reach,
    train,
)
from mqa_gpt.training.data import Data

VARIANTS: dict[str, dict[str, Any]] = {
    "AdamW": {"name": "adamw"},
    "Muon, c_attn split": {"name": "muon", "split_qkv": True},
    "Muon, c_attn whole": {"name": "muon", "split_qkv": False},
}
COLOURS = dict(zip(VARIANTS, ("C0", "C1", "C2"), strict=True))


class Experiment:
    """The runs, each made when it is first asked for."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.data: Data = load(options, run_config(options))
        self.rates: dict[str, float] = {}  # the best one of each variant

    def run(self, variant: str, lr: float, seed: int, steps: int) -> Curve:
        """One run; `lr` is Muon's where the variant is Muon."""
        settings = {**VARIANTS[variant], "lr": lr, "weight_decay": self.options.weight_decay}
        if settings["name"] == "muon":
            settings |= {"lr": self.rates["AdamW"], "muon_lr": lr}
        config = run_config(self.options, optimizer=settings, run={"seed": seed, "steps": steps})
        short = variant.replace(",", "").replace(" ", "-")
        return train(f"{short}_{lr:g}_{seed}_{steps}", config, self.data, self.options)[1]

    def tune(self, variant: str) -> dict[str, float]:
        """The final loss by learning rate, with the first seed; keeps the best rate."""
        losses = {lr: self.run(variant, lr, 0, self.options.steps).final for lr in self.options.lr}
        self.rates[variant] = min(losses, key=losses.__getitem__)
        return {f"{lr:g}": loss for lr, loss in losses.items()}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All runs, and what share of AdamW's steps Muon needs."""
    experiment = Experiment(options)
    tuning = {variant: experiment.tune(variant) for variant in VARIANTS}
    seeds, full = range(options.seeds), options.steps
    shares = sorted(set(options.shares))
    variants = {}
    for variant in VARIANTS:
        lengths = [round(share * full) for share in shares] if variant != "AdamW" else [full]
        runs = {
            str(steps): [
                dataclasses.asdict(experiment.run(variant, experiment.rates[variant], seed, steps))
                for seed in seeds
            ]
            for steps in lengths
        }
        variants[variant] = {"lr": experiment.rates[variant], "runs": runs}
    goals = [finals(variants["AdamW"], full)[seed] for seed in seeds]
    for variant, found in variants.items():
        if variant != "AdamW":
            found["share_of_steps"] = [
                None if needed is None else needed / full
                for seed, goal in enumerate(goals)
                for needed in [steps_to_reach(goal, final_by_steps(found, seed))]
            ]
    return {"tuning": tuning, "variants": variants}


def finals(found: dict[str, Any], steps: int) -> list[float]:
    """The final losses of the seeds."""
    return [run["held_out"][-1][1] for run in found["runs"][str(steps)]]


def final_by_steps(found: dict[str, Any], seed: int) -> dict[int, float]:
    """One seed's final loss by the length of the run."""
    return {int(steps): runs[seed]["held_out"][-1][1] for steps, runs in found["runs"].items()}


def plot(figures: dict[str, Any], full: int, title: str, path: Path) -> None:
    """Loss over steps, loss over the length of the run, loss over the learning rate."""
    with open_plot(path, 3, title) as (curves, lengths, tuning):
        for variant, found in figures["variants"].items():
            colour = COLOURS[variant]
            longest = max(found["runs"], key=int)
            for i, run in enumerate(found["runs"][longest]):
                steps, losses = zip(*run["held_out"], strict=True)
                curves.plot(
                    steps, losses, color=colour, alpha=0.8, label=variant if not i else None
                )
            xs = sorted(map(int, found["runs"]))
            for i in range(len(found["runs"][longest])):
                ys = [final_by_steps(found, i)[x] for x in xs]
                lengths.plot(
                    [x / full for x in xs], ys, "o-", color=colour, label=variant if not i else None
                )
            rates = figures["tuning"][variant]
            tuning.plot(
                list(map(float, rates)), list(rates.values()), "o-", color=colour, label=variant
            )
        goal = statistics.mean(finals(figures["variants"]["AdamW"], full))
        lengths.axhline(goal, color="C0", linewidth=0.8)
        lengths.axvline(0.75, color="grey", linewidth=0.8)
        bottom = min(
            min(finals(f, int(n))) for f in figures["variants"].values() for n in f["runs"]
        )
        curves.set(xlabel="step", ylim=(bottom - 0.1, bottom + 1.5))
        lengths.set(xlabel="length of the run / length of AdamW's")
        tuning.set(xlabel="peak learning rate (Muon: of its matrices)", xscale="log")
        tuning.set_xticks([float(lr) for lr in rates], list(rates))
        tuning.set_xticks([], minor=True)
        for axes in (curves, lengths, tuning):
            axes.set(ylabel="held-out loss, nats per token")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)


@refuse_bad_input
def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "training_optimizers_*.json")
    add_sizes(parser, steps=600)
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument(
        "--lr", type=within(1e-6, 1.0), nargs="+", default=[2e-3, 4e-3, 8e-3, 1.6e-2], help="tried"
    )
    parser.add_argument(
        "--shares", type=within(0.01, 1.0), nargs="+", default=[0.5, 0.75], help="of AdamW's steps"
    )
    parser.add_argument("--weight-decay", type=within(0.0, 10.0), default=0.1)
    options = parser.parse_args(arguments)
    output = result_file(options, "optimizers")
    figures = measure(options)
    for variant, found in figures["variants"].items():
        for steps in map(int, found["runs"]):
            losses = ", ".join(f"{loss:.4f}" for loss in finals(found, steps))
            print(f"{variant}, lr {found['lr']:g}, {steps} steps: {losses}")
        if variant != "AdamW":
            print(f"{variant}: needs {found['share_of_steps']} of AdamW's steps")
    status = write_result(output, __file__, __doc__, options, figures)
    if can_plot():
        title = f"Held-out loss by optimizer: {options.layers} layers, width {options.width}, "
        title += f"{options.steps} steps of {options.batch * options.length:,} tokens"
        plot(figures, options.steps, title, output.with_suffix(".png"))
    return status


if __name__ == "__main__":
    sys.exit(main())
