"""What is counted: exact match and edit similarity of fillings, pass@k of samples."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mqa_gpt.errors import InputError, require_int
from mqa_gpt.machine import INSTALL_EVAL


def exact_match(text: str, expected: str) -> bool:
    """Whether two texts are the same, apart from white space at their ends.

    As in BigCode's infilling tasks (Ben Allal et al. 2023): whether a filling ends with the line
    break that its place needs is not what is asked.
    """
    return text.strip() == expected.strip()


def edit_similarity(text: str, expected: str) -> float:
    """1 - Levenshtein distance / length of the longer text, without white space at their ends.

    As in RepoCoder (Zhang et al. 2023); 1 for equal texts, 0 where no character agrees.

    Raises:
        InputError: rapidfuzz is not installed.
    """
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise InputError(f"edit similarity needs rapidfuzz: run {INSTALL_EVAL}") from error
    return Levenshtein.normalized_similarity(text.strip(), expected.strip())


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and its standard error; None for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    return mean, statistics.stdev(values) / math.sqrt(len(values))


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The chance that one of k samples passes, estimated without bias from more of them.

    1 - C(n - c, k) / C(n, k) for n samples of which c are correct (Chen et al. 2021, equation 1).

    Raises:
        InputError: k is not from 1 to n, or c not from 0 to n.
    """
    n = require_int(InputError, "samples", samples, 1)
    c = require_int(InputError, "correct", correct, 0, n)
    k = require_int(InputError, "k", k, 1, n)
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def summarize_passes(passed: Mapping[Any, Sequence[bool]], ks: Sequence[int]) -> dict[str, Any]:
    """pass@k over tasks, for each k such that every task has at least k samples.

    Args:
        passed: by task, whether each of its samples passed.

    Returns:
        "tasks", "samples", "passed"; "samples_per_task": the fewest and the most; "pass_at_k": by
        k as a text, the mean over tasks and its standard error.

    Raises:
        InputError: no samples, or too few for every k.
    """
    if not passed:
        raise InputError("there are no samples")
    counts = [len(one) for one in passed.values()]
    possible = [k for k in ks if k <= min(counts)]
    if not possible:
        raise InputError(
            f"a task has {min(counts)} samples, fewer than every k of {', '.join(map(str, ks))}: "
            "ask for a smaller k or write more samples"
        )
    found = {}
    for k in possible:
        values = [pass_at_k(len(one), sum(one), k) for one in passed.values()]
        found[str(k)] = dict(zip(("mean", "error"), mean_and_error(values), strict=True))
    return {
        "tasks": len(counts),
        "samples": sum(counts),
        "samples_per_task": [min(counts), max(counts)],
        "passed": sum(map(sum, passed.values())),
        "pass_at_k": found,
    }
