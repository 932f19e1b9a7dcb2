"""What the command line reads: prompts, files, the hole in them, lists of numbers."""

from __future__ import annotations

import re
import sys
from contextlib import nullcontext
from pathlib import Path

from mqa_gpt.errors import InputError, PromptError, shown

MARKER = "<FILL>"

MAX_TEXT_BYTES = 10_000_000  # many times any model's context; a device such as /dev/zero has no end


def prompt_texts(arguments: list[str], files: list[str]) -> dict[str, str]:
    """The prompts by the names that messages call them: arguments and files, else standard input.

    A file's name is its path, an argument's "prompt 0", "prompt 1", ...
    """
    if not arguments and not files:
        if sys.stdin is None or sys.stdin.isatty():
            raise PromptError(
                "there is no prompt: give one as an argument, with --file, or on standard input"
            )
        arguments = ["-"]
    named: dict[str, str] = {}
    for i, text in enumerate(arguments):
        named[f"prompt {i}"] = read_text("-") if text == "-" else text
    for file in files:
        name = name_of(file, quoted=False)
        named[name if name not in named else f"{name} ({len(named)})"] = read_text(file)
    return named


def read_text(path: str, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """A file's text without a byte order mark, else exactly as it is; "-" is standard input."""
    name = name_of(path)
    if not path:
        raise InputError(f"cannot read {name}: the file name is empty")
    if path == "-" and sys.stdin is None:
        raise PromptError("standard input is closed: give the text as an argument or in a file")
    try:
        with nullcontext(sys.stdin.buffer) if path == "-" else Path(path).open("rb") as stream:
            data = stream.read(max_bytes + 1)
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from error
    except ValueError as error:  # a lone surrogate or a NUL, which no file's name holds
        raise InputError(f"cannot read {name}: {error}") from error
    if len(data) > max_bytes:
        raise PromptError(f"{name} is larger than {max_bytes:,} bytes: give a part of it")
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{name} is not UTF-8 text: byte {data[error.start]:#04x} at offset {error.start}"
        ) from error


def name_of(path: str, *, quoted: bool = True) -> str:
    """How messages call a file; "-" is standard input."""
    if path == "-":
        return "standard input"
    return shown(path) if quoted or not path.isprintable() else path


def numbers(text: str, option: str) -> list[int]:
    """The numbers of an option that takes several, separated by commas."""
    if not re.fullmatch(r"\d{1,18}(,\d{1,18})*", text, re.ASCII):
        raise InputError(f"{option} is {shown(text)}: it must be a number, or several with commas")
    return [int(number) for number in text.split(",")]


def unescape(text: str) -> str:
    r"""A --stop text with \n, \t, \r and \\ replaced by what they stand for.

    Raises:
        PromptError: it is empty or not UTF-8.
    """
    is_text = not any("\ud800" <= letter <= "\udfff" for letter in text)  # bytes that are not
    if not text or not is_text:
        raise PromptError(f"--stop is {shown(text)}: it must be a text in UTF-8, not empty")
    escapes = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
    return re.sub(r"\\([ntr\\])", lambda match: escapes[match[1]], text)


def split_hole(
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
    text = read_text(file)
    if at is not None:
        return _split_at_position(text, at, name_of(file))
    return _split_at_marker(text, MARKER if marker is None else marker, name_of(file))


def _split_at_marker(text: str, marker: str, name: str) -> tuple[str, str]:
    if not marker:
        raise PromptError("--marker is empty: give the text that stands where the hole is")
    count = text.count(marker)
    if count != 1:
        found = f"{marker!r} {count} times" if count else f"no {marker!r}"
        raise PromptError(
            f"{name} contains {found}: mark one place with it, or give another --marker, or a "
            "position with --at LINE:COLUMN"
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
