"""`mqa-gpt infill`: fill a hole in a text."""

from __future__ import annotations

from typing import Annotated

import typer

from mqa_gpt.cli.input import MARKER, split_hole
from mqa_gpt.cli.options import CachedModelOptions, Json, Mode, ReportedOptions, Statistics
from mqa_gpt.cli.output import note, run
from mqa_gpt.fim import check_mode


def infill(
    file: Annotated[str | None, typer.Argument(metavar="FILE", hidden=True)] = None,
    at: Annotated[
        str | None,
        typer.Option(
            metavar="LINE:COLUMN",
            help="Where the hole is in FILE. Both count from 1; columns count characters.",
        ),
    ] = None,
    marker: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help=f"The text in FILE that marks the hole. Default: {MARKER}."
        ),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="The text before the hole, instead of FILE."),
    ] = None,
    suffix: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="The text after the hole, instead of FILE."),
    ] = None,
    filename: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Tell the model the name of the file, as in training."),
    ] = None,
    repository: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Tell it the repository's name, such as owner/name."),
    ] = None,
    mode: Mode = "psm",
    *,
    generation: ReportedOptions,
    model: CachedModelOptions,
    whole: Annotated[
        bool,
        typer.Option(
            "--whole", help="Print the whole text with the hole filled, not only the filling."
        ),
    ] = False,
    stats: Statistics = False,
    as_json: Json = False,
) -> None:
    """Write what is missing between two texts.

    The hole is where a marker stands in FILE (- is standard input), at a line and column of it, or
    between --prefix and --suffix. Control tokens spelled out in these texts are plain text.

    \b
    Examples:
      mqa-gpt infill --prefix 'def add(a, b):' --suffix 'return c'
      mqa-gpt infill app.py                  where app.py holds <FILL>
      mqa-gpt infill app.py --at 12:8 --whole > filled.py
    """
    before, after = split_hole(file, at, marker, prefix, suffix)
    model.check()
    check_mode(mode)
    options = generation.for_library()
    llm, load_seconds = model.load(generation.draft)
    options["draft"] = model.load_drafter(generation.draft, llm)
    started = llm.begin_infill(
        before,
        after,
        generation.max_new_tokens,
        n=generation.n,
        mode=mode,
        truncate=generation.truncate,
        file_name=filename,
        repo_name=repository,
        **options,
    )
    cut_prefix, cut_suffix = started.completions[0].cut
    if cut_prefix or cut_suffix:
        note(
            f"note: cut {cut_prefix:,} tokens at the beginning of the prefix and {cut_suffix:,} at "
            f"the end of the suffix to fit the context of {llm.model.config.n_positions:,} tokens"
        )
    run(
        llm,
        started,
        {"prompt 0": (before, after) if whole else ("", "")},
        n=generation.n,
        model=model.name,
        load_seconds=load_seconds,
        show_stats=stats,
        as_json=as_json,
    )
