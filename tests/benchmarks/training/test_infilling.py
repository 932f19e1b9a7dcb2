"""benchmarks/training/infilling.py: what is compared, and that it runs."""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
from pathlib import Path

import pytest

from benchmarks.measure import ROOT
from benchmarks.training import infilling, small

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


def test_the_losses_on_the_page_are_those_of_the_result() -> None:
    result = ROOT / "benchmarks/results/training_infilling_cpu.json"
    page = (ROOT / "docs/experiments/infilling.md").read_text()
    figures = json.loads(result.read_text())["figures"]
    for rate, runs in figures.items():
        left_to_right, middles = infilling.mean_losses(runs)
        assert f"| {rate} | {left_to_right:.3f} | {middles:.3f} |" in page
    at_end = [gaps[-1] for gaps in infilling.differences(figures, "0.5")]
    of_middles = [
        run["infilling"] - without["infilling"]
        for run, without in zip(figures["0.5"], figures["0"], strict=True)
    ]
    cells = [
        f"{statistics.mean(gaps):+.3f} ± {statistics.stdev(gaps) / math.sqrt(len(gaps)):.3f}"
        for gaps in (at_end, of_middles)
    ]
    assert f"| difference | {cells[0]} | {cells[1]} |" in page


@pytest.mark.slow
def test_all_runs_are_measured_on_the_same_text_and_the_same_holes(
    tiny_experiment: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    trained = small.train

    def watched(name, config, data, options):
        read = data.held_out.rows(range(2))
        seen.append((config.data.infilling.rate, config.run.seed, read))
        return trained(name, config, data, options)

    monkeypatch.setattr(infilling, "train", watched)
    assert infilling.main([*tiny_experiment, "--seeds=2", "--rate=1"]) == 0
    assert [(rate, seed) for rate, seed, _ in seen] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(read.ids.equal(seen[0][2].ids) for _, _, read in seen)
    assert not (seen[0][2].kinds == 2).any()  # no middles

    figures = json.loads((tmp_path / "result.json").read_text())["figures"]
    assert figures.keys() == {"0", "1"}
    for runs in figures.values():
        assert len(runs) == 2
        for run in runs:
            assert [step for step, _ in run["left_to_right"]] == [1, 2, 3, 4]
            assert run["infilling"] > 0
    first_losses = {run["left_to_right"][0][1] for runs in figures.values() for run in runs}
    assert len(first_losses) == 4  # the batches differ
    assert (tmp_path / "result.png").exists() == HAS_MATPLOTLIB
