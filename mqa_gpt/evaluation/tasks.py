"""Tasks: a hole to fill or a text to continue, and what is expected there.

The files are those of OpenAI's HumanEval and HumanEval-Infilling, JSON Lines with the keys
`task_id`, `prompt`, `suffix` (infilling only), `canonical_solution`, `test` and `entry_point`.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from mqa_gpt.errors import InputError, shown

MAX_BYTES = 1 << 30  # of a file's text: what unpacks to more is no list of tasks
GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        id: unique in its collection.
        prefix: what comes before the completion.
        suffix: what comes after it; None for a text to continue.
        solution: what is expected; None if that is not known.
        test: code that defines `check(candidate)`; None if there is none.
        entry_point: the name that `check` is called with.
        kind: which tasks are averaged together.
    """

    id: str | int
    prefix: str
    suffix: str | None = None
    solution: str | None = None
    test: str | None = None
    entry_point: str | None = None
    kind: str = ""

    def program(self, completion: str) -> str:
        """The code that fails unless a completion passes the test, as the public harnesses run it.

        Raises:
            InputError: the task has no test.
        """
        if self.test is None or self.entry_point is None:
            missing = "test" if self.test is None else "entry_point"
            raise InputError(f"task {shown(self.id)} has no {missing}: it cannot be run")
        code = self.prefix + completion + (self.suffix or "")
        return f"{code}\n{self.test}\ncheck({self.entry_point})\n"


def read_tasks(path: str | PathLike[str]) -> list[Task]:
    """The tasks of a file in the form of HumanEval; `kind` is the id up to its first "/".

    Raises:
        InputError: a file or line that cannot be used, or an id that comes twice.
    """
    tasks: dict[str | int, Task] = {}
    for where, line in read_lines(path):
        task = _task(line, where)
        if task.id in tasks:
            raise InputError(f"{where} has the task_id {shown(task.id)} of an earlier line")
        tasks[task.id] = task
    if not tasks:
        raise InputError(f"{shown(str(path))} holds no tasks")
    return list(tasks.values())


def read_lines(path: str | PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON objects of a file of JSON Lines, packed by gzip or not, each with its place.

    Raises:
        InputError: it cannot be read, or a line is no JSON object.
    """
    name = shown(str(path))
    try:
        with Path(path).open("rb") as file:
            packed = file.peek(2)[:2] == GZIP
            with gzip.open(file) if packed else file as stream:
                data = stream.read(MAX_BYTES + 1)
    except (EOFError, zlib.error) as error:
        raise InputError(f"{name} is damaged: {error}") from error
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror or error}") from error
    except ValueError as error:  # a NUL, which no file's name holds
        raise InputError(f"cannot read {name}: {error}") from error
    if len(data) > MAX_BYTES:
        raise InputError(f"{name} holds more than {MAX_BYTES:,} bytes: split it")
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"line {number} of {name}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not JSON: {getattr(error, 'msg', error)}") from None
        if not isinstance(entry, dict):
            raise InputError(f"{where} is {shown(entry)}: it must be a JSON object")
        yield where, entry


def task_id(entry: dict[str, Any], where: str) -> str | int:
    """What a line is about.

    Raises:
        InputError: it has no id, or one that is neither a text nor a whole number.
    """
    id_ = entry.get("task_id")
    if isinstance(id_, str) or (isinstance(id_, int) and not isinstance(id_, bool)):
        return id_
    said = f"the task_id {shown(id_)}" if "task_id" in entry else "no task_id"
    raise InputError(f"{where} has {said}: it must be a text or a whole number")


def text_of(entry: dict[str, Any], key: str, where: str, *, required: bool = False) -> str | None:
    """A text of a line, or None where it has none.

    Raises:
        InputError: it is no text, cannot be written as UTF-8, or is required and missing.
    """
    value = entry.get(key)
    if value is None and not required:
        return None
    if not isinstance(value, str):
        said = f"the {key} {shown(value)}" if key in entry else f"no {key}"
        raise InputError(f"{where} has {said}: it must be a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where} has a {key} with half of a surrogate pair: remove it") from None
    return value


def _task(entry: dict[str, Any], where: str) -> Task:
    id_ = task_id(entry, where)
    prefix = text_of(entry, "prompt", where, required=True)
    assert prefix is not None
    return Task(
        id=id_,
        prefix=prefix,
        suffix=text_of(entry, "suffix", where),
        solution=text_of(entry, "canonical_solution", where),
        test=text_of(entry, "test", where),
        entry_point=text_of(entry, "entry_point", where),
        kind=str(id_).partition("/")[0],
    )
