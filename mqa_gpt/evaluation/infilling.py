"""Measure infilling: how often, and how nearly, a model writes what was taken out."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mqa_gpt.errors import InputError, shown
from mqa_gpt.evaluation.completing import complete
from mqa_gpt.evaluation.metrics import edit_similarity, exact_match, mean_and_error
from mqa_gpt.evaluation.records import Records
from mqa_gpt.evaluation.tasks import Task
from mqa_gpt.fim import MODES, check_mode
from mqa_gpt.llm import LLM


def evaluate_infilling(
    llm: LLM,
    tasks: Sequence[Task],
    max_new_tokens: int,
    *,
    modes: Sequence[str] = MODES,
    records: Records | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Fill the holes of tasks and compare the fillings with what was there.

    Args:
        tasks: with suffix and solution.
        modes: the orders of infilling, each of which fills every hole.
        records: what an earlier run has written, to be continued.
        advance: called with how many fillings are done, and of how many.
        options: see `mqa_gpt.evaluation.completing.complete`.

    Returns:
        One entry for each kind of task and mode, see `summarize`.

    Raises:
        InputError: a task without a hole or solution, or an unusable option.
        CheckpointError: the tokenizer has no infilling tokens.
    """
    for task in tasks:
        if task.suffix is None or task.solution is None:
            missing = "suffix" if task.suffix is None else "canonical_solution"
            raise InputError(f"task {shown(task.id)} has no {missing}: it is no infilling task")
    for mode in modes:
        check_mode(mode)
    edit_similarity("", "")  # fail early where rapidfuzz is missing
    records = Records(None, {}) if records is None else records
    total = len(modes) * len(tasks)
    for number, mode in enumerate(modes):
        waiting = tasks[max(0, len(records.found) - number * len(tasks)) :]
        samples = complete(llm, waiting, max_new_tokens, mode=mode, **options)
        for task, (filling,) in zip(waiting, samples, strict=True):
            assert task.solution is not None
            entry: dict[str, Any] = {"task_id": task.id, "kind": task.kind, "mode": mode}
            entry |= {"completion": filling.text, "solution": task.solution}
            entry["exact_match"] = exact_match(filling.text, task.solution)
            entry["edit_similarity"] = edit_similarity(filling.text, task.solution)
            entry["ended"] = filling.finish_reason == "stop"
            records.write([entry | {"left_out": list(filling.cut)}])
            advance(len(records.found), total)
    return summarize(records.found)


def summarize(fillings: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over the fillings of each kind and mode.

    Returns:
        For each, "kind", "mode", "holes" and the means of "exact_match" and "edit_similarity", each
        with its standard error, and of "ended": fillings that the model itself has ended.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for one in fillings:
        groups.setdefault((one["kind"], one["mode"]), []).append(one)
    found = []
    for (kind, mode), group in groups.items():
        entry: dict[str, Any] = {"kind": kind, "mode": mode, "holes": len(group)}
        for name in ("exact_match", "edit_similarity"):
            mean, error = mean_and_error([float(one[name]) for one in group])
            entry |= {name: mean, f"{name}_error": error}
        entry["ended"] = statistics.fmean(one["ended"] for one in group)
        found.append(entry)
    return found
