"""`mqa-gpt score`: how likely a model finds given texts."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any

import typer

from mqa_gpt.cli.input import prompt_texts
from mqa_gpt.cli.options import Json, ModelOptions, NoSpecialTokens, PromptFile, Prompts
from mqa_gpt.cli.output import new_table, note, print_json, print_table, visible, write
from mqa_gpt.errors import PromptError
from mqa_gpt.generation.score import Score, score_texts
from mqa_gpt.llm import LLM
from mqa_gpt.progress import status


def score(
    texts: Prompts = None,
    file: PromptFile = None,
    *,
    context: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="Score each text as what follows this. Default: a new document."
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Read at most N tokens at a time. Default: the model's context."
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Move the window by N tokens where a text is longer. Default: half of it.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Read N windows at a time.")] = 16,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="List every token with its log-probability.")
    ] = False,
    no_special_tokens: NoSpecialTokens = False,
    model: ModelOptions,
    as_json: Json = False,
) -> None:
    """Score texts: log-probability, perplexity and bits per byte.

    Each TEXT (- is standard input) and --file is scored by itself, token by token. One that is
    longer than the context is read in overlapping windows, and each token is scored once.

    \b
    Examples:
      mqa-gpt score --file app.py --file lib.py
      mqa-gpt score --context 'import numpy as' ' np' ' pd' --tokens
      cat app.py | mqa-gpt score --window 512 --stride 256 --json
    """
    named_texts = prompt_texts(texts or [], file or [])
    for name, text in named_texts.items():
        if not text:
            raise PromptError(f"{name} is empty: there is nothing to score")
    model.check()
    llm = _load(model)
    pairs: list[str | tuple[str, str]] = [
        text if context is None else (context, text) for text in named_texts.values()
    ]
    with status() as say:
        scores = score_texts(
            llm.model,
            llm.tokenizer,
            pairs,
            special_tokens=not no_special_tokens,
            window=window,
            stride=stride,
            batch_size=batch_size,
            advance=lambda done, total: say(f"{done:,} of {total:,} windows"),
        )
    named = dict(zip(named_texts, scores, strict=True))
    if as_json:
        print_json({"model": model.name, "texts": [_report(n, s) for n, s in named.items()]})
        return
    if tokens:
        for name, one in named.items():
            _print_tokens(llm, name, one)
    table = new_table(
        "text", ">tokens", ">bytes", ">log-probability", ">perplexity", ">bits per byte", ">greedy"
    )
    for name, one in named.items():
        table.add_row(visible(name), *_cells(one))
    print_table(table)


def _load(model: ModelOptions) -> LLM:
    model.set_threads()
    llm = LLM.load(
        model.name_or_dir,
        revision=model.revision,
        device=model.device,
        dtype=model.dtype,
        backend=model.backend,
        quantize=model.quantize,
    )
    for text in llm.notes:
        note(f"note: {text}")
    return llm


def _report(name: str, one: Score) -> dict[str, Any]:
    figures = {key: getattr(one, key) for key in ("logprob", "loss", "perplexity", "bits_per_byte")}
    return {"name": name} | figures | dataclasses.asdict(one)


def _cells(one: Score) -> tuple[str, ...]:
    share = sum(one.is_greedy) / len(one.is_greedy)
    return (
        f"{len(one.token_ids):,}",
        f"{one.bytes:,}",
        f"{one.logprob:,.2f}",
        f"{one.perplexity:,.3f}",
        f"{one.bits_per_byte:.4f}",
        f"{share:.1%}",
    )


def _print_tokens(llm: LLM, name: str, one: Score) -> None:
    """A row per token: what it is, and how likely it was."""
    write(f"{visible(name)}\n")
    table = new_table("token", ">log-probability", ">probability", "first choice")
    for id_, value, is_greedy in zip(one.token_ids, one.logprobs, one.is_greedy, strict=True):
        text = repr(llm.tokenizer.decode([id_], skip_special_tokens=False))
        cells = ("", "") if value is None else (f"{value:.4f}", f"{math.exp(value):.4f}")
        table.add_row(text, *cells, "yes" if is_greedy else "")
    print_table(table)
    write("\n")
