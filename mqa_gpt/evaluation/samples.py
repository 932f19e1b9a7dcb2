"""Samples for tasks that are judged by running them, in the form of the public harnesses.

`write_samples` writes a line {"task_id": ..., "completion": ...} per sample, which OpenAI's
human-eval and human-eval-infilling score as well. `run_samples` runs them here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

from mqa_gpt.errors import InputError, require_int, shown
from mqa_gpt.evaluation.completing import complete
from mqa_gpt.evaluation.execution import Limits, run_programs
from mqa_gpt.evaluation.records import Records
from mqa_gpt.evaluation.tasks import Task, read_lines, task_id, text_of
from mqa_gpt.llm import LLM

# Before these a function has ended (Chen et al. 2021, section 2.3).
FUNCTION_ENDS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")

Advance = Callable[[int, int], None]


def write_samples(
    llm: LLM,
    tasks: Sequence[Task],
    max_new_tokens: int,
    *,
    n: int = 1,
    records: Records | None = None,
    advance: Advance = lambda done, total: None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Write n samples for each task.

    Args:
        records: what an earlier run has written, to be continued.
        advance: called with how many samples are done, and of how many.
        options: see `mqa_gpt.evaluation.completing.complete`.

    Returns:
        The records: "task_id", "completion", "finish_reason", and "left_out", the tokens of the
        prompt that did not fit into the context.

    Raises:
        InputError: an unusable option.
        CheckpointError: a task with a suffix, where the tokenizer has no infilling tokens.
    """
    records = Records() if records is None else records
    n = require_int(InputError, "n", n, 1)
    waiting = tasks[len(records.found) // n :]
    for task, samples in zip(
        waiting, complete(llm, waiting, max_new_tokens, n=n, **options), strict=True
    ):
        records.write(
            [
                {
                    "task_id": task.id,
                    "completion": sample.text,
                    "finish_reason": sample.finish_reason,
                    "left_out": list(sample.cut),
                }
                for sample in samples
            ]
        )
        advance(len(records.found), n * len(tasks))
    return records.found


def read_samples(path: str | PathLike[str]) -> list[dict[str, Any]]:
    """The samples of a file, written here or by another program.

    Each has "task_id" and "completion", and "passed" if a harness has run it.

    Raises:
        InputError: a file or line that cannot be used.
    """
    samples = []
    for where, entry in read_lines(path):
        sample: dict[str, Any] = {"task_id": task_id(entry, where)}
        if "passed" in entry:
            if not isinstance(entry["passed"], bool):
                raise InputError(f"{where} has passed {shown(entry['passed'])}: expected a boolean")
            sample["passed"] = entry["passed"]
        sample["completion"] = text_of(entry, "completion", where, required="passed" not in entry)
        samples.append(sample)
    if not samples:
        raise InputError(f"{shown(str(path))} holds no samples")
    return samples


def run_samples(
    tasks: Sequence[Task],
    samples: Sequence[Mapping[str, Any]],
    limits: Limits,
    *,
    workers: int = 1,
    records: Records | None = None,
    advance: Advance = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Run what a model wrote, with the tests of its tasks. Read docs/evaluation.md before.

    Args:
        samples: of every task; see `read_samples`.
        limits: of each run.
        workers: how many run at a time.
        records: what an earlier run has found, to be continued.
        advance: called with how many samples are done, and of how many.

    Returns:
        The samples in their order, each with "passed", "result" and "protections".

    Raises:
        InputError: a sample of no task, a task without a sample or a test, or a system that has no
            limits.
    """
    by_id = {task.id: task for task in tasks}
    missing = by_id.keys() - {sample["task_id"] for sample in samples}
    if missing:
        raise InputError(
            f"{len(missing):,} of {len(by_id):,} tasks have no sample, such as "
            f"{shown(min(missing, key=str))}: pass@k is over all tasks"
        )
    programs = []
    for sample in samples:
        task = by_id.get(sample["task_id"])
        if task is None:
            raise InputError(f"there is no task {shown(sample['task_id'])}, which has a sample")
        if sample["completion"] is None:
            raise InputError(f"a sample of task {shown(task.id)} has no completion to run")
        programs.append(task.program(sample["completion"]))
    records = Records() if records is None else records
    done = len(records.found)
    outcomes = run_programs(programs[done:], limits, workers=workers)
    for sample, outcome in zip(samples[done:], outcomes, strict=True):
        found = {"passed": outcome.passed, "result": outcome.result}
        records.write([{**sample, **found, "protections": list(outcome.protections)}])
        advance(len(records.found), len(samples))
    return records.found
