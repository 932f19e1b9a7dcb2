"""`check` of the lessons prints one line and never raises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "docs/lessons"))
    from checks import checker

    def _double(f):
        got = f(3)
        return None if got == 6 else f"for 3 it gives {got}; expected 6"

    def _ones(f):
        torch.testing.assert_close(f(2), torch.ones(2))

    return checker(double=(_double, "Twice as much."), ones=(_ones, "All the same."))


def test_a_right_function_is_told_what_it_means(check, capsys):
    def double(x):
        return 2 * x

    assert check(double) is True
    assert capsys.readouterr().out == "double: right. Twice as much.\n"


def test_a_wrong_function_gets_the_hint(check, capsys):
    def double(x):
        return x

    assert check(double) is None
    assert capsys.readouterr().out == "double: for 3 it gives 3; expected 6\n"


def test_a_stub_is_not_yet_done_however_it_is_compared(check, capsys):
    def double(x):
        pass

    def ones(n):
        pass

    assert check(double) is None
    assert check(ones) is None
    for line in capsys.readouterr().out.splitlines():
        assert line.endswith(": not yet: it returns None; write its body, and return the result")


def test_what_a_function_raises_is_said_in_one_line(check, capsys):
    def double(x):
        raise TypeError("one\ntwo")

    def ones(n):
        return torch.zeros(n)

    assert check(double) is None
    assert capsys.readouterr().out == "double: not yet: it raises TypeError: one two\n"
    assert check(ones) is None
    line = capsys.readouterr().out
    assert line.startswith("ones: not yet: Tensor-likes are not close!")
    assert line.count("\n") == 1


def test_a_function_without_an_exercise_is_told_which_there_are(check, capsys):
    def triple(x):
        return 3 * x

    assert check(triple) is None
    assert capsys.readouterr().out == (
        "triple: no exercise has this name; there are double, ones\n"
    )
