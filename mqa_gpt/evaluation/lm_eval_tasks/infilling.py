"""What the task files in this folder call. The harness loads it by its path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mqa_gpt.errors import InputError
from mqa_gpt.evaluation.holes import cut_holes, read_files
from mqa_gpt.evaluation.metrics import edit_similarity, exact_match
from mqa_gpt.evaluation.tasks import read_tasks


def load(
    source: str | None = None,
    kind: str = "single-line",
    count: int = 100,
    seed: int = 0,
    include: Sequence[str] = ("*",),
    **_: Any,
) -> dict[str, Any]:
    """The split "test" of holes, as `--metadata` says.

    Raises:
        InputError: there is no such source, or it has no holes.
    """
    import datasets

    if source is None:
        raise InputError("""give a file or folder with --metadata '{"source": "PATH"}'""")
    if Path(source).is_dir():
        tasks = cut_holes(read_files(source, include), kind, count, seed)
    else:
        tasks = read_tasks(source)
    rows = [
        {"prompt": task.prefix, "suffix": task.suffix, "canonical_solution": task.solution}
        for task in tasks
    ]
    if any(value is None for row in rows for value in row.values()):
        raise InputError(f"{source} holds a task without suffix or canonical_solution")
    return {"test": datasets.Dataset.from_list(rows)}


def score(document: dict[str, str], results: list[str]) -> dict[str, float]:
    """The metrics of one filling."""
    expected = document["canonical_solution"]
    return {
        "exact_match": float(exact_match(results[0], expected)),
        "edit_similarity": edit_similarity(results[0], expected),
    }
