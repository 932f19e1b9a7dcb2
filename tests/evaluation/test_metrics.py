"""Exact match, edit similarity and pass@k against their definitions."""

from __future__ import annotations

import builtins
import itertools
import math
from typing import Any

import numpy as np
import pytest

from mqa_gpt.errors import InputError
from mqa_gpt.evaluation.metrics import (
    edit_similarity,
    exact_match,
    mean_and_error,
    pass_at_k,
    summarize_passes,
)


@pytest.mark.parametrize(
    ("text", "expected", "exact", "similarity"),
    [
        ("    return x\n", "    return x", True, 1.0),
        ("return x", "return y", False, 7 / 8),
        ("", "return", False, 0.0),
        ("", " \n", True, 1.0),
        ("kitten", "sitting", False, 1 - 3 / 7),
        ("a  b", "a b", False, 3 / 4),
    ],
)
def test_fillings_are_compared_without_white_space_at_their_ends(
    text: str, expected: str, exact: bool, similarity: float
) -> None:
    pytest.importorskip("rapidfuzz", reason="rapidfuzz is not installed")
    assert exact_match(text, expected) is exact
    assert edit_similarity(text, expected) == pytest.approx(similarity)


def test_a_missing_rapidfuzz_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name.startswith("rapidfuzz"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"needs rapidfuzz: run .*\[eval\]"):
        edit_similarity("a", "b")


def test_pass_at_k_is_the_share_of_all_subsets_with_a_sample_that_passes() -> None:
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            expected = sum(map(any, subsets)) / len(subsets)
            assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_equals_the_published_estimator_for_many_samples() -> None:
    for n, c, k in [(200, 1, 1), (200, 37, 10), (200, 3, 100), (1000, 0, 5), (1000, 999, 2)]:
        product = np.prod(1.0 - k / np.arange(n - c + 1, n + 1))
        assert pass_at_k(n, c, k) == pytest.approx(1.0 if n - c < k else 1 - product, abs=1e-12)
    for n, c, k in [(0, 0, 1), (2, 3, 1), (2, 1, 3), (2, 1, 0)]:
        with pytest.raises(InputError):
            pass_at_k(n, c, k)


def test_means_come_with_their_standard_error() -> None:
    assert mean_and_error([1.0, 0.0, 1.0, 0.0]) == (0.5, pytest.approx(math.sqrt(1 / 3) / 2))
    assert mean_and_error([0.25]) == (0.25, None)


def test_passes_are_averaged_over_tasks_not_over_samples() -> None:
    passed = {"a": [True, True], "b": [False, False, False, True]}
    found = summarize_passes(passed, [1, 2, 10])
    assert found["tasks"] == 2
    assert found["samples"] == 6
    assert found["passed"] == 3
    assert found["samples_per_task"] == [2, 4]
    assert {k: value["mean"] for k, value in found["pass_at_k"].items()} == {
        "1": (1 + 1 / 4) / 2,
        "2": pytest.approx((1 + 1 / 2) / 2),
    }
    with pytest.raises(InputError, match="fewer than every k of 10, 100"):
        summarize_passes(passed, [10, 100])
    with pytest.raises(InputError, match="there are no samples"):
        summarize_passes({}, [1])
