"""`mqa-gpt generate`: continue prompts."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from mqa_gpt.cli.input import prompt_texts
from mqa_gpt.cli.options import (
    CachedModelOptions,
    GenerationOptions,
    Json,
    NoSpecialTokens,
    PromptFile,
    Prompts,
    ReportedOptions,
    Statistics,
)
from mqa_gpt.cli.output import note, run
from mqa_gpt.cli.ranks import rank_count, sharing_layers
from mqa_gpt.errors import InputError
from mqa_gpt.llm import LLM
from mqa_gpt.model import GPT


def generate(
    prompts: Prompts = None,
    file: PromptFile = None,
    *,
    generation: ReportedOptions,
    no_special_tokens: NoSpecialTokens = False,
    model: CachedModelOptions,
    echo: Annotated[
        bool | None,
        typer.Option(
            "--echo/--no-echo",
            help="Print the prompt before its completion. Default: only on a terminal.",
            show_default=False,
        ),
    ] = None,
    stats: Statistics = False,
    as_json: Json = False,
) -> None:
    """Continue prompts.

    A PROMPT of - is read from standard input, which is also where a prompt comes from if none is
    given in a pipe. A single completion is printed as it is written, several at the end, each under
    a heading. In a pipe, standard output holds the completion and nothing else. Under torchrun the
    ranks share each layer of a multi-query model.

    \b
    Examples:
      mqa-gpt generate 'def read_lines(path):'
      mqa-gpt generate --file start.py --stop '\\n\\n' --stats
      head -50 app.py | mqa-gpt generate --echo > new.py
      mqa-gpt generate 'class Stack:' --temperature 0.8 --top-p 0.95 --n 4 --json
      torchrun --nproc-per-node 2 -m mqa_gpt generate 'def area(' --dtype float32
    """
    with sharing_layers(model.device) as (device, divide):
        if rank_count() > 1:
            _require_the_same(prompts or [], file or [], generation)
        _generate(
            prompt_texts(prompts or [], file or []),
            generation,
            dataclasses.replace(model, device=device),
            divide,
            special_tokens=not no_special_tokens,
            echo=sys.stdout.isatty() if echo is None else echo,
            show_stats=stats,
            as_json=as_json,
        )


def _require_the_same(prompts: list[str], files: list[str], options: GenerationOptions) -> None:
    """Raise InputError if ranks would read or draw different things."""
    if "-" in prompts + files or not prompts + files:
        raise InputError(
            "several ranks cannot share standard input: give prompts as arguments or with --file"
        )
    if options.temperature > 0 and options.seed is None:
        raise InputError("several ranks draw the same tokens only with --seed: add it")


def _generate(
    named_texts: dict[str, str],
    generation: ReportedOptions,
    model: CachedModelOptions,
    divide: Callable[[GPT], None],
    *,
    special_tokens: bool,
    echo: bool,
    show_stats: bool,
    as_json: bool,
) -> None:
    """Load the model, and print completions of the prompts.

    Args:
        divide: what is done with the loaded model (see `sharing_layers`).
    """
    model.check()
    options = generation.for_library()
    llm, load_seconds = model.load(generation.draft)
    divide(llm.model)
    if special_tokens:
        for name, text in named_texts.items():
            if unknown := llm.tokenizer.unknown_markers(text):
                note(f"note: {', '.join(unknown)} in {name} is plain text to this model")
    options["draft"] = model.load_drafter(generation.draft, llm)
    started = llm.begin(
        list(named_texts.values()),
        generation.max_new_tokens,
        n=generation.n,
        names=list(named_texts),
        special_tokens=special_tokens,
        truncate=generation.truncate,
        **options,
    )
    if generation.truncate:
        prompt_tokens = [c.prompt_tokens for c in started.completions[:: generation.n]]
        for (name, text), kept in zip(named_texts.items(), prompt_tokens, strict=True):
            _note_cut(llm, name, text, kept, generation.max_new_tokens, special_tokens)
    run(
        llm,
        started,
        {name: (text if echo else "", "") for name, text in named_texts.items()},
        n=generation.n,
        model=model.name,
        load_seconds=load_seconds,
        show_stats=show_stats,
        as_json=as_json,
    )


def _note_cut(
    llm: LLM, name: str, text: str, kept: int, max_new_tokens: int | None, special_tokens: bool
) -> None:
    """Say how much of a prompt was cut, if anything, to keep its last `kept` tokens."""
    context = llm.model.config.n_positions
    if kept < context - (1 if max_new_tokens is None else max_new_tokens):
        return  # there was room for more
    if len(text) > context * llm.tokenizer.max_token_bytes:  # seconds to tokenize as a whole
        note(f"note: cut {name} to its last {kept:,} tokens to fit the context")
    elif cut := len(llm.tokenizer.encode(text, special_tokens=special_tokens)) - kept:
        note(f"note: cut the first {cut:,} tokens of {name} to fit the context")
