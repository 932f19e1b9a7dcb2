"""Cut holes into code: infilling tasks from any folder, the same ones for the same seed.

The kinds are those of HumanEval-Infilling (Fried et al. 2022; Bavarian et al. 2022), drawn from
whole files instead of single functions:

    single-line    a line with its indentation and line break
    multi-line     2 to 5 such lines, with the blank ones between them
    random-span    1 to 200 characters from anywhere in a file
"""

from __future__ import annotations

import fnmatch
import os
import random
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, islice
from os import PathLike
from pathlib import Path

from mqa_gpt.errors import InputError, require_int, shown
from mqa_gpt.evaluation.tasks import Task

KINDS = ("single-line", "multi-line", "random-span")
MAX_LINES = 5
MAX_CHARACTERS = 200
MAX_FILE_BYTES = 1_000_000  # larger files are data or made by programs


def read_files(folder: str | PathLike[str], include: Sequence[str] = ("*",)) -> dict[str, str]:
    """The texts of a folder by their paths in it, in a fixed order.

    Hidden files and folders are left out, and so are links to folders, what is not UTF-8, holds a
    NUL, is blank or has more than a million bytes. Line breaks become "\\n".

    Args:
        include: patterns, one of which a path must fit; `*` stands for "/" too.

    Raises:
        InputError: there is no such folder, or nothing in it fits.
    """
    root = Path(folder)
    if not str(folder) or not root.is_dir():  # an empty name would be the current folder
        raise InputError(f"{shown(str(folder))} is not a folder: name one with code in it")
    texts = {}
    for place, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in sorted(files):
            path = Path(place, file)
            name = path.relative_to(root).as_posix()
            fits = any(fnmatch.fnmatchcase(name, pattern) for pattern in include)
            text = _read(path) if fits and not file.startswith(".") else None
            if text is not None:
                texts[name] = text
    if not texts:
        patterns = " or ".join(map(shown, include))
        raise InputError(f"{shown(str(folder))} holds no text files that fit {patterns}")
    return texts


def _read(path: Path) -> str | None:
    """A file's text, or None if it is not to be used."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
            return None
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return None
    return text.replace("\r\n", "\n") if text.strip() and "\0" not in text else None


def cut_holes(texts: dict[str, str], kind: str, count: int, seed: int = 0) -> list[Task]:
    """Infilling tasks of one kind, drawn at random from all places where there can be one.

    A hole is never blank. Single lines are drawn from all lines, the others by their first line or
    by a character in them, so that a long file gets more holes than a short one.

    Args:
        texts: by their names, as `read_files` gives them.
        kind: one of `KINDS`.
        count: how many holes; fewer are cut if there are fewer places.

    Returns:
        The tasks, whose ids say where they are: kind, file, begin and end in characters.

    Raises:
        InputError: an unknown kind or an unusable number, or there is no place for a hole.
    """
    if kind not in KINDS:
        raise InputError(f"holes are {shown(kind)}: expected one of {', '.join(KINDS)}")
    count = require_int(InputError, "count", count, 1)
    rng = random.Random(f"{require_int(InputError, 'seed', seed, -(2**63))} {kind}")
    names, ends = list(texts), list(accumulate(_places(kind, text) for text in texts.values()))
    total = ends[-1] if ends else 0
    if total == 0:
        raise InputError(f"the files have no place for a {kind} hole: name a folder with more code")
    tasks: dict[str | int, Task] = {}
    for place in rng.sample(range(total), min(count, total)):
        i = bisect_right(ends, place)
        text = texts[names[i]]
        begin, end = _hole(kind, text, place - (ends[i - 1] if i else 0), rng)
        id_ = f"{kind}/{names[i]}/{begin}-{end}"
        tasks[id_] = Task(id_, text[:begin], text[end:], text[begin:end], kind=kind)
    return list(tasks.values())


def _places(kind: str, text: str) -> int:
    """In how many places of a text there can be a hole."""
    if kind == "random-span":
        return sum(map(len, text.split()))
    lines = sum(not line.isspace() for line in text.split("\n") if line)
    return lines if kind == "single-line" else max(0, lines - 1)


def _hole(kind: str, text: str, place: int, rng: random.Random) -> tuple[int, int]:
    """Begin and end of the hole at one of the places."""
    if kind == "random-span":
        visible = (i for i, letter in enumerate(text) if not letter.isspace())
        size = rng.randint(1, MAX_CHARACTERS)
        begin = max(0, next(islice(visible, place, None)) - rng.randrange(size))
        return begin, min(begin + size, len(text))
    lines = [line + "\n" for line in text.split("\n")]  # the last one has none
    starts = [0, *accumulate(map(len, lines))]
    numbers = [i for i, line in enumerate(lines) if not line.isspace()]
    last = place if kind == "single-line" else place + rng.randint(1, MAX_LINES - 1)
    return starts[numbers[place]], min(starts[numbers[: last + 1][-1] + 1], len(text))
