"""How much of a multi-head model is left when its key/value heads become one?

    OMP_NUM_THREADS=1 nice python -m benchmarks.training.conversion --work RUNS

A small multi-head model of the standard library's sources is trained, converted by each method of
`mqa_gpt.training.conversion`, and trained on for `--uptraining` of its steps (Ainslie et al. 2023)
with the best of the learning rates `--uptraining-lr`, as is the multi-head model itself. A
multi-query model is trained from scratch for as many steps as both together. Then decoding with one
key/value head is timed against one for each query head.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.measure import (
    can_plot,
    interleaved,
    make_parser,
    open_plot,
    refuse_bad_input,
    several,
    within,
    write_result,
)
from benchmarks.mqa_vs_mha import decode_step
from benchmarks.training.small import Curve, add_sizes, load, result_file, run_config, train
from mqa_gpt.model import GPT
from mqa_gpt.training.config import RunConfig
from mqa_gpt.training.conversion import to_mqa
from mqa_gpt.training.data import Data
from mqa_gpt.training.loop import Trainer
from mqa_gpt.training.parallel import World

MHA, SCRATCH = "MHA", "MQA from scratch"
CONVERTED = ("first", "mean", "aligned", "aligned, with text")
FAR = 1_000_000  # a sample number beyond those that any run here reads
TEXT_SEQUENCES, TEXT_BATCH = 256, 32


def config(
    options: argparse.Namespace, multi_query: bool, steps: int, lr: float, warmup: int = 50
) -> RunConfig:
    """A run of one kind of model."""
    return run_config(
        options,
        model={"multi_query": multi_query},
        optimizer={"name": "muon", "lr": lr},
        schedule={"warmup_steps": warmup},
        run={"steps": steps},
    )


def held_out_loss(config: RunConfig, model: GPT, data: Data) -> float:
    """The held-out loss of a model as it is, nats per token."""
    alone = World(0, 1, model.device)
    loss = Trainer(config, model, data.training, data.held_out, alone).evaluate()["loss"]
    assert loss is not None
    return loss


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All losses and times."""
    more = max(1, round(options.uptraining * options.steps))
    of_mha = config(options, False, options.steps, options.lr)
    of_scratch = config(options, True, options.steps + more, options.lr)
    data = load(options, of_mha)
    mha, curve = train("mha", of_mha, data, options)
    scratch, scratch_curve = train("mqa", of_scratch, data, options)
    figures: dict[str, Any] = {
        MHA: figures_of(curve), SCRATCH: figures_of(scratch_curve), "converted": {}
    }  # fmt: skip
    text = text_of(data)
    for name in (MHA, *CONVERTED):
        model = converted_model(mha, name, text)
        at_first = held_out_loss(of_scratch, model, data)
        curves = {}
        for lr in options.uptraining_lr:
            start = GPT(model.config)
            start.load_state_dict(model.state_dict())
            run = f"uptrained-{lr:g}-{name.replace(', ', '-').replace(' ', '-')}"
            of_run = config(options, True, more, lr, warmup=max(1, more // 10))
            curves[f"{lr:g}"] = train(run, of_run, data, options, start)[1]
        best = min(curves, key=lambda lr: curves[lr].final)
        figures["converted"][name] = {
            "at_first": at_first,
            "uptraining_lr": float(best),
            **figures_of(curves[best]),
            "final_by_lr": {lr: found.final for lr, found in curves.items()},
        }
        print(f"{name}: {at_first:.4f}, uptrained {curves[best].final:.4f}, lr {best}", flush=True)
    gap = {n: found["at_first"] - curve.final for n, found in figures["converted"].items()}
    figures["gap_of_mean_pooling"] = {n: gap[n] / gap["mean"] for n in CONVERTED}
    figures["decoding"] = decoding(mha.eval(), scratch.eval(), options)
    return figures


def text_of(data: Data) -> list[Tensor]:
    """Training text that no run here reads, for "aligned, with text": (B, T) ids each."""
    numbers = range(FAR, FAR + TEXT_SEQUENCES)
    return [
        data.training.rows(numbers[i : i + TEXT_BATCH]).ids
        for i in range(0, TEXT_SEQUENCES, TEXT_BATCH)
    ]


def converted_model(mha: GPT, name: str, text: list[Tensor]) -> GPT:
    """The multi-head model as it is, or converted as one of `CONVERTED` says."""
    if name == MHA:
        return mha
    method, _, with_text = name.partition(", ")
    return to_mqa(mha, method, text if with_text else ())  # type: ignore[arg-type]


def figures_of(curve: Curve) -> dict[str, Any]:
    """A curve for the result's JSON."""
    return {
        "final": curve.final,
        "seconds_per_step": curve.seconds_per_step,
        "held_out": curve.held_out,
    }


def decoding(mha: GPT, mqa: GPT, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a decode step with a full context, in turn."""
    rows, context = options.decode_rows, options.length
    actions = {
        name: decode_step(model, rows, context) for name, model in ((MHA, mha), ("MQA", mqa))
    }
    times = interleaved(actions, options.repeats, "decoding")
    return {
        "rows": rows,
        "context": context,
        "milliseconds": {name: 1000 * found["median"] for name, found in times.items()},
    }


def plot(figures: dict[str, Any], title: str, path: Path) -> None:
    """Loss right after conversion and after uptraining; the curves of uptraining."""
    with open_plot(path, 2, title) as (bars, curves):
        names = list(CONVERTED)
        found = [figures["converted"][name] for name in names]
        for key, label, shift in (("at_first", "converted", -0.2), ("final", "and uptrained", 0.2)):
            ys = [entry[key] for entry in found]
            drawn = bars.bar([i + shift for i in range(len(names))], ys, 0.38, label=label)
            bars.bar_label(drawn, fmt="%.2f", fontsize=8)
        bars.axhline(figures[MHA]["final"], color="black", linewidth=1, label=MHA)
        bars.axhline(
            figures[SCRATCH]["final"], color="grey", linewidth=1, linestyle="--", label=SCRATCH
        )
        bars.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names])
        bars.set(ylabel="held-out loss, nats per token", ylim=(figures[MHA]["final"] - 0.2, None))
        for i, name in enumerate((MHA, *CONVERTED)):
            entry = figures["converted"][name]
            steps, losses = zip([0, entry["at_first"]], *entry["held_out"], strict=True)
            colour = "black" if name == MHA else f"C{i}"
            curves.plot(steps, losses, color=colour, label=f"{name}, uptrained")
        curves.axhline(
            figures[SCRATCH]["final"], color="grey", linewidth=1, linestyle="--", label=SCRATCH
        )
        curves.set(xlabel="step of uptraining", ylabel="held-out loss, nats per token")
        for axes in (bars, curves):
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)


@refuse_bad_input
def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "training_conversion_*.json")
    add_sizes(parser, steps=2000)
    parser.add_argument("--lr", type=within(1e-6, 1.0), default=4e-3, help="peak, of Muon")
    parser.add_argument(
        "--uptraining", type=within(0.0, 1.0), default=0.05, help="share of the steps"
    )
    parser.add_argument(
        "--uptraining-lr", type=within(1e-6, 1.0), nargs="+", default=[4e-4, 2e-3], help="tried"
    )
    parser.add_argument("--decode-rows", type=several, default=8)
    parser.add_argument("--repeats", type=several, default=50, help="decode steps timed")
    options = parser.parse_args(arguments)
    output = result_file(options, "conversion")
    figures = measure(options)
    status = write_result(output, __file__, __doc__, options, figures)
    if can_plot():
        title = f"{options.heads} key/value heads made one: {options.layers} layers, width "
        title += f"{options.width}, {options.steps:,} steps, uptrained {options.uptraining:.0%}"
        plot(figures, title, output.with_suffix(".png"))
    return status


if __name__ == "__main__":
    sys.exit(main())
