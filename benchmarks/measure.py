"""What the benchmarks share: options, interleaved timing, results that say where they come from,
plots.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

from mqa_gpt.bench.run import take_turns
from mqa_gpt.config import MAX_SIZE, PRESETS, GPTConfig
from mqa_gpt.errors import InputError, shown
from mqa_gpt.machine import available_memory, describe

# Where results go by themselves. Those in results/ are cited, and only --output puts one there.
OUT = Path(__file__).parent / "out"

Number = TypeVar("Number", int, float)


# ----------------------------------------------------------------------------------------- options


class HelpWithDefaults(argparse.HelpFormatter):
    """Adds to an option's text its default, where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default is None or default is False or default == argparse.SUPPRESS:
            return action.help
        words = map(str, default if isinstance(default, list) else [default])
        return f"{action.help} (default: {' '.join(words)})"


def make_parser(text: str, result: str) -> argparse.ArgumentParser:
    """The parser of a benchmark, with --output.

    Args:
        text: the module's; its first line is the question.
        result: the name of the file in `OUT`.
    """
    parser = argparse.ArgumentParser(
        description=text.split("\n")[0], formatter_class=HelpWithDefaults
    )
    help_ = (
        f"the file to write; in benchmarks/results/ it is kept (default: benchmarks/out/{result})"
    )
    parser.add_argument("--output", type=Path, metavar="NAME.json", help=help_)
    return parser


def add_shape(parser: argparse.ArgumentParser, default: str = "tiny_starcoder_py") -> None:
    """--shape, by which random weights are made."""
    help_ = f"one of {', '.join(PRESETS)}"
    parser.add_argument("--shape", choices=PRESETS, default=default, metavar="NAME", help=help_)


def within(low: Number, high: Number) -> Callable[[str], Number]:
    """The type of an option that is a number from `low` to `high`, and of their kind."""
    kind = type(low)
    what = "a whole number" if kind is int else "a number"

    def number(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:  # as NaN is not
            raise argparse.ArgumentTypeError(
                f"{shown(text)} is not {what} from {low:,} to {high:,}"
            )
        return value

    return number


positive = within(1, MAX_SIZE)
several = within(2, MAX_SIZE)  # what a spread, or a difference, takes at least


def refuse_bad_input(main: Callable[[list[str] | None], int]) -> Callable[..., int]:
    """`main`, but an option or a file that cannot be used is one sentence and status 2."""

    @functools.wraps(main)
    def run(arguments: list[str] | None = None) -> int:
        try:
            return main(arguments)
        except (InputError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return run


def require_context(config: GPTConfig, tokens: int) -> None:
    """Raise InputError if a row of so many tokens is longer than the model's context."""
    if tokens > config.n_positions:
        raise InputError(
            f"a row is to have {tokens:,} tokens, and the context of the model is "
            f"{config.n_positions:,}: ask for fewer"
        )


def require_memory(needed: float, device: torch.device) -> None:
    """Raise InputError if a device does not have so many bytes left."""
    room = available_memory(device)
    if room is not None and needed > room:
        raise InputError(
            f"this needs about {needed / 1e9:,.1f} GB, but {room / 1e9:,.1f} GB are available on "
            f"{device}: ask for less"
        )


# ------------------------------------------------------------------------------------- measurement


def interleaved(
    actions: Mapping[str, Callable[[], object]],
    repeats: int,
    label: str,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, Any]]:
    """Run each action once as a warm-up, then all of them in turn, `repeats` times.

    Args:
        actions, clock: what to time, by name, and how (see `take_turns`).

    Returns:
        name -> {"median", "min", "max", "seconds": all repeats in order}, in seconds.
    """
    take_turns(actions, 1, f"{label}, warm-up", clock)
    seconds = take_turns(actions, repeats, label, clock)
    return {
        name: {
            "median": statistics.median(values),
            "min": min(values),
            "max": max(values),
            "seconds": [float(f"{value:.4g}") for value in values],
        }
        for name, values in seconds.items()
    }


def ratio(a: float, b: float) -> float | None:
    """a / b, but None where noise has made a difference of two times zero or less."""
    return a / b if a > 0 and b > 0 else None


# ----------------------------------------------------------------------------------------- results


def result_path(output: Path | None, name: str) -> Path:
    """Where a result is to go: what --output says, or the file of that name in `OUT`.

    Raises:
        InputError: it cannot be written, which is better known before the work than after it.
    """
    path = output or OUT / name
    if path.suffix != ".json":  # plots are beside it, under the same name
        raise InputError(f"the result is JSON: {path} has to end in .json")
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"the result cannot be written to {path}, which is not a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        beside(path).touch()
        beside(path).unlink()
    except OSError as error:
        raise InputError(f"the result cannot be written to {path}: {error.strerror}") from error
    return path


def beside(path: Path) -> Path:
    """Where a file is written before it takes the place of the one at `path`."""
    return path.with_name(f"{path.name}.part")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The path to write to; the file then takes its place as a whole, or not at all."""
    part = beside(path)
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def place(device: torch.device) -> str:
    """What was measured on, as a part of a file's name: the GPU's, or "cpu"."""
    if device.type == "cpu":
        return "cpu"
    return re.sub(r"\W+", "_", torch.cuda.get_device_name(device))


def nothing_measured() -> int:
    """The exit status where nothing came out, and so nothing is written; says so."""
    print("nothing could be measured: no result is written", file=sys.stderr)
    return 1


def write_result(
    path: Path, question: str, options: argparse.Namespace, figures: Any, **settings: Any
) -> int:
    """Write one benchmark's JSON: what was asked, how, where, when, and what came out.

    Args:
        options: the benchmark's own; paths are left out, since they do not change the figures.
        settings: what else was fixed.

    Returns:
        The exit status.
    """
    given = {
        name: value
        for name, value in vars(options).items()
        if value is not None and value is not False and not isinstance(value, Path)
    }
    result = {
        "question": question,
        "command": command(Path(sys.argv[0]).name, given),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "environment": describe(),
        "settings": given | settings,
        "figures": figures,
    }
    with replacing(path) as part:
        part.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}", file=sys.stderr)
    return 0


def can_plot() -> bool:
    """Whether matplotlib is here; says so if not."""
    found = importlib.util.find_spec("matplotlib") is not None
    if not found:
        print("no plot: matplotlib is not installed", file=sys.stderr)
    return found


@contextmanager
def open_plot(path: Path, panels: int, title: str, width: float = 5.5) -> Iterator[Any]:
    """Axes side by side to draw on, `width` inches each, written as a PNG in the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, figsize=(width * panels, 4.5), layout="constrained")
    figure.suptitle(title)
    yield axes
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=110)
    pyplot.close(figure)
    print(f"drawn to {path}", file=sys.stderr)


def command(script: str, options: Mapping[str, Any]) -> str:
    """What repeats a benchmark from the root of the repository, defaults spelled out."""
    words = ["python", f"benchmarks/{script}"]
    for name, value in options.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)
