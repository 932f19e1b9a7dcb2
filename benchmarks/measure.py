"""What the benchmarks share: options, timing, results that say where they come from, plots."""

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

from mqa_gpt.bench.timing import take_turns
from mqa_gpt.checkpoints.placement import DTYPES, as_device, as_dtype
from mqa_gpt.config import MAX_SIZE, PRESETS, GPTConfig
from mqa_gpt.errors import InputError, shown
from mqa_gpt.machine import available_memory, describe

ROOT = Path(__file__).parents[1]
# The default folder of results. Those in results/ are cited; only --output writes one there.
OUT = ROOT / "benchmarks/out"

Number = TypeVar("Number", int, float)


# ----------------------------------------------------------------------------------------- options


class HelpWithDefaults(argparse.HelpFormatter):
    """Adds each option's default to its help, where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default is None or default is False or default == argparse.SUPPRESS:
            return action.help
        words = map(str, default if isinstance(default, list) else [default])
        return f"{action.help} (default: {' '.join(words)})"


def make_parser(text: str, result: str) -> argparse.ArgumentParser:
    """The parser of a benchmark, with --output.

    Args:
        text: the module's docstring; its first line is the question.
        result: the file's name in `OUT`.
    """
    parser = argparse.ArgumentParser(
        description=text.split("\n")[0], formatter_class=HelpWithDefaults
    )
    help_ = f"the file to write; results/ keeps it (default: benchmarks/out/{result})"
    parser.add_argument("--output", type=Path, metavar="NAME.json", help=help_)
    return parser


def add_shape(parser: argparse.ArgumentParser, default: str = "tiny_starcoder_py") -> None:
    """--shape: the sizes of a model with random weights."""
    help_ = f"one of {', '.join(PRESETS)}"
    parser.add_argument("--shape", choices=PRESETS, default=default, metavar="NAME", help=help_)


def add_model(parser: argparse.ArgumentParser) -> None:
    """The options of a benchmark that runs on a CPU and on a GPU; see `read_device`."""
    add_shape(parser)
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    parser.add_argument("--one-thread", action="store_true", help="for a CPU that others use")
    parser.add_argument("--note", help="kept with the result: what else this machine was doing")


def read_device(options: argparse.Namespace) -> tuple[torch.device, torch.dtype, str]:
    """Device, dtype and, for file names, what the device is called; sets the threads.

    Raises:
        InputError: no such device, or --one-thread on a GPU.
    """
    device = as_device(options.device)
    if options.one_thread:
        if device.type != "cpu":
            raise InputError("--one-thread is for a CPU: add --device cpu")
        torch.set_num_threads(1)
    return device, as_dtype(options.dtype), device_name(device)


def device_name(device: torch.device) -> str:
    """The GPU's name, or "cpu", as a part of a file's name."""
    if device.type == "cpu":
        return "cpu"
    return re.sub(r"\W+", "_", torch.cuda.get_device_name(device))


def within(low: Number, high: Number) -> Callable[[str], Number]:
    """The type of an option that is a number from `low` to `high`, of the same kind as they."""
    kind = type(low)
    what = "a whole number" if kind is int else "a number"

    def number(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:  # NaN is not either
            raise argparse.ArgumentTypeError(
                f"{shown(text)} is not {what} from {low:,} to {high:,}"
            )
        return value

    return number


positive = within(1, MAX_SIZE)
several = within(2, MAX_SIZE)  # the least that has a spread or a difference


def refuse_bad_input(main: Callable[[list[str] | None], int]) -> Callable[..., int]:
    """Make `main` report an unusable option or file in one sentence and return 2."""

    @functools.wraps(main)
    def run(arguments: list[str] | None = None) -> int:
        try:
            return main(arguments)
        except (InputError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return run


def require_context(config: GPTConfig, tokens: int) -> None:
    """Raise InputError if a row of `tokens` is longer than the model's context."""
    if tokens > config.n_positions:
        raise InputError(
            f"a row would have {tokens:,} tokens, and the model's context is "
            f"{config.n_positions:,}: ask for fewer"
        )


def require_memory(needed: float, device: torch.device) -> None:
    """Raise InputError if a device has fewer than `needed` bytes left."""
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
    """Run each action once to warm up, then all of them in turn, `repeats` times.

    Args:
        actions, clock: see `take_turns`.

    Returns:
        name -> {"median", "min", "max", "seconds": all repeats in order}, in seconds.
    """
    take_turns(actions, 1, f"{label}, warming up", clock)
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
    """a / b, but None where noise makes a difference of two times zero or negative."""
    return a / b if a > 0 and b > 0 else None


# ----------------------------------------------------------------------------------------- results


def result_path(output: Path | None, name: str) -> Path:
    """The file to write: --output, or `name` in `OUT`.

    Raises:
        InputError: it cannot be written, which is better known before the work than after it.
    """
    path = output or OUT / name
    if path.suffix != ".json":  # plots go next to it, under the same name
        raise InputError(f"the result is JSON: {path} has to end in .json")
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"the result cannot be written to {path}, which is not a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, keep=True) as part:
            part.touch()
    except OSError as error:
        raise InputError(f"the result cannot be written to {path}: {error.strerror}") from error
    return path


@contextmanager
def replacing(path: Path, keep: bool = False) -> Iterator[Path]:
    """A file to write to, which then replaces the one at `path`; after an error, or with `keep`,
    that stays as it was.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        if not keep:
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def nothing_measured() -> int:
    """Say that there is no result to write; returns the exit status."""
    print("nothing could be measured: no result is written", file=sys.stderr)
    return 1


def write_result(
    path: Path, file: str, text: str, options: argparse.Namespace, figures: Any, **settings: Any
) -> int:
    """Write a benchmark's JSON: the question, the command, where and when it ran, the figures.

    Args:
        file, text: the benchmark's `__file__` and `__doc__`.
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
        "question": text.split("\n")[0],
        "command": command(file, given),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "environment": describe(),
        "settings": given | settings,
        "figures": figures,
    }
    with replacing(path) as part:
        part.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}", file=sys.stderr)
    return 0


def command(file: str, options: Mapping[str, Any]) -> str:
    """The command that repeats a benchmark from the repository's root, with all defaults."""
    module = ".".join(Path(file).relative_to(ROOT).with_suffix("").parts)
    words = ["python", "-m", module]
    for name, value in options.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)


def can_plot() -> bool:
    """Whether matplotlib is installed; says so if not."""
    found = importlib.util.find_spec("matplotlib") is not None
    if not found:
        print("no plot: matplotlib is not installed", file=sys.stderr)
    return found


@contextmanager
def open_plot(path: Path, panels: int, title: str, width: float = 5.5) -> Iterator[Any]:
    """Axes side by side to draw on, `width` inches each, saved as a PNG at the end."""
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
