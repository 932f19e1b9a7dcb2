"""benchmarks/training/loss.py: that all ways compute the same loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.training import loss


@pytest.mark.slow
def test_all_ways_are_measured_and_agree(tmp_path: Path) -> None:
    sizes = ["--tokens=40", "--width=12", "--vocabulary=300", "--repeats=1", "--device=cpu"]
    assert loss.main([*sizes, "--output", str(tmp_path / "result.json")]) == 0
    figures = json.loads((tmp_path / "result.json").read_text())["figures"]
    assert "next_token_loss" in figures
    for way, found in figures.items():
        assert found["loss"] == pytest.approx(figures["all logits"]["loss"], rel=1e-6), way
        assert found["seconds"] > 0
