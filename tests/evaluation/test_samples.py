"""Samples of tasks: written for the public harnesses, read from anybody, run with their tests."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mqa_gpt import LLM
from mqa_gpt.errors import InputError
from mqa_gpt.evaluation.execution import Limits
from mqa_gpt.evaluation.records import Records, open_records
from mqa_gpt.evaluation.samples import FUNCTION_ENDS, read_samples, run_samples, write_samples
from mqa_gpt.evaluation.tasks import Task

CHECK = "def check(candidate):\n    assert candidate(1, 2) == 3\n"
TASKS = [
    Task("add", "def add(a, b):\n", test=CHECK, entry_point="add"),
    Task("hole", "def f(a, b):\n", "    return c\n", test=CHECK, entry_point="f"),
]
QUICK = Limits(timeout=20)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load(device="cpu", dtype="float32")


@pytest.mark.slow
@pytest.mark.parametrize("killed_after", [2, 4])
def test_a_killed_run_writes_the_same_samples_in_the_end(
    llm: LLM, killed_after: int, tmp_path: Path
) -> None:
    tasks = [Task(i, f"def f{i}(x):\n", kind="k") for i in range(3)]
    options: dict[str, Any] = {"n": 2, "temperature": 1.0, "seed": 3, "stop": FUNCTION_ENDS}
    whole = Records()
    write_samples(llm, tasks, 8, records=whole, **options)

    def advance(done: int, total: int) -> None:
        assert total == 6
        if done == killed_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), open_records(tmp_path, "samples", {}, 2) as records:
        write_samples(llm, tasks, 8, records=records, advance=advance, **options)
    with (tmp_path / "samples.jsonl").open("a") as file:  # killed while the second was written
        file.write('{"task_id": 2, "completion": "x"}\n{"task')
    with open_records(tmp_path, "samples", {}, 2) as records:
        assert write_samples(llm, tasks, 8, records=records, **options) == whole.found
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert lines == whole.found
    assert [line["task_id"] for line in lines] == [0, 0, 1, 1, 2, 2]
    assert len({line["completion"] for line in lines}) > 3
    assert [sample["completion"] for sample in read_samples(tmp_path / "samples.jsonl")] == [
        line["completion"] for line in lines
    ]


@pytest.mark.skipif(os.name != "posix", reason="there are no limits on this system")
def test_samples_run_with_the_tests_of_their_tasks() -> None:
    completions = ["    return a + b", "    return a", "    import os; os._exit(0)"]
    samples = [{"task_id": "add", "completion": text} for text in completions]
    samples.append({"task_id": "hole", "completion": "    c = a + b\n"})
    found = run_samples(TASKS, samples, QUICK, workers=2)
    assert [one["passed"] for one in found] == [True, False, False, True]
    assert found[1]["result"] == "failed: AssertionError"
    assert found[2]["result"].startswith("failed: exit with status 0")
    assert [one["completion"] for one in found[:3]] == completions
    assert {"memory", "time"} <= set(found[0]["protections"])

    records = Records()
    records.found = [{"an": "earlier result"}] * 3
    assert run_samples(TASKS, samples, QUICK, records=records)[3] == found[3]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([{"task_id": "add", "completion": ""}], "1 of 2 tasks have no sample, such as 'hole'"),
        (
            [{"task_id": i, "completion": ""} for i in ("add", "hole", "else")],
            "there is no task 'else'",
        ),
        ([{"task_id": i, "completion": None} for i in ("add", "hole")], "no completion to run"),
    ],
)
def test_samples_that_do_not_fit_the_tasks_are_refused(
    samples: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run_samples(TASKS, samples, QUICK)


def test_a_task_without_a_test_is_not_run() -> None:
    with pytest.raises(InputError, match="task 'add' has no test"):
        run_samples([Task("add", "x")], [{"task_id": "add", "completion": ""}], QUICK)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"task_id": 1}', "has no completion"),
        ('{"task_id": 1, "completion": 3}', "the completion 3"),
        ('{"completion": ""}', "has no task_id"),
        ('{"task_id": 1, "passed": 1}', "passed 1: expected a boolean"),
        ("", "holds no samples"),
    ],
)
def test_a_line_that_is_no_sample_is_refused(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "samples.jsonl").write_text(line)
    with pytest.raises(InputError, match=message):
        read_samples(tmp_path / "samples.jsonl")


def test_results_of_a_harness_need_no_completion(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('{"task_id": "a", "passed": true, "result": "x"}\n')
    assert read_samples(tmp_path / "results.jsonl") == [
        {"task_id": "a", "passed": True, "completion": None}
    ]
