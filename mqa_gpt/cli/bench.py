"""`mqa-gpt bench`: measure how fast a model runs."""

from __future__ import annotations

from typing import Annotated

import typer

from mqa_gpt.bench.run import benchmark
from mqa_gpt.cli.input import numbers
from mqa_gpt.cli.options import ModelOptions, Preset
from mqa_gpt.cli.output import print_json, write
from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import InputError


def bench(
    *,
    preset: Preset = None,
    model: ModelOptions,
    n_prompt: Annotated[
        str, typer.Option("--n-prompt", "-p", metavar="N,...", help="Tokens per prompt.")
    ] = "512",
    n_gen: Annotated[
        str, typer.Option("--n-gen", "-g", metavar="N,...", help="New tokens.")
    ] = "128",
    batch: Annotated[
        str, typer.Option("--batch", "-b", metavar="N,...", help="Prompts at once.")
    ] = "1",
    repeats: Annotated[
        int, typer.Option("--repeats", "-r", metavar="N", help="Rounds, after one to warm up.")
    ] = 5,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Other programs to time in the same rounds: transformers, ctranslate2.",
        ),
    ] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="md|csv|json", help="How to print the results.")
    ] = "md",
    as_json: Annotated[bool, typer.Option("--json", help="The same as --output json.")] = False,
) -> None:
    """Measure how fast a model runs here.

    Prefill (pp), decode (tg) and both together: tokens per second as mean ± standard deviation and
    as median over rounds in which everything takes turns. For decode also GB/s and its share of
    this machine's memory bandwidth (MBU), for prefill TFLOP/s and its share of the rate of matrix
    products (MFU). "tg127 @ d512" decodes after a prompt of 512 tokens. A preset gets random
    weights, float32 on a CPU and bfloat16 on a GPU unless --dtype is given.

    \b
    Examples:
      mqa-gpt bench -p 128 -g 32
      mqa-gpt bench --preset tiny_starcoder_py --batch 1,8 --compare transformers
      mqa-gpt bench --preset starcoderbase-7b --dtype bfloat16 --output json > 7b.json
    """
    output = "json" if as_json else output
    if output not in ("md", "csv", "json"):
        raise InputError(f"output is {output!r}: expected one of md, csv, json")
    lengths = [
        numbers(text, option)
        for text, option in ((n_prompt, "--n-prompt"), (n_gen, "--n-gen"), (batch, "--batch"))
    ]
    model.check()
    model.set_threads(None if preset is None else GPTConfig.preset(preset))
    report = benchmark(
        shape=preset,
        model=model.model,
        revision=model.revision,
        **model.settings,
        prompt_lengths=lengths[0],
        new_lengths=lengths[1],
        batches=lengths[2],
        repeats=repeats,
        compare=compare.split(",") if compare else [],
    )
    if output == "json":
        print_json(report.to_dict())
    else:
        write(report.to_csv() if output == "csv" else report.to_markdown())
