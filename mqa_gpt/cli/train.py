"""`mqa-gpt train`: train a model as a file says, plot a run, export its model."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm  # type: ignore[import-untyped]
from typer.core import TyperGroup

from mqa_gpt.cli.options import Json
from mqa_gpt.cli.output import BAD_INPUT, note, print_json, write
from mqa_gpt.errors import ConfigError, InputError

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]


class DefaultCommand(TyperGroup):
    """A group in which `train CONFIG` means `train run CONFIG`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the command line, with "run" put in front where no command is named."""
        if not args or args[0] not in self.commands:
            args = ["run", *args]
        return super().parse_args(ctx, args)


train = typer.Typer(
    cls=DefaultCommand,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@train.callback()
def _train() -> None:
    """Train a model, plot a run, export its model."""


@train.command()
def run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A run's TOML file.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="RUN", help="Folder of the run.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            "-s",
            metavar="KEY=VALUE",
            help="Replace a setting of the file, as in optimizer.lr=1e-3; may be given often.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the run's last checkpoint.")
    ] = False,
    branch_from: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="RUN",
            help="Continue from the last checkpoint of another run, with another length or "
            "schedule; that run stays as it is.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Take a few steps; print parameters, memory, tokens and the time to expect.",
        ),
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="cpu, cuda, cuda:1, ... Default: the GPU if there is one."
        ),
    ] = None,
    tensor_parallel: Annotated[
        int,
        typer.Option(
            metavar="N", help="Ranks that share each layer; the batch is shared by the others."
        ),
    ] = 1,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write TensorBoard's files.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a model as CONFIG says.

    The run's folder gets config.toml, log.jsonl, checkpoints and, at the end, the model in a form
    that transformers loads. Ctrl-C and SIGTERM write a checkpoint first; --resume continues from
    the last one and computes what an uninterrupted run would have. Under torchrun the ranks share
    the work. More commands: train plot, train export.

    \b
    Examples:
      mqa-gpt train configs/overfit.toml --dry-run
      mqa-gpt train configs/overfit.toml --out run --set run.steps=100
      mqa-gpt train configs/overfit.toml --out run --set run.steps=100 --resume
      mqa-gpt train configs/overfit.toml --out longer --set run.steps=200 --from run
    """
    from mqa_gpt.training.config import read_run_config, settings_text
    from mqa_gpt.training.parallel import FirstRankError
    from mqa_gpt.training.plan import plan_run
    from mqa_gpt.training.run import MODEL_FOLDER
    from mqa_gpt.training.run import train as start
    from mqa_gpt.training.signals import RunInterruptedError

    read = read_run_config(config, settings or [])
    if dry_run:
        given = {
            "--resume": resume,
            "--from": branch_from,
            "--tensor-parallel": tensor_parallel > 1,
        }
        for option, is_given in given.items():
            if is_given:
                raise InputError(
                    f"--dry-run takes a few steps of a new run in one process: leave {option} out"
                )
        with _located(config, settings):
            plan = plan_run(read, device=device, say=note)
        if as_json:
            print_json(plan.to_dict())
        else:
            write(f"{plan.to_text()}\n")
        return
    if out is None:
        raise InputError("--out is missing: name a folder for the run")
    is_first = os.environ.get("RANK", "0") == "0"  # under torchrun every rank is here
    if is_first:
        note(settings_text(read))
    try:
        with _located(config, settings):
            state = start(
                read,
                out,
                resume=resume,
                branch_from=branch_from,
                device=device,
                tensor_parallel=tensor_parallel,
                tensorboard=tensorboard,
                say=_say,
            )
    except FirstRankError:  # which that rank says
        raise typer.Exit(BAD_INPUT) from None
    except RunInterruptedError as interruption:
        if is_first:
            note(f"{interruption}; --resume continues")
        raise typer.Exit(128 + interruption.number) from None
    if as_json and is_first:
        found: dict[str, Any] = {
            "steps": state.step,
            "tokens": state.tokens,
            "seconds": state.seconds,
        }
        found |= {"skipped_steps": state.skipped, "held_out_loss": (state.held_out or (0, None))[1]}
        print_json({"run": str(out), "model": str(out / MODEL_FOLDER), **found})


@contextmanager
def _located(config: Path, settings: list[str] | None) -> Iterator[None]:
    """An error about a setting names the file and the line of it, or the option."""
    from mqa_gpt.training.config import located
    from mqa_gpt.training.toml_file import TomlError, read_toml

    try:
        yield
    except TomlError:  # has its place already, maybe in the config of another run
        raise
    except ConfigError as error:
        raise located(error, read_toml(config), settings or []) from None


def _say(text: str) -> None:
    """A line on standard error, above the progress bar."""
    with tqdm.external_write_mode(file=sys.stderr):
        note(text)


@train.command()
def export(
    run: RunFolder,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder to write.")],
    step: Annotated[
        int | None, typer.Option(metavar="N", help="Of which checkpoint. Default: the last.")
    ] = None,
    best: Annotated[
        bool, typer.Option("--best", help="The checkpoint with the least held-out loss.")
    ] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="The weights of the step, even if a run averages them.")
    ] = False,
) -> None:
    """Write a checkpoint of a run as a model that this project and transformers load.

    \b
    Examples:
      mqa-gpt train export run model
      mqa-gpt train export run model --best
      mqa-gpt train export run model --step 400
    """
    from mqa_gpt.training.export import export_checkpoint

    chosen = export_checkpoint(run, model, step=step, best=best, raw=raw)
    write(f"{model}\n")
    note(f"the model of {chosen}")


@train.command()
def plot(
    run: RunFolder,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Default: RUN/plot.png."),
    ] = None,
) -> None:
    """Plot losses, learning rate, gradient norm and speed of a run.

    Needs matplotlib.

    \b
    Examples:
      mqa-gpt train plot run
      mqa-gpt train plot run --output curves.svg
    """
    from mqa_gpt.training.plot import plot_run

    write(f"{plot_run(run, output)}\n")
