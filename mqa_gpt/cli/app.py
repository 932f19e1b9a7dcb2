"""The `mqa-gpt` command: each sub-command calls one function of the library and prints its result.

Results go to standard output, everything else to standard error. The exit status is 0, 1 if a check
failed, 2 for bad input, 130 after Ctrl-C, and 141 if the reader closed the pipe.

To add a command: write its function in a file of its own and name it in `COMMANDS`.
"""

from __future__ import annotations

import importlib.metadata
import io
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mqa_gpt.cli import evaluate, research
from mqa_gpt.cli.batch import batch
from mqa_gpt.cli.bench import bench
from mqa_gpt.cli.convert import convert
from mqa_gpt.cli.env import env
from mqa_gpt.cli.explore import explore
from mqa_gpt.cli.generate import generate
from mqa_gpt.cli.infill import infill
from mqa_gpt.cli.inspect import inspect
from mqa_gpt.cli.options import with_groups
from mqa_gpt.cli.output import BAD_INPUT, INTERRUPTED, READER_GONE, note
from mqa_gpt.cli.score import score
from mqa_gpt.cli.train import train
from mqa_gpt.cli.verify import verify
from mqa_gpt.errors import InputError
from mqa_gpt.machine import is_out_of_memory

COMMANDS = (generate, infill, batch, score, explore, verify, inspect, bench, convert, env)


@contextmanager
def _errors_as_messages(group: TyperGroup, context: Any = None) -> Iterator[None]:
    """The one place where errors become messages and exit statuses.

    Args:
        context: which tells the command that runs, if one does.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
        return
    except (InputError, FloatingPointError) as error:
        status = BAD_INPUT
        command = group.commands.get(getattr(context, "invoked_subcommand", None) or "")
        parameters = [] if command is None else command.params
        flags = {str(parameter.name): parameter.opts[0] for parameter in parameters}
        note(f"error: {with_flags(str(error), flags)}")
    except KeyboardInterrupt:
        status = INTERRUPTED
        note("interrupted")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        status = BAD_INPUT
        note(
            "error: out of memory: ask for fewer or shorter completions, or choose a smaller "
            "--dtype or model"
        )
    except OSError as error:
        status = READER_GONE
        if not isinstance(error, BrokenPipeError):
            status = BAD_INPUT
            where = error.filename or "standard output"
            note(f"error: {where}: {error.strerror or error}")  # such as a full disk
        # Python flushes once more at exit, and would fail once more.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise typer.Exit(status)


def with_flags(message: str, flags: dict[str, str]) -> str:
    """A message of the library in terms of the command line: `--top-k` where it says `top_k`.

    Quoted text is left alone, and a name without an underscore counts only where it begins the
    message, as in "temperature is -1": elsewhere it is an English word.
    """
    message = re.sub(r"\b\w+=\S+ \((--[^)]+)\)", r"\1", message)  # "truncate=True (--truncate)"
    name = re.compile(r"(?<![\w/.-])[a-z]+(?:_[a-z]+)+(?![\w/.-])|^[a-z]+(?= is )")
    pieces = re.split(r"('[^']*'|\"[^\"]*\")", message)  # every other one is quoted
    pieces[::2] = [name.sub(lambda word: flags.get(word[0], word[0]), p) for p in pieces[::2]]
    return "".join(pieces)


class Commands(TyperGroup):
    """The group of commands, with errors as messages while options are read and commands run."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Read the command line; this is also where --help and --version print."""
        with _errors_as_messages(self):
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        with _errors_as_messages(self, ctx):
            return super().invoke(ctx)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in COMMANDS:
    app.command()(with_groups(command))
app.add_typer(train, name="train")
app.add_typer(research.app)
app.add_typer(evaluate.app)


def main() -> None:
    """Run the command line."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller has closed it
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        stream = getattr(sys, name)
        # A terminal that cannot show a character gets its escape, not a traceback.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="mqa-gpt")
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while Python exits: no traceback


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            print("mqa-gpt", importlib.metadata.version("mqa-gpt"))
        except importlib.metadata.PackageNotFoundError:
            print("mqa-gpt, run from its source without being installed")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """StarCoder and its family: GPT-2 with multi-query attention, to run and to take apart.

    Everything works on the demo checkpoint that comes with the package; --model names another.

    \b
    Examples:
      mqa-gpt generate 'def read_lines(path):'
      mqa-gpt generate --model bigcode/starcoderbase-1b 'def read_lines(path):'
      mqa-gpt infill app.py --at 12:8
      mqa-gpt inspect --preset starcoderbase-7b
    """
