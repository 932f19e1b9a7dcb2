"""How does the loss of a converted model fall with the share of uptraining?

    OMP_NUM_THREADS=1 nice python -m benchmarks.training.uptraining --work RUNS

Ainslie et al. (2023, "GQA") convert a multi-head model and train it for a share of the steps that
it was made with. Here a small multi-head model of the standard library's sources is trained,
converted by each method of `mqa_gpt.training.conversion`, and trained on for each of the shares
`--share`: each time a run of its own with a whole schedule, and the best of the learning rates
`--uptraining-lr`. The multi-head model itself is trained on too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import (
    can_plot,
    make_parser,
    open_plot,
    refuse_bad_input,
    within,
    write_result,
)
from benchmarks.training.conversion import (
    CONVERTED,
    MHA,
    config,
    converted_model,
    held_out_loss,
    text_of,
)
from benchmarks.training.small import add_sizes, load, result_file, train
from mqa_gpt.model import GPT


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Held-out losses by method, share and learning rate."""
    of_mha = config(options, False, options.steps, options.lr)
    data = load(options, of_mha)
    mha, _ = train("mha", of_mha, data, options)
    text = text_of(data)
    figures: dict[str, Any] = {}
    for name in (MHA, *CONVERTED):
        model = converted_model(mha, name, text)
        shares: dict[str, dict[str, float]] = {}
        for share in sorted(options.share):
            steps = max(1, round(share * options.steps))
            shares[f"{share:g}"] = losses = {}
            for lr in options.uptraining_lr:
                start = GPT(model.config)
                start.load_state_dict(model.state_dict())
                run = f"{name.replace(', ', '-').replace(' ', '-')}_{share:g}_{lr:g}"
                of_run = config(options, True, steps, lr, warmup=max(1, steps // 10))
                _, curve = train(run, of_run, data, options, start, evaluations=1)
                losses[f"{lr:g}"] = curve.final
        figures[name] = {"converted": held_out_loss(of_mha, model, data), "uptrained": shares}
    return figures


def best_losses(found: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Shares, from 0, and the loss with the best learning rate."""
    uptrained = found["uptrained"]
    shares = [0.0, *map(float, uptrained)]
    return shares, [found["converted"], *(min(losses.values()) for losses in uptrained.values())]


def plot(figures: dict[str, Any], title: str, path: Path) -> None:
    """Loss over the share of uptraining, a line for each method."""
    with open_plot(path, 1, title, width=7.0) as axes:
        for i, (name, found) in enumerate(figures.items()):
            shares, losses = best_losses(found)
            style = "ko--" if name == MHA else f"C{i - 1}o-"
            axes.plot([100 * share for share in shares], losses, style, label=name)
        axes.set(
            xlabel="uptraining, % of the steps of training",
            ylabel="held-out loss, nats per token",
        )
        axes.grid(alpha=0.3)
        axes.legend()


@refuse_bad_input
def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "training_uptraining_*.json")
    add_sizes(parser, steps=1000)
    parser.add_argument("--lr", type=within(1e-6, 1.0), default=4e-3, help="peak, of Muon")
    parser.add_argument(
        "--share", type=within(1e-4, 1.0), nargs="+", default=[0.02, 0.05, 0.1], help="of the steps"
    )
    parser.add_argument(
        "--uptraining-lr", type=within(1e-6, 1.0), nargs="+", default=[4e-4, 2e-3], help="tried"
    )
    options = parser.parse_args(arguments)
    output = result_file(options, "uptraining")
    figures = measure(options)
    for name, found in figures.items():
        print(f"{name}: {', '.join(f'{loss:.4f}' for loss in best_losses(found)[1])}")
    status = write_result(output, __file__, __doc__, options, figures)
    if can_plot():
        title = f"{options.heads} key/value heads made one, and trained on\n"
        title += f"{options.layers} layers, width {options.width}, {options.steps:,} steps of "
        title += f"{options.batch * options.length:,} tokens"
        plot(figures, title, output.with_suffix(".png"))
    return status


if __name__ == "__main__":
    sys.exit(main())
