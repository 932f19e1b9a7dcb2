"""benchmarks/training/conversion.py: that it runs, and that its result holds what it says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from benchmarks.training import conversion

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


@pytest.mark.slow
def test_it_runs(
    tiny_experiment: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "TEXT_SEQUENCES", 4)
    monkeypatch.setattr(conversion, "TEXT_BATCH", 2)
    monkeypatch.setattr(conversion, "FAR", 100)
    assert conversion.main([*tiny_experiment, "--uptraining=0.5", "--repeats=2"]) == 0
    figures = json.loads((tmp_path / "result.json").read_text())["figures"]
    mha, converted = figures["MHA"], figures["converted"]
    assert converted.keys() == {"MHA", *conversion.CONVERTED}
    assert converted["MHA"]["at_first"] == pytest.approx(mha["final"])
    assert [step for step, _ in converted["mean"]["held_out"]][-1] == 2
    assert [step for step, _ in figures["MQA from scratch"]["held_out"]][-1] == 6
    assert figures["gap_of_mean_pooling"]["mean"] == 1
    assert figures["decoding"]["milliseconds"].keys() == {"MHA", "MQA"}
    assert (tmp_path / "result.png").exists() == HAS_MATPLOTLIB
