"""TOML files whose errors name the file, the line where it is known, and the key:

configs/demo.toml:54: run.steps is "many": it must be an integer
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from mqa_gpt.errors import ConfigError

SECTION = re.compile(r"\s*\[\s*([\w.-]+)\s*\]\s*")
KEY = re.compile(r"\s*([\w.-]+)\s*=")
PLACE = re.compile(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", re.DOTALL)
NAMED = re.compile(r"\w+(\.\w+)*")  # how a message about a key begins

# Texts and comments, in which nothing is a key or a section. Texts of several lines come first.
TEXT = re.compile(
    r'"""(?:\\.|[^\\])*?"""' r"|'''.*?'''" r'|"(?:\\.|[^"\\\n])*"' r"|'[^'\n]*'|#[^\n]*", re.DOTALL
)


class TomlError(ConfigError):
    """An error about a TOML file, which its message names."""


class TomlFile(NamedTuple):
    """A file that was read.

    Attributes:
        values: its tables.
    """

    path: Path
    text: str
    values: dict[str, Any]

    def error(self, message: str) -> TomlError:
        """An error about the key that a message begins with, with the place of the key."""
        found = NAMED.match(message)
        line = None if found is None else self.line_of(found[0])
        return TomlError(f"{self.path}{'' if line is None else f':{line}'}: {message}")

    def line_of(self, key: str) -> int | None:
        """The line of a dotted key or of a table; None where the file has none."""
        section, of_table = "", None
        bare = TEXT.sub(lambda found: "\n" * found[0].count("\n"), self.text)
        for number, line in enumerate(bare.split("\n"), 1):
            if found := SECTION.fullmatch(line):
                section = found[1] + "."
                if found[1] == key:
                    of_table = number
            elif found := KEY.match(line):
                name = section + found[1]
                if name == key or key.startswith(f"{name}."):  # a table in one line
                    return number
        return of_table


def read_toml(path: Path) -> TomlFile:
    """A TOML file.

    Raises:
        TomlError: it cannot be read, or is not TOML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise TomlError(f"{path} cannot be read ({error.strerror}): name a TOML file") from None
    except UnicodeDecodeError:
        raise TomlError(f"{path}: not TOML: not UTF-8") from None
    try:
        return TomlFile(path, text, tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        found = PLACE.fullmatch(str(error))
        what = str(error) if found is None else found[1]
        end = text.rstrip("\n").count("\n") + 1
        line = end if found is None or found[2] is None else found[2]
        raise TomlError(f"{path}:{line}: not TOML: {what[0].lower()}{what[1:]}") from None
