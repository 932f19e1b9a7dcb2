"""benchmarks/tables.py: the tables hold what the files do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables

NAMES = {
    "float32": ("mqa-gpt", "ctranslate2 float32", "transformers", "openvino float32"),
    "int8": ("mqa-gpt", "ctranslate2 int8", "transformers", "openvino int8"),
}


def bench(rates: dict[str, float]) -> dict[str, Any]:
    """What `mqa-gpt bench` writes, as far as the tables read it: every test at the same rate."""
    results = [
        {
            "test": test,
            "batch": batch,
            "contender": name,
            "median": rate,
            "seconds": [0.97, 1.0, 1.01],
            "ours_faster": None if name == "mqa-gpt" else rates["mqa-gpt"] / rate,
            "gb_per_s": 18.0 if test == tables.DECODE else None,
            "mbu": 0.8 if test == tables.DECODE else None,
            "mfu": 0.5 if test == tables.PREFILL else None,
        }
        for test in (tables.DECODE, tables.PREFILL)
        for batch in tables.BATCHES
        for name, rate in rates.items()
    ]
    versions = dict.fromkeys(("torch", "numba", "transformers", "ctranslate2"), "1.2")
    cpu = {"name": "Some CPU", "capability": "AVX2", "threads": 2}
    return {
        "results": results,
        "ceilings": {"read_gb_per_s": 20.0},
        "environment": {"cpu": cpu, "versions": versions},
        "date": "2026-01-02 03:04 UTC",
    }


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A repository with results of one shape, in float32 and 8 bits."""
    folder = tmp_path / "benchmarks/results"
    folder.mkdir(parents=True)
    for kind, names in NAMES.items():
        rates = dict(zip(names, (30.0, 20.0, 10.0, 15.0), strict=True))
        (folder / f"bench_tiny_starcoder_py_{kind}.json").write_text(json.dumps(bench(rates)))
    seconds = {"mqa-gpt": 2.0, "mqa-gpt, nothing compiled": 14.0, "transformers": 3.0}
    programs = {
        name: {"seconds": value, "peak_bytes": 1_250_000_000} for name, value in seconds.items()
    }
    start = {"figures": {"checkpoint_bytes": 700_000_000, "programs": programs}}
    (folder / "cpu_start_tiny_starcoder_py.json").write_text(json.dumps(start))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    tables.result.cache_clear()
    yield tmp_path
    tables.result.cache_clear()


def cells(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [line.strip("| ").split(" | ") for line in lines[2:]]


def test_the_table_of_speeds_has_every_program_and_the_limit(files):
    text = tables.speeds()
    rows = cells(text)
    assert len(rows) == 2 * 3 + 2  # of the shape that was measured
    assert rows[0] == [
        "tiny_starcoder_py", "decode, 1 prompt, tokens/s",
        "30.0", "20.0", "15.0", "10.0", "37.5", "–", "30.0", "20.0", "15.0", "37.5",
    ]  # fmt: skip
    assert rows[4][2:7] == [
        "30.0",
        "20.0",
        "15.0",
        "10.0",
        "60.0",
    ]  # prefill: of the rate of products
    assert rows[6][2:6] == ["2.00", "–", "–", "3.00"]
    assert rows[7][2:6] == ["1.25", "–", "–", "1.25"]
    assert "Some CPU, AVX2, 2 threads; torch 1.2, numba 1.2" in text
    assert "at most 2% away" in text


def test_goals_that_are_not_reached_are_said_to_be_missed(files):
    found = {row[0]: row[1:] for row in cells(tables.goals())}
    assert found["float32, 1 prompt, share of the bandwidth"][:2] == [
        "at least 0.92",
        "0.90, missed",
    ]
    assert found["float32, 1 prompt, × CTranslate2"] == ["at least 1.00", "1.50", "–"]
    assert found["int8, 1 prompt, × OpenVINO int8"] == ["at least 1.00", "2.00", "–"]
    assert found["int8, 1 prompt, × transformers float32"][:2] == ["at least 6.00", "3.00, missed"]
    assert found["first token of a new process, × transformers"][1] == "1.50"
    assert found["first token, nothing compiled yet: seconds more"][1] == "12.00, missed"
    beyond = found["memory in float32 beyond 1.06 times the weights, GB"]
    assert beyond == ["at most 0.40", "0.51, missed", "–"]


def test_transformers_may_have_a_run_of_its_own_and_the_ratios_are_those_of_that(files):
    path = files / "benchmarks/results/bench_starcoderbase-1b_float32_transformers.json"
    path.write_text(json.dumps(bench({"mqa-gpt": 8.0, "transformers": 5.0})))
    path = files / "benchmarks/results/bench_starcoderbase-1b_float32.json"
    path.write_text(json.dumps(bench({"mqa-gpt": 9.0, "ctranslate2 float32": 6.0})))
    found = tables.measured("starcoderbase-1b", "float32", tables.DECODE, 8)
    assert {name: row["median"] for name, row in found.items()} == {
        "mqa-gpt": 9.0,
        "ctranslate2 float32": 6.0,
        "transformers": 5.0,
    }
    goals = {row[0]: row[1:] for row in cells(tables.goals())}
    assert goals["float32, 8 prompts, × transformers"][2] == "1.60, missed"


def test_what_is_faster_in_three_of_four_rounds_is_bold_in_the_short_table(files):
    path = files / "benchmarks/results/bench_tiny_starcoder_py_float32.json"
    report = json.loads(path.read_text())
    for found in report["results"]:
        rounds = {
            "mqa-gpt": [1.0, 1.0, 1.0, 1.0, 1.0],
            "ctranslate2 float32": [1.2, 1.2, 1.2, 1.2, 0.9],
            "openvino float32": [1.2, 1.2, 1.2, 1.2, 1.2],
            "transformers": [1.2, 1.2, 1.2, 0.9, 0.9],
        }
        if found["batch"] == 8:
            rounds["transformers"] = rounds["ctranslate2 float32"]
        found["seconds"] = rounds[found["contender"]]
    path.write_text(json.dumps(report))
    table = cells(tables.short_speeds())
    assert table[0] == ["decode, 1 prompt", "30.0", "20.0", "15.0", "10.0", "30.0", "20.0", "15.0"]
    assert table[1] == [
        "decode, 8 prompts",
        "**30.0**",
        "20.0",
        "15.0",
        "10.0",
        "30.0",
        "20.0",
        "15.0",
    ]


def test_what_no_file_holds_is_not_made_up(files):
    for block in (tables.products, tables.profiles, tables.speculation):
        assert block() == "Not measured yet."


def test_only_what_stands_between_the_marks_is_written(files, monkeypatch):
    (files / "a.md").write_text("1\n\n<!-- x -->\n\nold\n\n<!-- end -->\n\n2\n")
    monkeypatch.setattr(tables, "BLOCKS", {"a.md": {"x": lambda: r"new \1"}})
    assert tables.main() == 0
    expected = "1\n\n<!-- x -->\n\nnew \\1\n\n<!-- end -->\n\n2\n"
    assert (files / "a.md").read_text() == expected
    assert tables.filled("a.md") == expected
