"""What the command line prints: completions, tables, JSON, notes.

Results go to standard output and notes to standard error. Nothing that a checkpoint or a model says
reaches a terminal as a control character.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import prod
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mqa_gpt.checkpoints.inspect import FileHash, Inspection, NonFinite, TensorInfo
from mqa_gpt.generation.completion import Completion, Generation, Stats
from mqa_gpt.llm import LLM
from mqa_gpt.machine import peak_memory
from mqa_gpt.progress import progress

# Of tables, in columns: where there is no terminal, and at least, so that no number is cut.
PIPE_WIDTH, TABLE_WIDTH = 160, 60

CHECK_FAILED, BAD_INPUT, INTERRUPTED, READER_GONE = 1, 2, 130, 141  # exit statuses


def run(
    llm: LLM,
    generation: Generation,
    around: dict[str, tuple[str, str]],
    *,
    n: int,
    model: str,
    load_seconds: float,
    show_stats: bool,
    as_json: bool,
) -> None:
    """Run a generation and print it: a single completion as it is written, several at the end.

    Args:
        around: for each prompt, by its name, the texts to print before and after its completions.
        n: samples per prompt.
        model: its name, for the report.
    """
    streamed = len(around) * n == 1 and not as_json
    interrupted = False
    shown = 0  # characters
    try:
        if streamed:
            ((before, after),) = around.values()
            write(before, dim=True)
            for _, piece in generation:
                with _uninterrupted():
                    write(piece)
                    shown += len(piece)
        else:
            with progress(generation.stats.rows, "completion") as show:
                for _ in generation:
                    show(generation.stats.finished_rows, rate_text(generation.stats))
    except KeyboardInterrupt:  # print the partial output
        interrupted = True
    except FloatingPointError:
        write("\n" if streamed and sys.stdout.isatty() else "")
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
        print_json({"model": model, "completions": entries, "stats": numbers})
    elif streamed:
        write(completions[0].text[shown:])
        write(after, dim=True)
        ended = (before + completions[0].text + after).endswith("\n")
        is_report_next = show_stats or completions[0].logprobs or interrupted
        if not ended and sys.stdout.isatty():
            write("\n")
        elif not ended and is_report_next and _is_one_stream():
            note("")  # ends the line of the completion
        if not completions[0].text and completions[0].finish_reason == "stop":
            note("note: the completion is empty: it ended before any text")
    else:
        _print_under_headings(completions, around, n)
    if not as_json:
        for completion in completions:
            if completion.logprobs is not None:
                _print_logprobs(llm, completion)
        if show_stats:
            memory = "" if peak is None else f"peak memory {size_text(peak)}"
            note(" | ".join(filter(None, [f"load {load_seconds:.2f} s", str(stats), memory])))
    if interrupted:
        raise KeyboardInterrupt


def rate_text(stats: Stats) -> str:
    """The speed so far, in tokens per second."""
    return f"{stats.rate or 0:,.1f} tok/s"


def _is_one_stream() -> bool:
    """Whether standard output and standard error go to the same place."""
    try:
        return os.path.sameopenfile(sys.stdout.fileno(), sys.stderr.fileno())
    except OSError:  # not files at all
        return False


def _print_under_headings(
    completions: list[Completion], around: dict[str, tuple[str, str]], n: int
) -> None:
    """Several completions, each with the texts around it and a blank line after it."""
    for row, completion in enumerate(completions):
        name, (before, after) = list(around.items())[row // n]
        sample = f", sample {row % n}" if n > 1 else ""
        write(f"==> {name}{sample} <==\n", dim=True)
        write(before, dim=True)
        write(completion.text)
        write(after, dim=True)
        write("\n" if (before + completion.text + after).endswith("\n") else "\n\n")


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
    """One row per token on standard error, which leaves standard output to the completion."""
    table = new_table("token", "log-probability", "probability", "likeliest")

    def name(id_: int) -> str:
        return repr(llm.tokenizer.decode([id_], skip_special_tokens=False))

    for id_, logprob, top in zip(
        completion.token_ids, completion.logprobs or [], completion.top_logprobs or [], strict=True
    ):
        likeliest = ", ".join(f"{name(other)} {math.exp(value):.2f}" for other, value in top)
        table.add_row(name(id_), f"{logprob:.4f}", f"{math.exp(logprob):.4f}", Text(likeliest))
    print_table(table, stderr=True)


def print_inspection(found: Inspection) -> None:
    """The sizes of a model as tables."""
    config, sizes = found.config, found.to_dict()
    if config.multi_query:
        heads = f"{config.n_head} heads of {config.head_dim} sharing one K and V"
    else:
        heads = f"{config.n_head} heads of {config.head_dim}, each with its own K and V"
    tied = "tied" if config.tie_word_embeddings else "untied"
    write(
        f"{visible(found.name)}\n"
        f"{config.n_layer} layers, {heads}\n"
        f"width {config.n_embd:,}, MLP {config.inner_size:,} ({config.activation_function}), "
        f"vocabulary {config.vocab_size:,} ({tied}), context {config.n_positions:,}\n\n"
    )

    table = new_table("part", ">parameters", ">share")
    for part, count in config.parameters_by_part.items():
        if count:
            table.add_row(part, f"{count:,}", f"{count / sizes['parameters']:.1%}")
    table.add_section()
    table.add_row("all", f"{sizes['parameters']:,}", "100%")
    print_table(table)
    write("\n")

    table = new_table("dtype", ">weights", "KV cache of", ">as MQA", ">as MHA")
    for dtype, weights in sizes["weight_bytes"].items():
        cache = sizes["cache_bytes_per_token"][dtype]
        one = (f"{cache['mqa']:,} B", f"{cache['mha']:,} B")
        table.add_row(dtype, size_text(weights), "1 token", *one)
        full = (size_text(size * config.n_positions) for size in cache.values())
        table.add_row("", "", f"{config.n_positions:,} tokens", *full)
    print_table(table)
    write("\n")

    stored = found.file_bytes is not None  # a preset has no dtype
    table = new_table("tensor", "shape", *["dtype"] * stored, ">parameters", ">times")
    for (name, shape, dtype), count in Counter(_without_layer(found.tensors)).items():
        cells = [visible(name), "x".join(map(str, shape)), *[dtype or ""] * stored]
        table.add_row(*cells, f"{prod(shape):,}", str(count))
    print_table(table)
    if found.file_bytes is not None:
        write(f"\n{len(found.tensors):,} tensors, {size_text(found.file_bytes)} in files\n")


def _without_layer(tensors: list[TensorInfo]) -> Iterator[tuple[str, tuple[int, ...], str | None]]:
    """Name, shape and dtype with the layer's number left out, so that equal layers are equal."""
    for tensor in tensors:
        yield re.sub(r"\bh\.[0-9]+\.", "h.*.", tensor.name), tensor.shape, tensor.dtype


def print_non_finite(bad: list[NonFinite], checked: int) -> None:
    """The tensors with NaN or infinity, or a line that says there are none."""
    if not bad:
        write(f"finite: all values of {checked:,} tensors\n")
        return
    table = new_table("not finite", ">NaN", ">infinite")
    for tensor in bad:
        table.add_row(visible(tensor.name), f"{tensor.nan:,}", f"{tensor.inf:,}")
    print_table(table)


def print_hashes(hashes: list[FileHash]) -> None:
    """Laid out like `sha256sum`, whose --check reads it."""
    for file in hashes:
        write(f"{file.sha256}  {visible(file.file)}\n")
        if file.expected is None:
            note(f"{file.file}: nothing to compare with")
        elif file.differs:
            note(f"{file.file}: DIFFERS from the {file.source}'s {file.expected}")
        else:
            note(f"{file.file}: as on the hub (according to the {file.source})")


def print_environment(found: dict[str, Any]) -> None:
    """Versions and hardware as a table."""
    table = new_table("", "")
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
            f"{size_text(memory['total_bytes'])}, {size_text(memory['available_bytes'])} available",
        )
    for gpu in found["gpus"]:
        table.add_row(
            "GPU",
            f"{gpu['name']}, {size_text(gpu['memory_bytes'])}, "
            f"compute capability {gpu['compute_capability']}",
        )
    if not found["gpus"]:
        table.add_row("GPU", "none")
    table.add_row("CUDA", found["cuda"] or "torch is built without it")
    for device, backends in found["backends"].items():
        table.add_row(f"attention on {device}", ", ".join(backends))
    table.show_header = False
    print_table(table)


def new_table(*headings: str) -> Table:
    """A table; a heading that begins with ">" is a column of numbers.

    On a narrow terminal text goes on in the next line; nothing is cut.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in headings:
        is_number = heading.startswith(">")
        table.add_column(
            heading.removeprefix(">"),
            justify="right" if is_number else "left",
            overflow="fold",
            no_wrap=is_number,
        )
    return table


def print_table(table: Table, *, stderr: bool = False) -> None:
    """Print a table, as wide as the terminal; if that is too narrow, it wraps the lines itself."""
    console = new_console(stderr=stderr)
    console.width = max(console.width, TABLE_WIDTH)
    console.print(table)


class _Console(Console):
    """rich's console, but a closed pipe is reported as for any other output."""

    def on_broken_pipe(self) -> None:  # called while the error is handled; rich would exit with 1
        raise


def new_console(*, stderr: bool = False) -> Console:
    """Where tables go; a pipe has no width to fit, so it gets one line per row."""
    stream = sys.stderr if stderr else sys.stdout
    return _Console(
        stderr=stderr, width=None if stream.isatty() else PIPE_WIDTH, markup=False, highlight=False
    )


def write(text: str, *, dim: bool = False) -> None:
    """Print without a newline: to a pipe exactly this text, to a terminal nothing it would obey."""
    if not sys.stdout.isatty():
        sys.stdout.write(text)
    else:
        new_console().print(Text(visible(text), "dim" if dim else ""), end="", soft_wrap=True)
    sys.stdout.flush()


def note(text: str) -> None:
    """Print a line on standard error, unless its reader has closed it."""
    with suppress(OSError):
        print(visible(text), file=sys.stderr, flush=True)


def visible(text: str) -> str:
    """The text with control characters, which could steer a terminal, spelled out."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda c: f"\\x{ord(c[0]):02x}", text)


def print_json(report: dict[str, Any]) -> None:
    """The report as strict JSON on standard output, a list of numbers in one line.

    Characters that could steer a terminal and lone surrogates are escaped.
    """
    text = json.dumps(_without_nan(report), indent=2, ensure_ascii=False)
    # Inside a string a line break is escaped, so what begins with one is a list.
    text = re.sub(r"\[\n([^\[\]{}\"]*)\]", lambda items: f"[{' '.join(items[1].split())}]", text)
    print(re.sub(r"[\x7f-\x9f\ud800-\udfff]", lambda c: f"\\u{ord(c[0]):04x}", text))


def _without_nan(value: Any) -> Any:
    """The value with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def size_text(size: int) -> str:
    """Bytes in three digits."""
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.{0 if unit == 'B' or value >= 100 else 1 if value >= 10 else 2}f} {unit}"
