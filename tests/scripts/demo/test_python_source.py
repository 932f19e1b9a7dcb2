"""The demo's evaluation reads Python: signatures, bodies and statements of one line."""

from __future__ import annotations

import ast

import pytest
from python_source import function_body, one_line_statements, parsed_body, signatures

SOURCE = '''\
"""A module whose text says def: def no_function():
    def none_here_either():
"""
import os  # def nor_here():
definitely = {
def_ault: 1,
  }

@decorator(
    1)
def plain(a, b=")"):  # def in a comment
    """Doc."""

    def inner(x): \t
        return [
x, "ä # no comment"
        ]
# a comment at the margin

    return inner

def one_line(x): return x[1:]

class A:
    async def method(
        self,
        size: int = -1,
    ) -> list[int]:

        text = """
def not_me():
"""
        if size: pass; size = 1
        return \\
            [text]
'''


def test_signatures_are_found_for_functions_whose_body_is_on_its_own_lines() -> None:
    found = list(signatures(SOURCE))
    assert [signature.text for signature in found] == [
        'def plain(a, b=")"):  # def in a comment\n',
        "    def inner(x): \t\n",
        "    async def method(\n        self,\n        size: int = -1,\n    ) -> list[int]:\n",
    ]
    for signature in found:
        assert SOURCE.startswith(signature.before)
        assert signature.before.endswith(signature.text)


def test_before_statement_and_after_join_to_the_text() -> None:
    holes = list(one_line_statements(SOURCE))
    assert [statement for _, statement, _ in holes] == [
        "import os  # def nor_here():",
        'def plain(a, b=")"):  # def in a comment',
        "def inner(x): \t",
        "return inner",
        "def one_line(x): return x[1:]",
        "class A:",
        "if size: pass; size = 1",
    ]
    for hole in holes:
        assert "".join(hole) == SOURCE
        assert hole[0].endswith(("\n", "\n    ", "\n        "))
        assert hole[2].startswith("\n")


def test_a_last_line_without_a_line_break_is_a_statement_too() -> None:
    assert list(one_line_statements("a = 1\nb = 2")) == [
        ("", "a = 1", "\nb = 2"),
        ("a = 1\n", "b = 2", ""),
    ]


TOP = "def f(x):\n"
METHOD = "    async def f(\n        x\n    ):\n"


@pytest.mark.parametrize(
    ("signature", "text", "body"),
    [
        (TOP, "    return 1\n\n\ndef g():\n    pass\n", "    return 1\n\n\n"),
        (TOP, "    if x:\n\n        # deeper\n        y\n    z\nf(1)", None),
        (TOP, "    x\n# a comment at the margin\n    y\n", "    x\n"),
        (TOP, "return 1\n", ""),
        (METHOD, "        return 1\n\n    @property\n    def g(self):", "        return 1\n\n"),
        (METHOD, "        return 1\nclass B:\n", "        return 1\n"),
        (METHOD, "    return 1\n", ""),
    ],
)
@pytest.mark.parametrize("ended", [True, False])
def test_a_function_ends_before_the_first_line_indented_no_deeper_than_its_def(
    signature: str, text: str, body: str | None, ended: bool
) -> None:
    body = text.removesuffix("f(1)") if body is None else body
    assert function_body(signature, text, ended) == (body, True)


@pytest.mark.parametrize("signature", [TOP, METHOD])
def test_an_unfinished_function_loses_its_last_line(signature: str) -> None:
    text = "        x = 1\n\n        return x"
    assert function_body(signature, text, ended=False) == ("        x = 1\n\n", False)
    assert function_body(signature, text, ended=True) == (text, True)
    assert function_body(signature, "        x", ended=False) == ("", False)
    assert function_body(signature, "", ended=True) == ("", True)


@pytest.mark.parametrize("signature", [TOP, METHOD])
def test_a_function_that_parses_yields_its_statements(signature: str) -> None:
    body = (
        '        """Doc\nmore."""\n        def g():\n          a\n          b\n\n        return g'
    )
    types = [type(statement) for statement in parsed_body(signature + body)]
    assert types == [ast.Expr, ast.FunctionDef, ast.Return]


@pytest.mark.parametrize("signature", [TOP, METHOD])
@pytest.mark.parametrize(
    "body",
    [
        "",
        "        # only a comment\n",
        "        return (\n",
        '        """Never closed\n',
        "        if x:\n",
        "          x\n        y\n",
        "        x = '\0'\n",
        f"        {'-' * 9999}x\n",
        f"        {'not ' * 9999}x\n",
    ],
)
def test_a_function_that_does_not_parse_yields_nothing(signature: str, body: str) -> None:
    assert parsed_body(signature + body) == []
