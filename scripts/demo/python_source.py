"""Python source: its signatures, the bodies of functions, and statements of one line."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from typing import NamedTuple


class Signature(NamedTuple):
    """A function's signature: the module's text up to its end, and the signature alone."""

    before: str
    text: str


def logical_lines(text: str) -> Iterator[list[tokenize.TokenInfo]]:
    """The tokens of each statement up to its NEWLINE, without comments and indentation."""
    line: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT):
            line.append(token)
        if token.type == tokenize.NEWLINE:
            yield line
            line = []


def signatures(text: str) -> Iterator[Signature]:
    """Every `def` of a module whose body is on lines of its own."""
    lines = io.StringIO(text).readlines()
    for tokens in logical_lines(text):
        words = [token.string for token in tokens]
        if (words[0] == "def" or words[:2] == ["async", "def"]) and words[-2] == ":":
            first, last = tokens[0].start[0], tokens[-1].start[0]
            yield Signature("".join(lines[:last]), "".join(lines[first - 1 : last]))


def function_body(signature: str, text: str, ended: bool) -> tuple[str, bool]:
    """The lines of `text` that belong to the function, and whether its end was reached."""
    indent = len(signature) - len(signature.lstrip())
    lines = io.StringIO(text).readlines()
    for i, line in enumerate(lines):
        if line.strip() and len(line) - len(line.lstrip()) <= indent:
            return "".join(lines[:i]), True
    return ("".join(lines), True) if ended else ("".join(lines[:-1]), False)


def parsed_body(function: str) -> list[ast.stmt]:
    """The statements of a function, or none if it does not parse."""
    try:
        tree = ast.parse("if True:\n" + function if function[0].isspace() else function)
    # ValueError: a null character; the last two: nested too deeply, such as a thousand minus signs
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    statement = tree.body[0]
    if isinstance(statement, ast.If):
        statement = statement.body[0]
    assert isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef)
    return statement.body


def one_line_statements(text: str) -> Iterator[tuple[str, str, str]]:
    """(before, statement, after) of every one-line statement but docstrings."""
    lines = io.StringIO(text).readlines()
    for tokens in logical_lines(text):
        first, last = tokens[0], tokens[-1]
        if first.start[0] == last.start[0] and first.type != tokenize.STRING:
            row, column = first.start
            line = lines[row - 1]
            statement = line[column:].rstrip("\n")
            before, after = "".join(lines[: row - 1]), "".join(lines[row:])
            yield before + line[:column], statement, line[column + len(statement) :] + after
