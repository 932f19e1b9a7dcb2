"""`mqa-gpt evaluate` on the demo checkpoint and tasks of our own."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from mqa_gpt import LLM
from mqa_gpt.cli.app import app

TASK = {
    "task_id": "Own/add",
    "prompt": "def add(a, b):\n",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
    "entry_point": "add",
}
CODE = "import os\n\n\ndef add(first, second):\n    total = first + second\n    return total\n"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def lines(path: Path, *entries: object) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    return lines(tmp_path / "tasks.jsonl", TASK)


@pytest.mark.slow
def test_holes_of_a_folder_give_a_table_and_the_same_report_again(tmp_path: Path) -> None:
    pytest.importorskip("rapidfuzz", reason="rapidfuzz is not installed")
    code = tmp_path / "code"
    code.mkdir()
    (code / "a.py").write_text(CODE)
    command = ("infilling", code, "--count", "2", "--max-new-tokens", "8")
    table = run(*command, "--out", tmp_path / "out")
    assert table.exit_code == 0, table.output
    assert len(table.stdout.splitlines()) == 2 + 6
    assert "multi-line" in table.stdout
    assert "SPM" in table.stdout
    again = run(*command, "--out", tmp_path / "out", "--json")
    report, fresh = json.loads(again.stdout), json.loads(run(*command, "--json").stdout)
    assert report["results"] == fresh["results"]
    assert len(report["settings"].pop("checkpoint")) == 64
    assert report["settings"] == fresh["settings"]  # nothing is hashed that no run continues
    assert len(report["runs"]) == 2
    assert json.loads((tmp_path / "out/report.json").read_text())["results"] == report["results"]
    assert len((tmp_path / "out/fillings.jsonl").read_text().splitlines()) == 12
    other = run(*command, "--seed", "1", "--out", tmp_path / "out")
    assert other.exit_code == 2
    assert "seed (0 there, 1 here)" in other.stderr


@pytest.mark.slow
def test_tasks_are_sampled_and_the_samples_run(tmp_path: Path, tasks: Path) -> None:
    out = tmp_path / "samples"
    sampled = run(
        "tasks", tasks, "--out", out, "--n", "3", "--temperature", "0.8", "--max-new-tokens", "8"
    )
    assert sampled.exit_code == 0, sampled.output
    assert "3 samples of 1 tasks" in sampled.stdout
    written = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [sample["task_id"] for sample in written] == ["Own/add"] * 3

    short = run(
        "tasks", tasks, "--out", tmp_path / "short", "--n", "2", "--temperature", "1",
        "--max-new-tokens", "2", "--prompt-tokens", "4",
    )  # fmt: skip
    assert "note: 1 of 1 prompts did not fit" in short.stderr

    refused = run("pass-at-k", out)
    assert refused.exit_code == 2
    assert "have not been run" in refused.stderr
    if os.name == "posix":
        command = ("pass-at-k", out, "--tasks", tasks, "--timeout", "20", "--k", "1,3,9")
        passes = run(*command, "--allow-code-execution", "--out", tmp_path / "runs", "--json")
        assert passes.exit_code == 0, passes.output
        results = json.loads(passes.stdout)["results"]
        assert list(results["pass_at_k"]) == ["1", "3"]
        assert results["samples"] == 3
        assert len((tmp_path / "runs/results.jsonl").read_text().splitlines()) == 3


def test_a_harness_results_give_pass_at_k_without_running_anything(tmp_path: Path) -> None:
    results = lines(
        tmp_path / "results.jsonl",
        *({"task_id": i, "passed": j < i} for i in range(3) for j in range(4)),
    )
    found = run("pass-at-k", results, "--k", "1,2", "--json")
    values = json.loads(found.stdout)["results"]["pass_at_k"]
    assert values["1"]["mean"] == pytest.approx((0 + 1 / 4 + 2 / 4) / 3)
    assert values["2"]["mean"] == pytest.approx((0 + 1 / 2 + 5 / 6) / 3)
    table = run("pass-at-k", results, "--k", "1").stdout
    assert "pass@1" in table
    assert "25.0% ± 14.4%" in table


def test_nothing_is_run_unless_it_is_allowed(tmp_path: Path, tasks: Path) -> None:
    trap = tmp_path / "ran"
    code = f"    open({str(trap)!r}, 'w')\n    return 3"
    samples = lines(tmp_path / "samples.jsonl", {"task_id": "Own/add", "completion": code})
    for arguments, message in (
        ((), "have not been run"),
        (("--tasks", tasks), "add --allow-code-execution"),
        (("--allow-code-execution",), "needs --tasks"),
    ):
        found = run("pass-at-k", samples, *arguments)
        assert found.exit_code == 2
        assert message in found.stderr
    assert not trap.exists()


def test_what_fails_anyway_fails_before_the_model_is_loaded(
    tmp_path: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[object] = []
    monkeypatch.setattr(LLM, "load", lambda *arguments, **_: loaded.append(arguments))
    for command in ("infilling", "tasks", "pass-at-k"):
        for name in (str(tasks), ""):
            found = run(command, tasks, "--out", name)
            assert f"cannot write to {name!r}" in found.stderr
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    assert "needs rapidfuzz" in run("infilling", tasks).stderr
    assert not loaded


def test_bad_input_is_one_sentence(tmp_path: Path, tasks: Path) -> None:
    samples = lines(tmp_path / "samples.jsonl", {"task_id": "Own/add", "completion": ""})
    hole = lines(tmp_path / "hole.jsonl", TASK, {"task_id": 2, "prompt": "x", "suffix": "y"})
    for arguments, message in (
        (("infilling", tmp_path / "missing"), "No such file"),
        (("infilling", tmp_path, "--holes", "word"), "expected one of single-line"),
        (("infilling", tmp_path, "--include", "*.c"), "holds no text files that fit '*.c'"),
        (("infilling", tasks, "--holes", "random-span"), "are for a folder"),
        (("infilling", tasks, "--count", "3"), "are for a folder"),
        (("infilling", tasks, "--seed", "0"), "are for a folder"),
        (("infilling", tasks), "has no suffix: it is no infilling task"),
        (("infilling", tmp_path, "--mode", "mps"), "mode is 'mps'"),
        (("infilling", tmp_path, "--stop", ""), "--stop is ''"),
        (("tasks", hole, "--out", tmp_path / "o"), "1 of 2 tasks have a suffix"),
        (("tasks", tasks, "--out", tasks), "cannot write to"),
        (("tasks", tasks, "--out", tmp_path / "o", "--max-new-tokens", "0"), "0: it must be"),
        (("tasks", tasks, "--out", tmp_path / "o2", "--n", "2"), "n is 2 but temperature is 0"),
        (("pass-at-k", tasks), "has no completion"),
        (
            ("pass-at-k", samples, "--tasks", tasks, "--allow-code-execution", "--workers", "0"),
            "workers is 0",
        ),
        (("pass-at-k", tasks, "--k", "one"), "--k is 'one'"),
        (("pass-at-k", tasks, "--timeout", "0"), "timeout is 0"),
    ):
        found = run(*arguments)
        assert found.exit_code == 2, (arguments, found.output)
        assert message in found.stderr, (arguments, found.stderr)
        assert found.stdout == ""
