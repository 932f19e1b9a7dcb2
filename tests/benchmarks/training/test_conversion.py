"""benchmarks/training/conversion.py: that it runs, and that its result holds what it says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from benchmarks.measure import ROOT
from benchmarks.training import conversion

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


def test_the_losses_in_the_docs_are_those_of_the_result() -> None:
    result = ROOT / "benchmarks/results/training_conversion_cpu.json"
    figures = json.loads(result.read_text())["figures"]
    docs = (ROOT / "docs/conversion.md").read_text()
    names = {"aligned, with text": "`aligned` with text (33,000 tokens)"}
    for name in conversion.CONVERTED:
        found, gap = figures["converted"][name], figures["gap_of_mean_pooling"][name]
        gap_text = "1" if gap == 1 else f"{gap:.2f}"
        row = f"{names.get(name, f'`{name}`')} | {found['at_first']:.3f} | {gap_text} | "
        assert f"| {row}{found['final']:.3f} |" in docs
    assert (
        f"| {figures['MHA']['final']:.3f} | | {figures['converted']['MHA']['final']:.3f} |" in docs
    )
    assert f"| | {figures['MQA from scratch']['final']:.3f} |" in docs


@pytest.mark.slow
def test_it_runs(
    tiny_experiment: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "TEXT_SEQUENCES", 8)
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
