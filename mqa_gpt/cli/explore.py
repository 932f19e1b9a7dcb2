"""`mqa-gpt explore`: one page that shows what the model does with a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mqa_gpt.cli.input import prompt_texts, unescape
from mqa_gpt.cli.options import CachedModelOptions, Json, Mode, NoSpecialTokens
from mqa_gpt.cli.output import print_json, size_text, write
from mqa_gpt.errors import InputError, PromptError, shown
from mqa_gpt.explorer import collect, render
from mqa_gpt.fim import check_mode


def explore(
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", show_default=False)] = None,
    file: Annotated[
        str | None,
        typer.Option("--file", "-f", metavar="PATH", help="Read the prompt from a file."),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Instead of a prompt: the text before a hole to fill."),
    ] = None,
    suffix: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The text after the hole.")
    ] = None,
    mode: Mode = "psm",
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Write at most N tokens, at least one.")
    ] = 32,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help=r"End before this text; \n, \t, \r and \\ are escapes."),
    ] = None,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="0 takes the likeliest token; above 0 samples.")
    ] = 0.0,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Make sampling repeatable.")] = None,
    no_special_tokens: NoSpecialTokens = False,
    layer: Annotated[
        int, typer.Option(metavar="N", help="Show the attention of this layer first.")
    ] = 0,
    head: Annotated[int, typer.Option(metavar="N", help="Show that of this head first.")] = 0,
    out: Annotated[Path, typer.Option(metavar="PATH", help="Where the page goes.")] = Path(
        "explore.html"
    ),
    force: Annotated[
        bool, typer.Option("--force", help="Replace the page if there is one already.")
    ] = False,
    *,
    model: CachedModelOptions,
    as_json: Json = False,
) -> None:
    """Write a page that shows what the model does with a text.

    Its tokens with their probabilities and alternatives, the attention of every head, the logit
    lens, the KV cache and the times, in one HTML file that opens in any browser, without a network.
    A PROMPT of - is standard input. With --prefix and --suffix the model fills a hole.

    \b
    Examples:
      mqa-gpt explore 'def is_file(path):'
      mqa-gpt explore --file start.py --max-new-tokens 64 --out start.html
      mqa-gpt explore --prefix 'def add(a, b):\\n    ' --suffix ' + b' --layer 2 --head 1
    """
    infill = None if prefix is None and suffix is None else (prefix or "", suffix or "")
    if sum(x is not None for x in (prompt, file, infill)) > 1:
        raise PromptError("give one of these: a PROMPT, --file, or --prefix and --suffix")
    text = None
    if infill is None:
        arguments, paths = ([] if x is None else [x] for x in (prompt, file))
        (text,) = prompt_texts(arguments, paths).values()
    check_mode(mode)
    model.check()
    if not as_json:
        _require_new(out, force)
    stops = [unescape(one) for one in stop or []]
    llm, _ = model.load()
    data = collect(
        llm,
        text,
        infill=infill,
        mode=mode,
        max_new_tokens=max_new_tokens,
        special_tokens=not no_special_tokens,
        layer=layer,
        head=head,
        name=model.name,
        stop=stops,
        temperature=temperature,
        seed=seed,
    )
    if as_json:
        print_json(data)
        return
    page = render(data)
    _save(page, out)
    write(f"{out}: {len(data['ids'])} tokens, {size_text(len(page))}; open it in a browser\n")


def _require_new(out: Path, force: bool) -> None:
    """InputError, before the work, if a page must not or cannot be written there."""
    if out.is_dir():
        raise InputError(f"{shown(str(out))} is a folder: choose another --out")
    if out.exists() and not force:
        raise InputError(f"{shown(str(out))} exists already: pass --force, or choose another --out")
    if not out.parent.is_dir():
        raise InputError(f"there is no folder {shown(str(out.parent))}: make it first")


def _save(page: str, out: Path) -> None:
    """Write the page, whole or not at all."""
    half = out.with_name(out.name + ".part")
    try:
        half.write_text(page, encoding="utf-8", newline="\n")
        half.replace(out)
    except OSError as error:
        half.unlink(missing_ok=True)
        raise InputError(f"cannot write {shown(str(out))}: {error.strerror}") from error
