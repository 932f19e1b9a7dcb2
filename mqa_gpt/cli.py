"""The `mqa-gpt` command: each sub-command calls one function of the library and prints its result.

Results go to standard output, everything else to standard error. The exit status is 0, 1 if a check
failed, 2 for bad input, 130 after Ctrl-C, and 141 if whoever read the output went away.

torch takes seconds to import and `--help` must not wait for it: modules that need it are imported
by the commands that do.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import json
import math
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from mqa_gpt.errors import InputError, PromptError

if TYPE_CHECKING:
    from mqa_gpt.inspection import FileHash, Inspection, NonFinite, TensorInfo
    from mqa_gpt.llm import LLM, Completion, Generation

CHECK_FAILED, BAD_INPUT, INTERRUPTED, READER_GONE = 1, 2, 130, 141

MARKER = "<FILL>"


class Commands(TyperGroup):
    """The group of commands, and the one place where errors become messages and exit statuses."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            try:
                return super().invoke(ctx)
            finally:
                sys.stdout.flush()
        except (InputError, FloatingPointError) as error:
            status = BAD_INPUT
            _note(f"error: {error}")
        except KeyboardInterrupt:
            status = INTERRUPTED
            _note("interrupted")
        except OSError as error:
            status = READER_GONE
            if not isinstance(error, BrokenPipeError):
                status = BAD_INPUT
                _note(f"error: {error}")  # such as a full disk
            # Python flushes once more at exit, and would fail once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(status)


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
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets its escape, not a traceback.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="mqa-gpt")


# ---------------------------------------------------------------------------------------- options

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME|FOLDER",
        help="A checkpoint: its name on the Hugging Face hub, or a folder. "
        "Default: the demo checkpoint that comes with the package.",
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Branch, tag or commit of a checkpoint on the hub."),
]
Device = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, ... Default: the GPU if there is one."),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="float32, bfloat16, float16 or float64. Default: the checkpoint's own.",
    ),
]
Backend = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Attention: reference, sdpa, triton, or auto for the fastest that runs here.",
    ),
]
PromptFile = Annotated[
    list[str] | None,
    typer.Option(
        "--file",
        "-f",
        metavar="PATH",
        help="Read a prompt from a file; may be given several times.",
    ),
]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", help="Write at most N tokens.")]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help=r"End before this text; may be given several times. \n, \t, \r and \\ stand for "
        "newline, tab, carriage return and backslash.",
    ),
]
Temperature = Annotated[
    float,
    typer.Option(
        metavar="T",
        help="0 always takes the likeliest token (greedy); above 0 draws, more freely the higher.",
    ),
]
TopK = Annotated[int | None, typer.Option(metavar="K", help="Draw among the K likeliest tokens.")]
TopP = Annotated[
    float | None,
    typer.Option(
        metavar="P", help="Draw among the likeliest tokens that together reach probability P."
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(metavar="P", help="Drop tokens less likely than P times the likeliest."),
]
RepetitionPenalty = Annotated[
    float,
    typer.Option(metavar="X", help="Above 1: tokens that occurred before become less likely."),
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Make the draws repeatable.")]
Samples = Annotated[int, typer.Option("--n", metavar="N", help="Write N samples per prompt.")]
Logprobs = Annotated[
    int | None,
    typer.Option(
        metavar="K", help="Report each token's log-probability, and the K likeliest in its place."
    ),
]
Statistics = Annotated[bool, typer.Option("--stats", help="Report times, speeds and memory.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


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
    no_special_tokens: Annotated[
        bool,
        typer.Option(
            "--no-special-tokens",
            help="Take <fim_prefix>, <|endoftext|> and the like in a prompt as plain text.",
        ),
    ] = False,
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
    texts = _prompt_texts(prompts or [], file or [])
    llm, load_seconds = _load(model, revision, device, dtype, backend)
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
        stop=[_unescape(text) for text in stop or []],
        logprobs=logprobs,
    )
    if echo is None:
        echo = sys.stdout.isatty()
    around = [(text if echo else "", "") for text in texts for _ in range(n)]
    _run(llm, generation, around, model, load_seconds, n, stats, as_json)


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
    mode: Annotated[
        str,
        typer.Option(
            metavar="psm|spm",
            help="What the model reads first: the prefix (psm) or the suffix (spm).",
        ),
    ] = "psm",
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
    before, after = _split_hole(file, at, marker, prefix, suffix)
    llm, load_seconds = _load(model, revision, device, dtype, backend)
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
        stop=[_unescape(text) for text in stop or []],
        logprobs=logprobs,
    )
    cut_prefix, cut_suffix = generation.completions[0].cut
    if cut_prefix or cut_suffix:
        _note(
            f"left out to fit the context of {llm.model.config.n_positions:,} tokens: "
            f"the first {cut_prefix:,} of the prefix, the last {cut_suffix:,} of the suffix"
        )
    around = [(before, after) if whole else ("", "")] * n
    _run(llm, generation, around, model, load_seconds, n, stats, as_json)


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
    as_json: Json = False,
) -> None:
    """Compare a checkpoint with transformers, number by number.

    Logits at every position, then greedy tokens, for each PROMPT (- is standard input) or for a few
    built-in ones. In float32 all tokens must be equal; in 16 bit the logits' error may be twice
    transformers' own. Exits with 1 if they are not, or it is larger. Needs transformers:
    pip install 'mqa-gpt[test]'.

    \b
    Examples:
      mqa-gpt verify
      mqa-gpt verify --model bigcode/starcoderbase-1b --dtype bfloat16
    """
    from mqa_gpt.checkpoint import DEMO_DIR
    from mqa_gpt.report import format_report
    from mqa_gpt.verify import verify

    report = verify(
        DEMO_DIR if model is None else model,
        revision=revision,
        device=device,
        dtype=dtype,
        backend=backend,
        prompts=_prompt_texts(prompts or [], file or []) if prompts or file else None,
        max_new_tokens=max_new_tokens,
    )
    if as_json:
        _print_json(report.to_dict())
    else:
        _write(format_report(report) + "\n")
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
    from mqa_gpt import inspection

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
        _print_inspection(found)
    if check_finite:
        bad = inspection.check_finite(model, revision=revision)
        failed |= bool(bad)
        report["non_finite"] = [tensor._asdict() for tensor in bad]
        if not as_json:
            _print_non_finite(bad, len(found.tensors))
    if hash_files:
        hashes = inspection.hash_files(model, revision=revision)
        failed |= any(file.differs for file in hashes)
        report["hashes"] = [file._asdict() for file in hashes]
        if not as_json:
            _print_hashes(hashes)
    if as_json:
        _print_json(report)
    if failed:
        raise typer.Exit(CHECK_FAILED)


@app.command()
def env(as_json: Json = False) -> None:
    """Show versions and hardware, for a bug report.

    \b
    Example:
      mqa-gpt env --json
    """
    from mqa_gpt.environment import describe

    found = describe()
    if as_json:
        _print_json(found)
        return
    table = _table("", "")
    for package, version in found["versions"].items():
        table.add_row(package, version or "not installed")
    table.add_section()
    cpu, memory = found["cpu"], found["memory"]
    table.add_row("system", found["system"])
    table.add_row("CPU", f"{cpu['name']}, {cpu['cores']} cores, {cpu['capability']}")
    table.add_row("threads", str(cpu["threads"]))
    if memory["total_bytes"] and memory["available_bytes"]:
        table.add_row(
            "memory",
            f"{_size(memory['total_bytes'])}, {_size(memory['available_bytes'])} available",
        )
    for gpu in found["gpus"]:
        table.add_row(
            "GPU",
            f"{gpu['name']}, {_size(gpu['memory_bytes'])}, "
            f"compute capability {gpu['compute_capability']}",
        )
    if not found["gpus"]:
        table.add_row("GPU", "none")
    table.add_row("CUDA", found["cuda"] or "torch is built without it")
    for device, backends in found["backends"].items():
        table.add_row(f"attention on {device}", ", ".join(backends))
    table.show_header = False
    _console().print(table)


# ------------------------------------------------------------------------------------------ input


def _load(
    model: str | None, revision: str | None, device: str | None, dtype: str | None, backend: str
) -> tuple[LLM, float]:
    """The loaded checkpoint and the seconds that took."""
    from mqa_gpt.llm import LLM

    begin = time.perf_counter()
    llm = LLM.load(model, revision=revision, device=device, dtype=dtype, backend=backend)
    return llm, time.perf_counter() - begin


def _prompt_texts(arguments: list[str], files: list[str]) -> list[str]:
    """The prompts from arguments and files, or from standard input if there are neither."""
    if not arguments and not files:
        if sys.stdin is None or sys.stdin.isatty():
            raise PromptError(
                "there is no prompt: give one as an argument, with --file, or on standard input"
            )
        return [_read("-")]
    return [_read("-") if text == "-" else text for text in arguments] + [_read(f) for f in files]


def _read(path: str) -> str:
    """A file's text, exactly as it is there; "-" is standard input."""
    name = "standard input" if path == "-" else path
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from error
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{name} is not UTF-8 text: byte {data[error.start]:#04x} at offset {error.start}"
        ) from error


def _unescape(text: str) -> str:
    r"""A --stop text with \n, \t, \r and \\ replaced by what they stand for."""
    escapes = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
    return re.sub(r"\\([ntr\\])", lambda match: escapes[match[1]], text)


def _split_hole(
    file: str | None, at: str | None, marker: str | None, prefix: str | None, suffix: str | None
) -> tuple[str, str]:
    """The texts before and after the hole, from whichever way of giving them was used."""
    if file is None:
        if prefix is None and suffix is None:
            raise PromptError("there is nothing to fill: give a FILE, or --prefix and --suffix")
        if at is not None or marker is not None:
            raise PromptError("--at and --marker say where the hole in a FILE is: give a FILE")
        return prefix or "", suffix or ""
    if prefix is not None or suffix is not None:
        raise PromptError("give either a FILE or --prefix and --suffix, not both")
    if at is not None and marker is not None:
        raise PromptError("give either --at or --marker, not both")
    text = _read(file)
    if at is not None:
        return _split_at_position(text, at, file)
    return _split_at_marker(text, MARKER if marker is None else marker, file)


def _split_at_marker(text: str, marker: str, name: str) -> tuple[str, str]:
    if not marker:
        raise PromptError("--marker is empty: give the text that stands where the hole is")
    count = text.count(marker)
    if count != 1:
        raise PromptError(
            f"{name} holds {marker!r} {count} times: it must stand there once, where the hole is; "
            "or name another with --marker, or a place with --at LINE:COLUMN"
        )
    before, _, after = text.partition(marker)
    return before, after


def _split_at_position(text: str, at: str, name: str) -> tuple[str, str]:
    match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", at)
    if match is None:
        raise PromptError(f"--at is {at!r}: it must be LINE:COLUMN, such as 12:8")
    line, column = int(match[1]), int(match[2])
    lines = text.split("\n")
    if not 1 <= line <= len(lines):
        raise PromptError(f"--at is {at} but {name} has lines 1 to {len(lines)}")
    width = len(lines[line - 1].removesuffix("\r"))
    if not 1 <= column <= width + 1:
        raise PromptError(f"--at is {at} but line {line} of {name} has columns 1 to {width + 1}")
    offset = sum(len(earlier) + 1 for earlier in lines[: line - 1]) + column - 1
    return text[:offset], text[offset:]


# ----------------------------------------------------------------------------------------- output


def _run(
    llm: LLM,
    generation: Generation,
    around: list[tuple[str, str]],
    model: str | None,
    load_seconds: float,
    n: int,
    show_stats: bool,
    as_json: bool,
) -> None:
    """Run a generation and print it: a single completion while it is written, several at the end.

    Args:
        around: per completion the texts to print before and after it.
        n: samples per prompt.
    """
    from mqa_gpt.environment import peak_memory

    single = len(around) == 1 and not as_json
    before, after = around[0]
    interrupted = False
    shown = 0  # characters
    try:
        if single:
            _write(before, dim=True)
        for _, piece in generation:
            if single:
                with _uninterrupted():
                    _write(piece)
                    shown += len(piece)
    except KeyboardInterrupt:  # what there is by now is printed all the same
        interrupted = True
    except FloatingPointError:
        _write("\n" if single and sys.stdout.isatty() else "")
        raise

    completions, stats = generation.completions, generation.stats
    peak = peak_memory(llm.model.device)
    if as_json:
        entries = [
            {"prompt": row // n, "sample": row % n} | dataclasses.asdict(completion)
            for row, completion in enumerate(completions)
        ]
        numbers = {"load_seconds": load_seconds} | dataclasses.asdict(stats)
        numbers |= {
            "prefill_tokens_per_second": stats.prefill_rate,
            "decode_tokens_per_second": stats.decode_rate,
            "peak_memory_bytes": peak,
        }
        _print_json({"model": model or "demo", "completions": entries, "stats": numbers})
    elif single:
        _write(completions[0].text[shown:])
        _write(after, dim=True)
        if sys.stdout.isatty() and not (before + completions[0].text + after).endswith("\n"):
            _write("\n")
    else:
        _print_under_headings(completions, around, n)
    if not as_json:
        for completion in completions:
            if completion.logprobs is not None:
                _print_logprobs(llm, completion)
        if show_stats:
            memory = "" if peak is None else f" | peak memory {_size(peak)}"
            _note(f"load {load_seconds:.2f} s | {stats}{memory}")
    if interrupted:
        raise KeyboardInterrupt


def _print_under_headings(
    completions: list[Completion], around: list[tuple[str, str]], n: int
) -> None:
    """Several completions, each with the texts around it, and a blank line behind it."""
    for row, (completion, (before, after)) in enumerate(zip(completions, around, strict=True)):
        sample = f", sample {row % n}" if n > 1 else ""
        _write(f"==> prompt {row // n}{sample} <==\n", dim=True)
        _write(before, dim=True)
        _write(completion.text)
        _write(after, dim=True)
        _write("\n" if (before + completion.text + after).endswith("\n") else "\n\n")


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block."""
    signals: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: signals.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if signals:
        raise KeyboardInterrupt


def _print_logprobs(llm: LLM, completion: Completion) -> None:
    """One row per token on standard error: it is beside the completion, not part of it."""
    table = _table("token", "log-probability", "probability", "likeliest")

    def name(id_: int) -> str:
        return repr(llm.tokenizer.decode([id_], skip_special_tokens=False))

    for id_, logprob, top in zip(
        completion.token_ids, completion.logprobs or [], completion.top_logprobs or [], strict=True
    ):
        likeliest = ", ".join(f"{name(other)} {math.exp(value):.2f}" for other, value in top)
        table.add_row(name(id_), f"{logprob:.4f}", f"{math.exp(logprob):.4f}", Text(likeliest))
    _console(stderr=True).print(table)


def _print_inspection(found: Inspection) -> None:
    """The sizes of a model as tables."""
    config, console, sizes = found.config, _console(), found.to_dict()
    if config.multi_query:
        heads = f"{config.n_head} heads of {config.head_dim} sharing one K and V"
    else:
        heads = f"{config.n_head} heads of {config.head_dim}, each with its own K and V"
    tied = "tied" if config.tie_word_embeddings else "untied"
    _write(
        f"{_visible(found.name)}\n"
        f"{config.n_layer} layers, {heads}\n"
        f"width {config.n_embd:,}, MLP {config.inner_size:,} ({config.activation_function}), "
        f"vocabulary {config.vocab_size:,} ({tied}), context {config.n_positions:,}\n\n"
    )

    table = _table("part", ">parameters", ">share")
    for part, count in found.parameters.items():
        if count:
            table.add_row(part, f"{count:,}", f"{count / sizes['parameters']:.1%}")
    table.add_section()
    table.add_row("all", f"{sizes['parameters']:,}", "100%")
    console.print(table, "")

    context = f"{config.n_positions:,} tokens"
    table = _table(
        "in",
        ">weights",
        ">KV cache per token\nas MQA",
        ">\nas MHA",
        f">of {context}\nas MQA",
        ">\nas MHA",
    )
    for dtype, weights in sizes["weight_bytes"].items():
        cache = sizes["cache_bytes_per_token"][dtype]
        table.add_row(
            dtype,
            _size(weights),
            f"{cache['mqa']:,} B",
            f"{cache['mha']:,} B",
            _size(cache["mqa"] * config.n_positions),
            _size(cache["mha"] * config.n_positions),
        )
    console.print(table, "")

    table = _table("tensor", "shape", "dtype", ">parameters", ">times")
    for (name, shape, dtype), count in Counter(_without_layer(found.tensors)).items():
        table.add_row(
            _visible(name), "x".join(map(str, shape)), dtype or "", f"{prod(shape):,}", str(count)
        )
    console.print(table)
    if found.file_bytes is not None:
        _write(f"\n{len(found.tensors):,} tensors, {_size(found.file_bytes)} in files\n")


def _without_layer(tensors: list[TensorInfo]) -> Iterator[tuple[str, tuple[int, ...], str | None]]:
    """Name, shape and dtype with the layer's number left out, so that equal layers are equal."""
    for tensor in tensors:
        yield re.sub(r"\bh\.[0-9]+\.", "h.*.", tensor.name), tensor.shape, tensor.dtype


def _print_non_finite(bad: list[NonFinite], checked: int) -> None:
    if not bad:
        _write(f"finite: all values of {checked:,} tensors\n")
        return
    table = _table("not finite", ">NaN", ">infinite")
    for tensor in bad:
        table.add_row(_visible(tensor.name), f"{tensor.nan:,}", f"{tensor.inf:,}")
    _console().print(table)


def _print_hashes(hashes: list[FileHash]) -> None:
    """Laid out like `sha256sum`, whose --check reads it."""
    for file in hashes:
        _write(f"{file.sha256}  {_visible(file.file)}\n")
        if file.expected is None:
            _note(f"{file.file}: nothing to compare with")
        elif file.differs:
            _note(f"{file.file}: DIFFERS from the {file.source}'s {file.expected}")
        else:
            _note(f"{file.file}: as on the hub (according to the {file.source})")


def _table(*headings: str) -> Table:
    """A table; a heading that begins with ">" is a column of numbers."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for heading in headings:
        table.add_column(
            heading.removeprefix(">"), justify="right" if heading.startswith(">") else "left"
        )
    return table


def _console(*, stderr: bool = False) -> Console:
    """Where tables go; a pipe has no width to fit, so it gets one line per row."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(
        stderr=stderr, width=None if stream.isatty() else 160, markup=False, highlight=False
    )


def _write(text: str, *, dim: bool = False) -> None:
    """Print without a newline: to a pipe exactly this text, to a terminal nothing it would obey."""
    if not sys.stdout.isatty():
        sys.stdout.write(text)
    else:
        _console().print(Text(_visible(text), "dim" if dim else ""), end="", soft_wrap=True)
    sys.stdout.flush()


def _note(text: str) -> None:
    """Print a line on standard error."""
    print(_visible(text), file=sys.stderr, flush=True)


def _visible(text: str) -> str:
    """The text with control characters, which could steer a terminal, spelled out."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda c: f"\\x{ord(c[0]):02x}", text)


def _print_json(report: dict[str, Any]) -> None:
    print(json.dumps(_without_nan(report), indent=2, ensure_ascii=False))


def _without_nan(value: Any) -> Any:
    """The value with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _size(size: int) -> str:
    """Bytes in three digits."""
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.{0 if unit == 'B' or value >= 100 else 1 if value >= 10 else 2}f} {unit}"
