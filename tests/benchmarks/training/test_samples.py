from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.measure import ROOT
from benchmarks.training import samples


def test_the_speeds_in_the_docs_are_those_of_the_result() -> None:
    result = ROOT / "benchmarks/results/training_samples.json"
    figures = json.loads(result.read_text())["figures"]
    rates = [figures["prepared_tokens_per_cpu_second"], *figures["tokens_per_cpu_second"].values()]
    docs = (ROOT / "docs/training-data.md").read_text()
    assert re.findall(r"\| (\d\.\d\d) \|$", docs, re.M) == [f"{x / 1e6:.2f}" for x in rates]


@pytest.mark.slow
def test_it_measures_every_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(samples, "SEQUENCES", 2)
    monkeypatch.setattr(samples, "STANDARD_LIBRARY", str(ROOT / "mqa_gpt/training"))
    assert samples.main(["--repeats", "1", "--output", str(tmp_path / "result.json")]) == 0
    figures = json.loads((tmp_path / "result.json").read_text())["figures"]
    assert figures["tokens_per_cpu_second"].keys() == samples.SETTINGS.keys()
    assert "left to right" in capsys.readouterr().out
