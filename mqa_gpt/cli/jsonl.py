"""The files of the `batch` command: prompts and results as JSON Lines."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mqa_gpt.cli.input import name_of, read_text
from mqa_gpt.errors import InputError, is_int, shown
from mqa_gpt.generation.completion import Completion
from mqa_gpt.generation.prompts import Options

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two runs on one output apart
    fcntl = None  # type: ignore[assignment]

MAX_INPUT_BYTES = 100_000_000  # prompts are all held in memory, as text and as tokens

RESULT_BEGINS = b'{"id": '

PROMPT_KEYS = ("id", "task_id", "prompt", "prefix", "suffix")

# What a line may say for itself; null is the same as nothing.
LINE_OPTIONS = (
    "max_new_tokens",
    *(name for name in Options.__annotations__ if name not in ("logprobs", "draft")),
)


@dataclass
class Item:
    """One line of the input.

    Attributes:
        line: its number.
        id: what its result is found by.
        prompt: a text, or (prefix, suffix) to infill.
        own_options: those that the line itself holds.
        options: all options that decide its result.
        truncated: whether its prompt is cut to fit into the context.
    """

    line: int
    id: int | str
    prompt: str | tuple[str, str]
    own_options: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    truncated: bool = False

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"line {self.line} (id {shown(self.id)})"

    @property
    def is_infilling(self) -> bool:
        """Whether there is a hole to fill."""
        return isinstance(self.prompt, tuple)

    @property
    def prompt_hash(self) -> str:
        """The first 16 digits of the SHA-256 of the prompt, or of the list of prefix and suffix,
        as `json.dumps` writes it.
        """
        return hashlib.sha256(json.dumps(self.prompt).encode()).hexdigest()[:16]


class Found(NamedTuple):
    """An earlier result: its line, and what it is the result of."""

    line: int
    prompt_hash: object
    options: dict[str, Any]


class Results(NamedTuple):
    """The state of an output when it is opened.

    Attributes:
        file: opened for appending.
        path: its path.
        found: the results it holds, by their ids.
        torn: the length in bytes of a half-written last line.
        lacks_newline: whether the last line is complete except for its newline.
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


def read_items(path: str) -> tuple[list[Item], list[str]]:
    """The prompts of a file, and the keys in it that have no effect.

    The path "-" is standard input. Empty lines do not count.

    Raises:
        InputError: a file or line that cannot be used, or an id that comes twice.
    """
    items: dict[int | str, Item] = {}
    without_effect: dict[str, None] = {}
    for number, line in enumerate(read_text(path, MAX_INPUT_BYTES).split("\n"), 1):
        if not line.strip():
            continue
        where = f"line {number} of {name_of(path)}"
        entry = _parse(line, where)
        item = Item(number, _id(entry, where), _prompt(entry, where))
        if item.id in items:
            raise InputError(f"{where} has the id {shown(item.id)} of line {items[item.id].line}")
        if "n" in entry:
            raise InputError(f"{where} sets n, which only --n can set")
        item.own_options.update(
            {name: entry[name] for name in LINE_OPTIONS if entry.get(name) is not None}
        )
        without_effect |= dict.fromkeys(entry.keys() - {*PROMPT_KEYS, *LINE_OPTIONS})
        items[item.id] = item
    return list(items.values()), sorted(without_effect)


def _id(entry: dict[str, Any], where: str) -> int | str:
    """What identifies a line: its "id", or as benchmarks call it its "task_id"."""
    key = "id" if "id" in entry else "task_id"
    if key not in entry:
        raise InputError(f"{where} has no id: give each prompt one of its own")
    id_ = entry[key]
    if not is_int(id_) and not isinstance(id_, str):
        raise InputError(f"{where} has the {key} {shown(id_)}: it must be a text or a whole number")
    return id_


def _prompt(entry: dict[str, Any], where: str) -> str | tuple[str, str]:
    """A text to continue, or the texts around a hole, of which benchmarks call one "prompt"."""
    keys = [key for key in ("prompt", "prefix", "suffix") if key in entry]
    for key in keys:
        if not isinstance(entry[key], str):
            raise InputError(f"{where} has the {key} {shown(entry[key])}: it must be a text")
    if keys == ["prompt"]:
        return str(entry["prompt"])
    if len(keys) == 2 and keys[1] == "suffix":
        return entry[keys[0]], entry["suffix"]
    raise InputError(
        f"{where} holds {' and '.join(keys) or 'nothing to complete'}: it must hold a prompt, or a "
        "prefix and a suffix"
    )


@contextmanager
def open_output(path: str, input_path: str) -> Iterator[BinaryIO]:
    """The output, created if it is missing, locked for reading and appending.

    If it was created here and an error comes before the first result, it is removed again.

    Raises:
        InputError: it cannot be written, is the input, or another run is writing it.
    """
    if path == "-":
        raise InputError("the output is -: name a file, which a later run can continue")
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
            raise InputError(
                f"another run is writing {name}: wait until it ends or name another file"
            )
        yield file
    except BaseException:
        with suppress(OSError):  # Windows removes no open file
            # Not by `seek`, which would flush once more what a full disk has just refused.
            if not existed and not os.fstat(file.fileno()).st_size:
                output.resolve().unlink()
        raise
    finally:
        with suppress(OSError):  # flushing has reported it already
            file.close()


def _lock(file: BinaryIO, path: Path) -> bool:
    """Lock the file until it is closed; False if another run holds it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    # The run that held the lock may have removed the file; results in it would be lost.
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


def read_results(file: BinaryIO, path: str, items: Sequence[Item]) -> Results:
    """The results that an output holds; a half-written last line does not count.

    Raises:
        InputError: the file holds anything but results of these items, each once.
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
        if not entry.keys() >= {"id", "prompt_hash", "options", "completions"} or not isinstance(
            entry["options"], dict
        ):
            raise InputError(f"{where} is not a result of this command: name another file")
        id_ = _id(entry, where)
        if id_ in found:
            raise InputError(f"{where} has the id {shown(id_)} of line {found[id_].line}")
        if id_ not in known:
            raise InputError(
                f"{where} has the id {shown(id_)}, which the input does not have: give each input "
                "an output of its own"
            )
        found[id_] = Found(number, entry["prompt_hash"], entry["options"])
    return Results(
        file=file,
        path=path,
        found=found,
        torn=len(last) if torn else 0,
        lacks_newline=bool(last) and not torn,
    )


def require_same(results: Results, items: Sequence[Item], *, force: bool) -> None:
    """Raise InputError if an earlier result is of another prompt, or of other options.

    Args:
        items: the input, with all options.
        force: accept other options.
    """
    for item in items:
        found = results.found.get(item.id)
        if found is None:
            continue
        where = f"line {found.line} of the output {shown(results.path)} (id {shown(item.id)})"
        if found.prompt_hash != item.prompt_hash:
            raise InputError(
                f"{where} has the prompt_hash {shown(found.prompt_hash)} where that of the input's "
                f"prompt is {item.prompt_hash!r}: continue with the same input, or name another "
                "output"
            )
        names = [*item.options, *(found.options.keys() - item.options.keys())]
        for name in names:
            old, new = found.options.get(name), item.options.get(name)
            if old != new and not force:
                raise InputError(
                    f"{where} was written with {shown(name)[1:-1]}={shown(old)} and this run has "
                    f"{shown(new)}: continue with the same options, add --force to mix them, or "
                    "name another output"
                )


def _is_torn(last: bytes) -> bool:
    """Whether the text after the last newline is the beginning of a result, to be replaced.

    A complete result lacks only its newline, and what another program wrote is never cut off.
    """
    if not last or not (last.startswith(RESULT_BEGINS) or RESULT_BEGINS.startswith(last)):
        return False
    try:
        json.loads(last)
    except (ValueError, RecursionError):
        return True
    return False


def _parse(line: str, where: str) -> dict[str, Any]:
    """A line's JSON object."""
    try:
        entry = json.loads(line, object_pairs_hook=_with_unique_keys)
    except InputError as error:
        raise InputError(f"{where} {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {getattr(error, 'msg', error)}") from error
    if not isinstance(entry, dict):
        raise InputError(f"{where} is {shown(entry)}: it must be a JSON object")
    return entry


def _with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object at any depth; `json` itself takes the last of equal keys silently."""
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise InputError(f"has the key {shown(key)} more than once: leave one")
        seen.add(key)
    return dict(pairs)


def result_line(item: Item, completions: Sequence[Completion]) -> bytes:
    """A result as a line in ASCII, which no program splits within."""
    result: dict[str, Any] = {
        "id": item.id,
        "prompt_hash": item.prompt_hash,
        "prompt_tokens": completions[0].prompt_tokens,
        "options": item.options,
        "completions": [
            {"text": c.text, "finish_reason": c.finish_reason, "new_tokens": len(c.token_ids)}
            for c in completions
        ],
    }
    if item.truncated:
        result["truncated"] = True
    return json.dumps(result).encode() + b"\n"
