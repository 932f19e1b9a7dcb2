"""Infilling measured: what counts, and that a killed run is continued with the same result."""

from __future__ import annotations

from pathlib import Path

import pytest

from mqa_gpt import LLM
from mqa_gpt.errors import InputError
from mqa_gpt.evaluation import infilling
from mqa_gpt.evaluation.completing import complete, solution_bits
from mqa_gpt.evaluation.infilling import evaluate_infilling, summarize
from mqa_gpt.evaluation.records import Records, open_records
from mqa_gpt.evaluation.tasks import Task
from mqa_gpt.generation.completion import Completion

pytest.importorskip("rapidfuzz", reason="rapidfuzz is not installed")

CODE = "def add(first, second):\n    return first + second\n"
TASKS = [
    Task(f"{kind}/{i}", CODE[:i], CODE[i + 6 :], CODE[i : i + 6], kind=kind)
    for kind in ("a", "b")
    for i in (4, 9, 20, 30)
]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load(device="cpu", dtype="float32")


def test_fillings_are_compared_with_what_was_there(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = iter([" add\n", "abd", "", "xyz"])
    # The second "stop" is that of a stop string.
    ends = iter([([300, 0], "stop"), ([300], "length"), ([300], "stop"), ([300], "length")])
    monkeypatch.setattr(
        infilling,
        "complete",
        lambda _, tasks, *__, **___: ([Completion(next(texts), *next(ends), 3)] for _ in tasks),
    )
    tasks = [Task(i, "x", "y", "add", kind="k") for i in range(4)]
    (found,) = evaluate_infilling(llm, tasks, 8, modes=["psm"])
    bits = found.pop("bits_per_byte")
    assert found == {
        "kind": "k",
        "mode": "psm",
        "holes": 4,
        "exact_match": 0.25,
        "exact_match_error": 0.25,
        "edit_similarity": pytest.approx((1 + 2 / 3) / 4),
        "edit_similarity_error": pytest.approx(0.25),
        "ended": 0.25,
    }
    expected = sum(solution_bits(llm, tasks, 8)) / (4 * len("add"))
    assert bits == pytest.approx(expected, rel=1e-5)


def test_kinds_and_orders_are_averaged_apart() -> None:
    def one(kind: str, mode: str, exact: bool) -> dict[str, object]:
        figures = {"exact_match": exact, "edit_similarity": 0.5, "ended": True}
        return {"kind": kind, "mode": mode, "solution": "ää", "solution_bits": 6.0, **figures}

    found = summarize([one("a", "psm", True), one("a", "spm", False), one("a", "psm", False)])
    assert [(row["mode"], row["holes"], row["exact_match"]) for row in found] == [
        ("psm", 2, 0.5),
        ("spm", 1, 0.0),
    ]
    assert found[0]["bits_per_byte"] == 1.5
    assert found[1]["exact_match_error"] is None


def test_a_filling_that_a_stop_string_cuts_is_not_ended_by_the_model(llm: LLM) -> None:
    (plain,) = next(complete(llm, TASKS[:1], 8))
    assert plain.text
    records = Records()
    stop = plain.text[0]
    evaluate_infilling(llm, TASKS[:1], 8, modes=["psm"], records=records, stop=stop)
    assert [(one["completion"], one["ended"]) for one in records.found] == [("", False)]


@pytest.mark.slow
@pytest.mark.parametrize("killed_after", [0, 1, 7, 8, 9, 15, 16])
def test_a_killed_run_is_continued_with_the_same_result(
    llm: LLM, killed_after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(infilling, "CHUNK", 3)
    whole = Records()
    expected = evaluate_infilling(llm, TASKS, 8, records=whole, batch_size=3)
    calls: list[int] = []

    def advance(done: int, total: int) -> None:
        calls.append(done)
        if done == killed_after:
            raise KeyboardInterrupt

    if killed_after:
        with pytest.raises(KeyboardInterrupt), open_records(tmp_path, "fillings", {}) as records:
            evaluate_infilling(llm, TASKS, 8, records=records, batch_size=3, advance=advance)
    with open_records(tmp_path, "fillings", {}) as records:
        assert len(records.found) == killed_after
        assert evaluate_infilling(llm, TASKS, 8, records=records, batch_size=3) == expected
    assert records.found == whole.found


def test_what_is_no_infilling_task_is_refused(llm: LLM) -> None:
    for task, missing in ((Task("a", "x"), "suffix"), (Task("a", "x", "y"), "canonical_solution")):
        with pytest.raises(InputError, match=f"task 'a' has no {missing}"):
            evaluate_infilling(llm, [task], 8)
    with pytest.raises(InputError, match="mode is 'fim'"):
        evaluate_infilling(llm, TASKS, 8, modes=["fim"])
