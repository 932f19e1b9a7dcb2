"""`mqa-gpt batch`: prompts from one file of JSON Lines, their completions into another.

A result is written as soon as it and all before it are finished, so the output is in the order of
the input. Writing each at once would save little: a row lasts at most `max_new_tokens` steps.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import torch
import typer

from mqa_gpt.checkpoints.headers import read_config
from mqa_gpt.checkpoints.hub import resolve
from mqa_gpt.checkpoints.placement import as_dtype
from mqa_gpt.cli.jsonl import (
    Item,
    Results,
    open_output,
    read_items,
    read_results,
    require_same,
    result_line,
)
from mqa_gpt.cli.options import (
    CachedModelOptions,
    GenerationOptions,
    Json,
    Mode,
    NoSpecialTokens,
)
from mqa_gpt.cli.output import BAD_INPUT, note, print_json, rate_text
from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import InputError, PromptError, shown
from mqa_gpt.fim import check_mode, infill_prompt
from mqa_gpt.generation.completion import Generation, Stats
from mqa_gpt.generation.prompts import request_options
from mqa_gpt.llm import BATCH_SIZE
from mqa_gpt.machine import peak_memory
from mqa_gpt.progress import progress
from mqa_gpt.tokenizer import Tokenizer

MAX_NOTES = 10


def batch(
    file: Annotated[str, typer.Argument(metavar="INPUT", hidden=True)],
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", metavar="PATH", help="The file of results; extended if it exists."
        ),
    ],
    batch_size: Annotated[
        int, typer.Option(metavar="N", help="Complete N at a time; more take more memory.")
    ] = BATCH_SIZE,
    force: Annotated[
        bool,
        typer.Option("--force", help="Extend an output that was written with other options."),
    ] = False,
    mode: Mode = "psm",
    no_special_tokens: NoSpecialTokens = False,
    *,
    generation: GenerationOptions,
    model: CachedModelOptions,
    as_json: Json = False,
) -> None:
    """Complete every prompt of a file.

    INPUT (- is standard input) holds a JSON object per line: an "id" or "task_id", which is a text
    or a whole number, and a "prompt", or a "prefix" (also called "prompt") and a "suffix" to infill
    between. It may hold options for this line alone: "max_new_tokens", "min_new_tokens",
    "ignore_eos", "stop", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed".
    Other keys have no effect.

    Each line becomes a line of the output, in the same order: its "id", "prompt_hash",
    "prompt_tokens", "options" and "completions", each with "text", "finish_reason" and
    "new_tokens". A prompt that is too long is left out and reported at the end, with exit status 2;
    with --truncate the next run completes it.

    To continue an interrupted run, repeat the command: ids that the output holds are skipped, a
    half-written line is replaced, and new results are added at the end. Results of other prompts
    are refused, and so are other options unless --force is given.

    A completion is the one that `generate` gives for its prompt alone: exactly on a CPU with numba.
    Elsewhere rows that are computed together may round differently, and where two tokens are almost
    equally likely, the other one may be chosen; so a continued run may differ from an uninterrupted
    one there.

    \b
    Example:
      mqa-gpt batch prompts.jsonl --output results.jsonl --max-new-tokens 128
    """
    items, keys = read_items(file)
    model.check()
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: it must be an integer of at least 1")
    options = generation.for_library()
    common = {"max_new_tokens": generation.max_new_tokens, **options}
    config = read_config(resolve(model.name_or_dir, model.revision))
    _check_options(config, common, generation.n, mode, items)
    shared = _recorded(model, common, generation.n)
    with open_output(output, file) as opened:
        results = read_results(opened, output, items)
        for item in items:
            own = {"mode": mode} if item.is_infilling else {"special_tokens": not no_special_tokens}
            item.options = shared | own | item.own_options
        require_same(results, items, force=force)
        if keys:
            more = ", ..." if len(keys) > MAX_NOTES else ""
            note(f"note: keys without effect: {', '.join(map(shown, keys[:MAX_NOTES]))}{more}")
        waiting = [item for item in items if item.id not in results.found]
        left_out: dict[str, str] = {}
        if waiting:
            tokenizer = Tokenizer.from_pretrained(model.name_or_dir, revision=model.revision)
            for item in waiting:
                problem = _problem(item, tokenizer, config, not no_special_tokens, mode)
                if problem and not generation.truncate:
                    left_out[item.name] = problem
                item.truncated = problem is not None
            waiting = [item for item in waiting if item.name not in left_out]
        run: Generation | None = None
        device: torch.device | str = "cpu"
        load_seconds = 0.0
        if waiting:
            llm, load_seconds = model.load()
            device = llm.model.device
            run = llm.begin(
                [item.prompt for item in waiting],
                generation.max_new_tokens,
                n=generation.n,
                batch_size=batch_size,
                special_tokens=not no_special_tokens,
                mode=mode,
                truncate=generation.truncate,
                names=[item.name for item in waiting],
                per_prompt=[item.own_options for item in waiting],
                **options,
            )
        _write_results(run, waiting, results, model.name, device, load_seconds, left_out, as_json)
    if left_out:
        raise typer.Exit(BAD_INPUT)


def _check_options(
    config: GPTConfig, common: dict[str, Any], n: int, mode: str, items: list[Item]
) -> None:
    """Raise an InputError for options that cannot be used, of the command or of a line."""
    check_mode(mode)
    request_options(config, None, common, n=n)
    for item in items:
        if item.own_options:
            try:
                request_options(config, None, common | item.own_options, n=n)
            except PromptError as error:
                raise PromptError(f"{item.name}: {error}") from error


def _recorded(model: CachedModelOptions, common: dict[str, Any], n: int) -> dict[str, Any]:
    """The options that decide what is written, for the output's lines: those that are set."""
    dtype = None if model.dtype is None else str(as_dtype(model.dtype)).removeprefix("torch.")
    found = {"model": model.name, "revision": model.revision, "dtype": dtype}
    found |= {"quantize": model.quantize, "cache_dtype": model.cache_dtype, "n": n} | common
    always = ("max_new_tokens", "temperature", "n")
    defaults = GenerationOptions().for_library()
    return {
        name: value
        for name, value in found.items()
        if name in always or value != defaults.get(name)
    }


def _problem(
    item: Item, tokenizer: Tokenizer, config: GPTConfig, special_tokens: bool, mode: str
) -> str | None:
    """Why a prompt does not fit into the context, or None if it does."""
    wanted = item.options["max_new_tokens"]
    room = config.n_positions - (1 if wanted is None else wanted)
    text = "".join(item.prompt)
    # A token is at least one byte, and an infilling has three of its own.
    if len(text.encode(errors="surrogatepass")) + 3 <= room:
        return None
    least = tokenizer.min_tokens(text)
    if least > room:
        tokens = f"at least {least:,}"
    else:
        if isinstance(item.prompt, tuple):
            ids = infill_prompt(tokenizer, *item.prompt, mode=mode)
        else:
            ids = tokenizer.encode(item.prompt, special_tokens=special_tokens)
        if len(ids) <= room:
            return None
        tokens = f"{len(ids):,}"
    new = "new ones" if wanted is None else f"{wanted:,} new ones"
    return f"{tokens} tokens leave no room for {new} in the context of {config.n_positions:,}"


def _write_results(
    generation: Generation | None,
    items: list[Item],
    results: Results,
    model: str,
    device: torch.device | str,
    load_seconds: float,
    left_out: dict[str, str],
    as_json: bool,
) -> None:
    """Run a generation, add each item's result to the output, and sum up.

    Args:
        generation: None if there is nothing to do.
        items: its prompts.
        results: what the output holds already.
        device: whose memory counts.
        left_out: why prompts cannot be used, by their names.
    """
    stats = Stats(rows=0, prompt_tokens=0) if generation is None else generation.stats
    file, written, interrupted = results.file, 0, False
    try:
        results.mend()
        if generation is not None:
            with progress(stats.rows, "completion") as show:

                def write_finished() -> None:
                    nonlocal written
                    for completions in generation.take():
                        file.write(result_line(items[written], completions))
                        file.flush()
                        written += 1

                for _ in generation:
                    write_finished()
                    show(stats.finished_rows, rate_text(stats))
                write_finished()
                show(stats.finished_rows, rate_text(stats))
    except KeyboardInterrupt:
        interrupted = True
    except OSError as error:
        raise InputError(f"cannot write {results.path}: {error.strerror}") from error

    before = len(results.found)
    total = before + len(items) + len(left_out)
    if as_json:
        counts = {"prompts": total, "found": before, "written": written, "left_out": left_out}
        numbers = {"load_seconds": load_seconds} | dataclasses.asdict(stats)
        numbers |= {"tokens_per_second": stats.rate, "peak_memory_bytes": peak_memory(device)}
        report = {"model": model, "output": results.path} | counts
        print_json(report | {"interrupted": interrupted, "stats": numbers})
    else:
        speed = f"; {stats.new_tokens:,} tokens at {rate_text(stats)}" if stats.rate else ""
        note(
            f"{before + written:,} of {total:,} results in {results.path}: {before:,} were there, "
            f"{written:,} are new{speed}"
        )
    for name, problem in list(left_out.items())[:MAX_NOTES]:
        note(f"left out: {name}: {problem}")
    if left_out:
        more = f"{len(left_out):,} in all; " if len(left_out) > MAX_NOTES else ""
        note(f"{more}--truncate cuts prompts that are too long")
    if interrupted:
        note("repeat the command to continue")
        raise KeyboardInterrupt
