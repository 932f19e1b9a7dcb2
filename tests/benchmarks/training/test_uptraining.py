"""benchmarks/training/uptraining.py: that it runs, and that its plot shows the best losses."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from benchmarks.measure import ROOT
from benchmarks.training import conversion, uptraining

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


def test_a_curve_begins_with_the_conversion_and_takes_the_best_learning_rate() -> None:
    found = {"converted": 4.0, "uptrained": {"0.05": {"0.1": 3.5, "0.2": 3.4}, "0.1": {"0.1": 3.0}}}
    assert uptraining.best_losses(found) == ([0.0, 0.05, 0.1], [4.0, 3.4, 3.0])


def test_the_losses_on_the_page_are_those_of_the_result() -> None:
    result = ROOT / "benchmarks/results/training_uptraining_cpu.json"
    page = (ROOT / "docs/experiments/uptraining.md").read_text()
    for name, found in json.loads(result.read_text())["figures"].items():
        _, losses = uptraining.best_losses(found)
        assert f"| {name} | {' | '.join(f'{loss:.3f}' for loss in losses)} |" in page


@pytest.mark.slow
def test_it_runs(
    tiny_experiment: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "TEXT_SEQUENCES", 8)
    monkeypatch.setattr(conversion, "TEXT_BATCH", 2)
    monkeypatch.setattr(conversion, "FAR", 100)
    options = [*tiny_experiment, "--share", "0.25", "0.5", "--uptraining-lr", "1e-3", "1e-2"]
    assert uptraining.main(options) == 0
    figures = json.loads((tmp_path / "result.json").read_text())["figures"]
    assert figures.keys() == {"MHA", *conversion.CONVERTED}
    converted = [found["converted"] for found in figures.values()]
    assert len(set(converted)) == 5
    for found in figures.values():
        assert {share: losses.keys() for share, losses in found["uptrained"].items()} == {
            "0.25": {"0.001", "0.01"}, "0.5": {"0.001", "0.01"}
        }  # fmt: skip
    trained = [
        loss for f in figures.values() for x in f["uptrained"].values() for loss in x.values()
    ]
    assert len(set(trained)) == 20
    assert (tmp_path / "result.png").exists() == HAS_MATPLOTLIB
