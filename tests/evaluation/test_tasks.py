"""Files of tasks: what is read, what is refused, and the programs that are run."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from mqa_gpt.errors import InputError
from mqa_gpt.evaluation.tasks import Task, read_tasks
from tests.helpers import shared_data

ADD = {
    "task_id": "Own/add",
    "prompt": "def add(a, b):\n",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
    "entry_point": "add",
}


def written(path: Path, *entries: Any) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_a_task_has_what_its_line_says(tmp_path: Path) -> None:
    path = written(tmp_path / "tasks.jsonl", ADD, {"task_id": 7, "prompt": "x", "suffix": ""})
    first, second = read_tasks(path)
    assert first == Task(
        "Own/add", ADD["prompt"], None, ADD["canonical_solution"], ADD["test"], "add", "Own"
    )
    assert second == Task(7, "x", "", kind="7")
    packed = tmp_path / "tasks.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_tasks(packed) == [first, second]


def test_the_program_is_the_completed_code_its_test_and_the_call() -> None:
    task = Task("a", "def f():\n", "\nx = 1\n", test="def check(c): c()\n", entry_point="f")
    exec(task.program("    return 1"), {})
    with pytest.raises(ZeroDivisionError):
        exec(task.program("    1 / 0"), {})
    with pytest.raises(InputError, match="task 'a' has no test"):
        Task("a", "", entry_point="f").program("")
    with pytest.raises(InputError, match="task 'a' has no entry_point"):
        Task("a", "", test="").program("")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 of .* is not JSON"),
        ("[1]", "it must be a JSON object"),
        ("[" * 100_000, "is not JSON"),
        ('{"prompt": "x"}', "has no task_id"),
        ('{"task_id": true, "prompt": "x"}', "the task_id True"),
        ('{"task_id": 1}', "has no prompt"),
        ('{"task_id": 1, "prompt": 2}', "the prompt 2: it must be a text"),
        ('{"task_id": 1, "prompt": "x", "suffix": 2}', "the suffix 2"),
        ('{"task_id": 1, "prompt": "\\ud800"}', "half of a surrogate pair"),
        ('{"task_id": "Own/add", "prompt": "x"}', "of an earlier line"),
    ],
)
def test_a_line_that_is_no_task_is_refused(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps(ADD) + "\n" + line)
    with pytest.raises(InputError, match=message):
        read_tasks(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_tasks(tmp_path / "missing")
    with pytest.raises(InputError, match="Is a directory"):
        read_tasks(tmp_path)
    with pytest.raises(InputError, match="holds no tasks"):
        read_tasks(written(tmp_path / "empty"))
    packed = gzip.compress(json.dumps(ADD).encode())
    for data in (packed[:-9], packed[:20] + b"xxxx" + packed[24:]):
        (tmp_path / "torn.gz").write_bytes(data)
        with pytest.raises(InputError, match=r"is damaged|cannot read|not JSON"):
            read_tasks(tmp_path / "torn.gz")


@pytest.mark.parametrize("name", ["HumanEval", "HumanEval-SingleLineInfilling"])
def test_the_published_files_are_read(name: str) -> None:
    tasks = read_tasks(shared_data(f"humaneval/{name}.jsonl.gz"))
    assert len(tasks) == (164 if name == "HumanEval" else 1033)
    assert {task.suffix is None for task in tasks} == {name == "HumanEval"}
    for task in tasks:
        assert task.solution in task.program(str(task.solution))
