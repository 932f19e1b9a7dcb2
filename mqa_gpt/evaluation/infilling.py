"""Measure infilling: how often, and how nearly, a model writes what was taken out."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mqa_gpt.errors import InputError, shown
from mqa_gpt.evaluation.completing import complete, solution_bits
from mqa_gpt.evaluation.metrics import edit_similarity, exact_match, mean_and_error
from mqa_gpt.evaluation.records import Records
from mqa_gpt.evaluation.tasks import Task
from mqa_gpt.fim import MODES, check_mode
from mqa_gpt.generation.completion import Completion
from mqa_gpt.llm import BATCH_SIZE, LLM

CHUNK = 256  # holes that are scored and filled before the next ones


def evaluate_infilling(
    llm: LLM,
    tasks: Sequence[Task],
    max_new_tokens: int,
    *,
    modes: Sequence[str] = MODES,
    prompt_tokens: int | None = None,
    batch_size: int = BATCH_SIZE,
    records: Records | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Fill the holes of tasks and compare the fillings with what was there.

    Args:
        tasks: with suffix and solution.
        modes: the orders of infilling, each of which fills every hole.
        max_new_tokens, prompt_tokens, batch_size, options: see
            `mqa_gpt.evaluation.completing.complete`.
        records: what an earlier run has written, to be continued.
        advance: called with how many fillings are done, and of how many.

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
    records = Records() if records is None else records
    total = len(modes) * len(tasks)
    end_ids = {*llm.tokenizer.special_ids, *llm.model.config.end_token_ids}
    shown_to_model: dict[str, Any] = {"prompt_tokens": prompt_tokens, "batch_size": batch_size}
    for number, first in itertools.product(range(len(modes)), range(0, len(tasks), CHUNK)):
        mode, chunk = modes[number], tasks[first : first + CHUNK]
        done = max(0, len(records.found) - number * len(tasks) - first)
        if done >= len(chunk):
            continue
        # Score the whole chunk again: other batches would round differently.
        bits = solution_bits(llm, chunk, max_new_tokens, mode=mode, **shown_to_model)[done:]
        waiting = chunk[done:]
        fillings = complete(llm, waiting, max_new_tokens, mode=mode, **shown_to_model, **options)
        for task, count, (filling,) in zip(waiting, bits, fillings, strict=True):
            # A stop string gives the reason "stop" too.
            ended = filling.finish_reason == "stop" and filling.token_ids[-1] in end_ids
            records.write([_record(task, mode, filling, ended, count)])
            advance(len(records.found), total)
    return summarize(records.found)


def _record(task: Task, mode: str, filling: Completion, ended: bool, bits: float) -> dict[str, Any]:
    """What is kept of a filling."""
    assert task.solution is not None
    return {
        "task_id": task.id,
        "kind": task.kind,
        "mode": mode,
        "completion": filling.text,
        "solution": task.solution,
        "exact_match": exact_match(filling.text, task.solution),
        "edit_similarity": edit_similarity(filling.text, task.solution),
        "ended": ended,
        "solution_bits": bits,
        "left_out": list(filling.cut),
    }


def summarize(fillings: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over the fillings of each kind and mode.

    Returns:
        For each, "kind", "mode", "holes"; the means of "exact_match" and "edit_similarity", each
        with its standard error; that of "ended", fillings that the model itself has ended; and
        "bits_per_byte" of what was taken out.
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
        size = sum(len(one["solution"].encode()) for one in group)
        entry["bits_per_byte"] = sum(one["solution_bits"] for one in group) / max(1, size)
        found.append(entry)
    return found
