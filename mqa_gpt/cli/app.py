"""The `mqa-gpt` command: each sub-command calls one function of the library and prints its result.

Results go to standard output, everything else to standard error. The exit status is 0, 1 if a check
failed, 2 for bad input, 130 after Ctrl-C, and 141 if whoever read the output went away.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mqa_gpt.bench.run import benchmark
from mqa_gpt.checkpoints import inspect as inspection
from mqa_gpt.checkpoints.hub import resolve
from mqa_gpt.checkpoints.load import DEMO_DIR
from mqa_gpt.cli.batch import open_output, read_items, read_results, require_same, run_batch
from mqa_gpt.cli.input import MARKER, numbers, prompt_texts, split_hole, unescape
from mqa_gpt.cli.options import (
    Backend,
    CacheDtype,
    Device,
    Drafts,
    Dtype,
    Json,
    Logprobs,
    MaxNewTokens,
    MinP,
    Mode,
    Model,
    NoSpecialTokens,
    PromptFile,
    Quantize,
    RepetitionPenalty,
    Revision,
    Samples,
    Seed,
    Statistics,
    Stop,
    Temperature,
    TopK,
    TopP,
)
from mqa_gpt.cli.output import (
    note,
    print_environment,
    print_hashes,
    print_inspection,
    print_json,
    print_non_finite,
    run,
    write,
)
from mqa_gpt.errors import InputError
from mqa_gpt.generation.completion import encode_prompts
from mqa_gpt.generation.speculative import Drafter, DraftModel, PromptLookup
from mqa_gpt.llm import BATCH_SIZE, LLM
from mqa_gpt.machine import describe, is_out_of_memory
from mqa_gpt.tokenizer import Tokenizer
from mqa_gpt.verify.compare import verify as verify_checkpoint
from mqa_gpt.verify.report import format_report

CHECK_FAILED, BAD_INPUT, INTERRUPTED, READER_GONE = 1, 2, 130, 141


@contextmanager
def _errors_as_messages() -> Iterator[None]:
    """The one place where errors become messages and exit statuses."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
        return
    except (InputError, FloatingPointError) as error:
        status = BAD_INPUT
        note(f"error: {error}")
    except KeyboardInterrupt:
        status = INTERRUPTED
        note("interrupted")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        status = BAD_INPUT
        note(
            "error: the memory is full: ask for fewer or shorter completions, or take a "
            "smaller --dtype or model"
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


class Commands(TyperGroup):
    """The group of commands, with errors as messages while options are read and commands run."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Read the command line; this is also where --help and --version print."""
        with _errors_as_messages():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        with _errors_as_messages():
            return super().invoke(ctx)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while Python winds up: no traceback


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
      mqa-gpt inspect --shape starcoderbase-7b
    """


# --------------------------------------------------------------------------------------- commands


@app.command()
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", hidden=True)] = None,
    file: PromptFile = None,
    max_new_tokens: MaxNewTokens = 64,
    stop: Stop = None,
    no_special_tokens: NoSpecialTokens = False,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    n: Samples = 1,
    model: Model = None,
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = None,
    backend: Backend = "auto",
    quantize: Quantize = None,
    cache_dtype: CacheDtype = None,
    draft: Drafts = None,
    echo: Annotated[
        bool | None,
        typer.Option(
            "--echo/--no-echo",
            help="Print the prompt before its completion. Default: only on a terminal.",
            show_default=False,
        ),
    ] = None,
    logprobs: Logprobs = None,
    stats: Statistics = False,
    as_json: Json = False,
) -> None:
    """Continue prompts.

    A PROMPT of - is read from standard input, and so is one that is not given in a pipe. A single
    completion is printed while it is written, several at the end, each under a heading. In a pipe,
    standard output holds the completion and nothing else.

    \b
    Examples:
      mqa-gpt generate 'def read_lines(path):'
      mqa-gpt generate --file start.py --stop '\\n\\n' --stats
      head -50 app.py | mqa-gpt generate --echo > new.py
      mqa-gpt generate 'class Stack:' --temperature 0.8 --top-p 0.95 --n 4 --json
    """
    texts = prompt_texts(prompts or [], file or [])
    llm, load_seconds = _load(model, revision, device, dtype, backend, quantize, cache_dtype)
    generation = llm.begin(
        texts,
        max_new_tokens,
        special_tokens=not no_special_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        n=n,
        stop=[unescape(text) for text in stop or []],
        logprobs=logprobs,
        draft=_draft(draft, device, dtype, backend),
    )
    if echo is None:
        echo = sys.stdout.isatty()
    around = [(text if echo else "", "") for text in texts for _ in range(n)]
    run(llm, generation, around, model, load_seconds, n, stats, as_json)


@app.command()
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
            metavar="TEXT",
            help=f"What stands in FILE where the hole is; {MARKER} if not given.",
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
    mode: Mode = "psm",
    truncate: Annotated[
        bool,
        typer.Option(
            "--truncate",
            help="If the text is too long, leave out what is farthest from the hole.",
        ),
    ] = False,
    max_new_tokens: MaxNewTokens = 64,
    stop: Stop = None,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    n: Samples = 1,
    model: Model = None,
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = None,
    backend: Backend = "auto",
    quantize: Quantize = None,
    cache_dtype: CacheDtype = None,
    draft: Drafts = None,
    whole: Annotated[
        bool,
        typer.Option(
            "--whole", help="Print the whole text with the hole filled, not only the filling."
        ),
    ] = False,
    logprobs: Logprobs = None,
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
    llm, load_seconds = _load(model, revision, device, dtype, backend, quantize, cache_dtype)
    generation = llm.begin_infill(
        before,
        after,
        max_new_tokens,
        mode=mode,
        truncate=truncate,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        n=n,
        stop=[unescape(text) for text in stop or []],
        logprobs=logprobs,
        draft=_draft(draft, device, dtype, backend),
    )
    cut_prefix, cut_suffix = generation.completions[0].cut
    if cut_prefix or cut_suffix:
        note(
            f"left out to fit the context of {llm.model.config.n_positions:,} tokens: the first "
            f"{cut_prefix:,} tokens of the prefix, the last {cut_suffix:,} of the suffix"
        )
    around = [(before, after) if whole else ("", "")] * n
    run(llm, generation, around, model, load_seconds, n, stats, as_json)


@app.command()
def batch(
    file: Annotated[str, typer.Argument(metavar="INPUT", hidden=True)],
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", metavar="PATH", help="Where the results go; added to if it exists."
        ),
    ],
    batch_size: Annotated[
        int, typer.Option(metavar="N", help="Complete N at a time; more take more memory.")
    ] = BATCH_SIZE,
    max_new_tokens: MaxNewTokens = 64,
    stop: Stop = None,
    mode: Mode = "psm",
    no_special_tokens: NoSpecialTokens = False,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    n: Samples = 1,
    model: Model = None,
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = None,
    backend: Backend = "auto",
    quantize: Quantize = None,
    cache_dtype: CacheDtype = None,
    as_json: Json = False,
) -> None:
    """Complete every prompt of a file.

    INPUT (- is standard input) holds a JSON object per line: an "id", which is a text or a whole
    number, and a "prompt", or a "prefix" and a "suffix" to infill between. Other keys are ignored,
    but no object, nor one within it, may hold a key twice. Each becomes a line of
    the output, in the same order: its "id", its "prompt_hash", its "prompt_tokens" and its
    "completions", each with "text", "finish_reason" and "new_tokens".

    A command that was interrupted goes on where it was when it is given again: ids that the output
    holds are skipped, and a line that was only half written is replaced. New results are added at
    the end, in the input's order; so the whole is in that order if prompts were added at the
    input's end only. Results of other prompts, told by their hashes (by the number of tokens where
    an earlier version wrote none), or of another --n are refused; the other options must be the
    same, which nothing checks.

    \b
    Example:
      mqa-gpt batch prompts.jsonl --output results.jsonl --max-new-tokens 128
    """
    items = read_items(file)
    with open_output(output, file) as opened:
        results = read_results(opened, output, items)
        done = [item for item in items if item.id in results.found]
        if done:
            # The tokenizer alone, so that a model is loaded only if something is left to do.
            tokenizer = Tokenizer.from_pretrained(
                resolve(DEMO_DIR if model is None else model, revision)
            )
            ids = encode_prompts(
                tokenizer,
                [item.prompt for item in done],
                [item.name for item in done],
                special_tokens=not no_special_tokens,
                mode=mode,
            )
            # An empty prompt is begun with one token.
            require_same(results, done, [max(1, len(prompt)) for prompt in ids], n)
        waiting = [item for item in items if item.id not in results.found]
        if not waiting:
            run_batch(None, [], results, model, "cpu", 0.0, as_json)
            return
        llm, load_seconds = _load(model, revision, device, dtype, backend, quantize, cache_dtype)
        generation = llm.begin_many(
            [item.prompt for item in waiting],
            max_new_tokens,
            names=[item.name for item in waiting],
            batch_size=batch_size,
            special_tokens=not no_special_tokens,
            mode=mode,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            n=n,
            stop=[unescape(text) for text in stop or []],
        )
        run_batch(generation, waiting, results, model, llm.model.device, load_seconds, as_json)


@app.command()
def verify(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", hidden=True)] = None,
    file: PromptFile = None,
    max_new_tokens: MaxNewTokens = 64,
    model: Model = None,
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = None,
    backend: Backend = "auto",
    quantize: Quantize = None,
    cache_dtype: CacheDtype = None,
    as_json: Json = False,
) -> None:
    """Compare a checkpoint with transformers, number by number.

    Logits at every position, then greedy tokens, for each PROMPT (- is standard input) or for a few
    built-in ones. In float32 all tokens must be equal; in 16 bit the logits' error may be twice
    transformers' own. Exits with 1 if they are not, or it is larger. With --quantize or
    --cache-dtype it reports how far the approximation is off. Needs transformers, which comes with
    .venv/bin/pip install -c constraints.txt -e '.[bench]' in the checkout.

    \b
    Examples:
      mqa-gpt verify
      mqa-gpt verify --model bigcode/starcoderbase-1b --dtype bfloat16
      mqa-gpt verify --quantize int8 --file held_out.py
    """
    report = verify_checkpoint(
        DEMO_DIR if model is None else model,
        revision=revision,
        device=device,
        dtype=dtype,
        backend=backend,
        quantize=quantize,
        cache_dtype=cache_dtype,
        prompts=prompt_texts(prompts or [], file or []) if prompts or file else None,
        max_new_tokens=max_new_tokens,
    )
    if model is None:
        report = dataclasses.replace(report, model="demo")
    if as_json:
        print_json(report.to_dict())
    else:
        write(format_report(report) + "\n")
    if not report.passed:
        raise typer.Exit(CHECK_FAILED)


@app.command()
def inspect(
    model: Model = None,
    revision: Revision = None,
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Instead: a published shape, such as starcoderbase-7b; nothing is downloaded.",
        ),
    ] = None,
    check_finite: Annotated[
        bool,
        typer.Option("--check-finite", help="Read every weight and look for NaN and infinity."),
    ] = False,
    hash_files: Annotated[
        bool,
        typer.Option(
            "--hash", help="Compute each weight file's SHA-256 and compare it with the hub's."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show a checkpoint's sizes, check its files.

    Parameters, bytes, KV cache per token as MQA and as MHA, and tensors. Only headers are read,
    unless a check asks for more. Exits with 1 if a check fails.

    \b
    Examples:
      mqa-gpt inspect
      mqa-gpt inspect --shape starcoderbase-7b
      mqa-gpt inspect --model bigcode/starcoderbase-1b --check-finite --hash
    """
    if shape is not None:
        if model is not None or revision is not None or check_finite or hash_files:
            raise InputError(
                "--shape describes a model without files: leave out --model, --revision, "
                "--check-finite and --hash"
            )
        found = inspection.inspect_shape(shape)
    else:
        found = inspection.inspect_checkpoint(model, revision=revision)
    report = found.to_dict()
    failed = False
    if not as_json:
        print_inspection(found)
    if check_finite:
        bad = inspection.check_finite(found)
        failed |= bool(bad)
        report["non_finite"] = [tensor._asdict() for tensor in bad]
        if not as_json:
            print_non_finite(bad, len(found.tensors))
    if hash_files:
        hashes = inspection.hash_files(found)
        failed |= any(file.differs for file in hashes)
        report["hashes"] = [file._asdict() for file in hashes]
        if not as_json:
            print_hashes(hashes)
    if as_json:
        print_json(report)
    if failed:
        raise typer.Exit(CHECK_FAILED)


@app.command()
def bench(
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A published shape with random weights, such as starcoderbase-1b; nothing is "
            "downloaded.",
        ),
    ] = None,
    model: Model = None,
    revision: Revision = None,
    device: Device = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="float32, bfloat16, float16 or float64. Default: the checkpoint's own; of a "
            "shape, float32 on a CPU and bfloat16 on a GPU.",
        ),
    ] = None,
    backend: Backend = "auto",
    quantize: Quantize = None,
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

    Of reading prompts (pp), of writing (tg), of both: tokens per second as mean ± standard
    deviation and as median over rounds in which everything takes turns. Beside them, for writing,
    GB/s and the share of the memory bandwidth of this machine (MBU); for reading prompts, TFLOP/s
    and the share of the rate of its matrix products (MFU). "tg127 @ d512" writes behind a prompt of
    512.

    \b
    Examples:
      mqa-gpt bench -p 128 -g 32
      mqa-gpt bench --shape tiny_starcoder_py --batch 1,8 --compare transformers
      mqa-gpt bench --shape starcoderbase-7b --dtype bfloat16 --output json > 7b.json
    """
    output = "json" if as_json else output
    if output not in ("md", "csv", "json"):
        raise InputError(f"--output is {output!r}: accepted are md, csv, json")
    report = benchmark(
        shape=shape,
        model=model,
        revision=revision,
        device=device,
        dtype=dtype,
        backend=backend,
        quantize=quantize,
        prompt_lengths=numbers(n_prompt, "--n-prompt"),
        new_lengths=numbers(n_gen, "--n-gen"),
        batches=numbers(batch, "--batch"),
        repeats=repeats,
        compare=compare.split(",") if compare else [],
    )
    if output == "json":
        print_json(report.to_dict())
    else:
        write(report.to_csv() if output == "csv" else report.to_markdown())


@app.command()
def env(as_json: Json = False) -> None:
    """Show versions and hardware, for a bug report.

    \b
    Example:
      mqa-gpt env --json
    """
    found = describe()
    if as_json:
        print_json(found)
    else:
        print_environment(found)


def _load(
    model: str | None,
    revision: str | None,
    device: str | None,
    dtype: str | None,
    backend: str,
    quantize: str | None,
    cache_dtype: str | None,
) -> tuple[LLM, float]:
    """The loaded checkpoint and the seconds that took."""
    begin = time.perf_counter()
    name = DEMO_DIR if model is None else model
    llm = LLM.load(
        name,
        revision=revision,
        device=device,
        dtype=dtype,
        backend=backend,
        quantize=quantize,
        cache_dtype=cache_dtype,
    )
    return llm, time.perf_counter() - begin


def _draft(
    draft: str | None, device: str | None, dtype: str | None, backend: str
) -> Drafter | None:
    """What `--draft` names."""
    if draft is None:
        return None
    if draft == "prompt":
        return PromptLookup()
    return DraftModel(LLM.load(draft, device=device, dtype=dtype, backend=backend).model)
