"""The `batch` command: prompts from one file of JSON Lines, their completions into another.

A result is written as soon as it and all before it are finished. So the output lines up with the
input, and in float32 a run that was killed and begun anew leaves the same file as one that was not
(in 16 bits a choice between near equals may depend on the rows beside it). Writing each result at
once would save little: a row lasts for at most `max_new_tokens` steps, and so does the wait for it.

Lines that are there are never moved, so a run adds its results behind those of earlier ones. Where
the input has got new prompts before others that are done, the two no longer line up.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from mqa_gpt.cli.input import name_of, read_text
from mqa_gpt.cli.output import note, print_json
from mqa_gpt.errors import InputError, is_int, shown
from mqa_gpt.generation.completion import Completion, Generation, Stats
from mqa_gpt.machine import peak_memory

try:
    import fcntl
except ImportError:  # Windows, where two runs on one output are not kept apart
    fcntl = None  # type: ignore[assignment]

MAX_INPUT_BYTES = 100_000_000  # prompts are all held in memory, as text and as tokens

RESULT_BEGINS = b'{"id": '


class Item(NamedTuple):
    """One line of the input: its number, its id, and a text or a (prefix, suffix) to infill."""

    line: int
    id: int | str
    prompt: str | tuple[str, str]

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"line {self.line} (id {shown(self.id)})"

    @property
    def prompt_hash(self) -> str:
        """What tells its prompt from others, whatever the tokenizer: the first 16 digits of the
        SHA-256 of the prompt, or of the list of prefix and suffix, as `json.dumps` writes it.
        """
        return hashlib.sha256(json.dumps(self.prompt).encode()).hexdigest()[:16]


class Found(NamedTuple):
    """What is asked of an earlier result: where it is, and how it came about."""

    line: int
    completions: int
    prompt_tokens: object
    prompt_hash: object


class Results(NamedTuple):
    """An output as it was found.

    Attributes:
        file: to add to.
        path: its path.
        found: the results it holds, by their ids.
        torn: bytes at its end that are a half-written line.
        lacks_newline: its last line is whole but for the newline.
    """

    file: BinaryIO
    path: str
    found: dict[int | str, Found]
    torn: int
    lacks_newline: bool

    def mend(self) -> None:
        """Make the file end with a whole line."""
        if self.torn:
            self.file.truncate(self.file.seek(0, os.SEEK_END) - self.torn)
        if self.lacks_newline:
            self.file.write(b"\n")
            self.file.flush()


def read_items(path: str) -> list[Item]:
    """What there is to complete; "-" is standard input. Empty lines do not count.

    Raises:
        InputError: a file or line that cannot be used, or an id that comes twice.
    """
    items: dict[int | str, Item] = {}
    # What programs on Windows begin a file with is not part of it.
    text = read_text(path, MAX_INPUT_BYTES).removeprefix("\ufeff")
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"line {number} of {name_of(path)}"
        entry = _parse(line, where)
        id_, keys = entry["id"], {"prompt", "prefix", "suffix"} & entry.keys()
        if id_ in items:
            raise InputError(f"{where} has the id {shown(id_)} of line {items[id_].line}")
        for key in sorted(keys):
            if not isinstance(entry[key], str):
                raise InputError(f"{where} has the {key} {shown(entry[key])}: it must be a text")
        if keys == {"prompt"}:
            prompt = entry["prompt"]
        elif keys == {"prefix", "suffix"}:
            prompt = entry["prefix"], entry["suffix"]
        else:
            raise InputError(
                f"{where} holds {' and '.join(sorted(keys)) or 'nothing to complete'}: it must "
                "hold a prompt, or a prefix and a suffix"
            )
        items[id_] = Item(number, id_, prompt)
    return list(items.values())


@contextmanager
def open_output(path: str, input_path: str) -> Iterator[BinaryIO]:
    """The output, made if it is not there, to read and to add to while no other run has it.

    If it was made here and an error comes before the first result, it is taken away again.

    Raises:
        InputError: it cannot be written, is the input, or another run is writing it.
    """
    if path == "-":
        raise InputError("the output is -: name a file, with which a later run can go on")
    if not path:
        raise InputError("cannot write the output: the file name is empty")
    name, output = f"the output {shown(path)}", Path(path)
    try:
        existed = output.exists()
        if existed and not output.is_file():
            raise InputError(f"{name} is not a file")
        if not output.parent.is_dir():
            raise InputError(f"{name} is in a folder that does not exist: make it first")
        if existed and input_path != "-" and output.samefile(input_path):
            raise InputError(f"{name} is the input too: name another file")
        file = output.open("ab+")
    except OSError as error:
        raise InputError(f"cannot write {name}: {error.strerror}") from error
    except InputError:
        raise
    except ValueError as error:  # a lone surrogate or a NUL, which no file's name holds
        raise InputError(f"cannot write {name}: {error}") from error

    try:
        if not _lock(file, output):
            existed = True  # it is the other run's
            raise InputError(f"another run is writing {name}: wait for its end or name another")
        yield file
    except BaseException:
        with suppress(OSError):  # Windows removes no open file
            # Not by `seek`, which would write once more what a full disk has just refused.
            if not existed and not os.fstat(file.fileno()).st_size:
                output.resolve().unlink()
        raise
    finally:
        with suppress(OSError):  # what cannot be written was an error when it was flushed
            file.close()


def _lock(file: BinaryIO, path: Path) -> bool:
    """Keep other runs away until the file is closed; False if another was first."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    # Whoever had it just before may have removed the file.
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


def read_results(file: BinaryIO, path: str, items: Sequence[Item]) -> Results:
    """What an earlier run has left in the output; a half-written line at its end does not count.

    Raises:
        InputError: the file holds something else than results of these items, each once.
    """
    name = f"the output {shown(path)}"
    file.seek(0)
    try:
        *lines, last = file.read().split(b"\n")
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from error
    torn = _is_torn(last)
    if last and not torn:
        lines.append(last)
    known = {item.id for item in items}
    found: dict[int | str, Found] = {}
    for number, line in enumerate(lines, 1):
        where = f"line {number} of {name}"
        entry = _parse(line.decode(errors="replace"), where)
        id_ = entry["id"]
        if not isinstance(entry.get("completions"), list):
            raise InputError(f"{where} is not a result of this command: name another file")
        if id_ in found:
            raise InputError(f"{where} has the id {shown(id_)} of line {found[id_].line}")
        if id_ not in known:
            raise InputError(
                f"{where} has the id {shown(id_)}, which the input does not have: give each input "
                "an output of its own"
            )
        tokens, hash_ = entry.get("prompt_tokens"), entry.get("prompt_hash")
        found[id_] = Found(number, len(entry["completions"]), tokens, hash_)
    return Results(
        file=file,
        path=path,
        found=found,
        torn=len(last) if torn else 0,
        lacks_newline=bool(last) and not torn,
    )


def require_same(results: Results, items: Sequence[Item], lengths: Sequence[int], n: int) -> None:
    """Raise InputError if a result that was found is of another prompt or of other options.

    A result without a hash, as they once were, is told by its prompt's length alone.

    Args:
        items: those whose results were found.
        lengths: their prompts' tokens.
        n: completions of each.
    """
    for item, length in zip(items, lengths, strict=True):
        found = results.found[item.id]
        if found.completions != n:
            differs = f"{found.completions:,} completions where --n asks for {n:,}"
        elif found.prompt_hash not in (None, item.prompt_hash):
            differs = (
                f"the prompt_hash {shown(found.prompt_hash)} where that of the input's prompt is "
                f"{item.prompt_hash!r}"
            )
        elif found.prompt_tokens != length:
            differs = f"a prompt of {found.prompt_tokens} tokens where the input's has {length:,}"
        else:
            continue
        raise InputError(
            f"line {found.line} of the output {shown(results.path)} (id {shown(item.id)}) has "
            f"{differs}: go on with the same input and options, or name another output"
        )


def _is_torn(last: bytes) -> bool:
    """Whether what follows the last newline is the begin of a result, to be written anew.

    A whole result lacks nothing but its newline, and what another program wrote is never cut off.
    """
    if not last or not (last.startswith(RESULT_BEGINS) or RESULT_BEGINS.startswith(last)):
        return False
    try:
        json.loads(last)
    except (ValueError, RecursionError):
        return True
    return False


def run_batch(
    generation: Generation | None,
    items: Sequence[Item],
    results: Results,
    model: str | None,
    device: torch.device | str,
    load_seconds: float,
    as_json: bool,
) -> None:
    """Run a generation, add each item's result to the output, and sum up.

    Args:
        generation: None if there is nothing to do.
        items: what the generation's prompts are.
        results: what the output holds already.
        device: whose memory counts.
    """
    stats = Stats(rows=0, prompt_tokens=0) if generation is None else generation.stats
    file, written, interrupted = results.file, 0, False
    try:
        results.mend()
        if generation is not None:
            with _progress_bar(stats.rows) as bar:

                def write_what_is_finished() -> None:
                    nonlocal written
                    for completions in generation.take():
                        file.write(_line(items[written], completions))
                        file.flush()
                        written += 1

                for _ in generation:
                    write_what_is_finished()
                    bar.set_postfix_str(f"{stats.rate:,.1f} tok/s", refresh=False)
                    bar.update(stats.finished_rows - bar.n)
                write_what_is_finished()
                bar.update(stats.finished_rows - bar.n)
    except KeyboardInterrupt:
        interrupted = True
    except OSError as error:
        raise InputError(f"cannot write {results.path}: {error.strerror}") from error

    before, total = len(results.found), len(results.found) + len(items)
    if as_json:
        counts = {"prompts": total, "found": before, "written": written}
        numbers = {"load_seconds": load_seconds} | dataclasses.asdict(stats)
        numbers |= {"tokens_per_second": stats.rate, "peak_memory_bytes": peak_memory(device)}
        report = {"model": model or "demo", "output": results.path} | counts
        print_json(report | {"interrupted": interrupted, "stats": numbers})
    else:
        speed = f"; {stats.new_tokens:,} tokens at {stats.rate:,.1f} tok/s" if stats.rate else ""
        note(
            f"{before + written:,} of {total:,} results in {results.path}: {before:,} were there, "
            f"{written:,} are new{speed}"
        )
    if interrupted:
        note("the same command goes on from there")
        raise KeyboardInterrupt


def _parse(line: str, where: str) -> dict[str, Any]:
    """A line's JSON object, which has an id."""
    try:
        entry = json.loads(line, object_pairs_hook=_without_doubles)
    except InputError as error:
        raise InputError(f"{where} {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {getattr(error, 'msg', error)}") from error
    if not isinstance(entry, dict):
        raise InputError(f"{where} is {shown(entry)}: it must be a JSON object")
    if not is_int(entry.get("id")) and not isinstance(entry.get("id"), str):
        raise InputError(
            f"{where} has the id {shown(entry['id'])}: it must be a text or a whole number"
            if "id" in entry
            else f"{where} has no id: give each prompt one of its own"
        )
    return entry


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, also one within another; `json` would take the last of equal keys and say
    nothing.
    """
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise InputError(f"has the key {shown(key)} more than once: leave one")
        seen.add(key)
    return dict(pairs)


def _line(item: Item, completions: list[Completion]) -> bytes:
    """A result; in ASCII, where nothing within can be taken for the end of a line."""
    texts = [
        {"text": c.text, "finish_reason": c.finish_reason, "new_tokens": len(c.token_ids)}
        for c in completions
    ]
    result = {
        "id": item.id,
        "prompt_hash": item.prompt_hash,
        "prompt_tokens": completions[0].prompt_tokens,
        "completions": texts,
    }
    return json.dumps(result).encode() + b"\n"


def _progress_bar(rows: int) -> Any:
    """On a terminal only; every finished row counts, written or not."""
    return tqdm(total=rows, unit="completion", miniters=0, dynamic_ncols=True, disable=None)
