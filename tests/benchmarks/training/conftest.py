"""Fixtures of the training experiments: sources that are learned in no time."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.training import small
from tests.training.runs import write_sources

TINY = [
    "--steps=4", "--width=24", "--layers=1", "--heads=3", "--vocabulary=290", "--length=32",
    "--batch=2", "--held-out-sequences=2", "--device=cpu",
]  # fmt: skip


@pytest.fixture
def tiny_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The options of an experiment on a few made-up files."""
    monkeypatch.setattr(small, "SOURCES", (str(write_sources(tmp_path / "sources")),))
    monkeypatch.setattr(small, "HELD_OUT", ("module_1*",))
    output = tmp_path / "result.json"
    return [*TINY, f"--work={tmp_path / 'runs'}", f"--output={output}"]
