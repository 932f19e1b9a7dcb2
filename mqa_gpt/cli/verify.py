"""`mqa-gpt verify`: compare a checkpoint with transformers."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from mqa_gpt.cli.input import prompt_texts
from mqa_gpt.cli.options import CachedModelOptions, Json, PromptFile, Prompts
from mqa_gpt.cli.output import CHECK_FAILED, print_json, write
from mqa_gpt.verify.compare import verify as verify_checkpoint
from mqa_gpt.verify.report import format_report


def verify(
    prompts: Prompts = None,
    file: PromptFile = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Compare N greedy tokens per prompt.")
    ] = 64,
    *,
    model: CachedModelOptions,
    as_json: Json = False,
) -> None:
    """Compare a checkpoint with transformers, number by number.

    Logits at every position, then greedy tokens, for each PROMPT (- is standard input) or for a few
    built-in ones. In float32 all tokens must be equal; in 16 bits the error of the logits may be
    twice transformers' own. Exits with 1 if this does not hold. With --quantize or --cache-dtype it
    reports the error of the approximation. Needs transformers, which comes with
    .venv/bin/pip install -c constraints.txt -e '.[bench]' in the checkout.

    \b
    Examples:
      mqa-gpt verify
      mqa-gpt verify --model bigcode/starcoderbase-1b --dtype bfloat16
      mqa-gpt verify --quantize int8 --file held_out.py
    """
    texts = list(prompt_texts(prompts or [], file or []).values()) if prompts or file else None
    model.check()
    model.set_threads()
    report = verify_checkpoint(
        model.name_or_dir,
        revision=model.revision,
        **model.settings,
        cache_dtype=model.cache_dtype,
        prompts=texts,
        max_new_tokens=max_new_tokens,
    )
    report = dataclasses.replace(report, model=model.name)
    if as_json:
        print_json(report.to_dict())
    else:
        write(format_report(report) + "\n")
    if not report.passed:
        raise typer.Exit(CHECK_FAILED)
