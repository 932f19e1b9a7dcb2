"""benchmarks/training/optimizers.py: that it runs, and goes on where it was interrupted."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from benchmarks.training import optimizers, small

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


@pytest.mark.slow
def test_it_runs_and_repeats_no_run(
    tiny_experiment: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*tiny_experiment, "--seeds=2", "--lr", "0.01", "0.02", "--shares", "0.5", "1.0"]
    assert optimizers.main(options) == 0
    figures = json.loads((tmp_path / "result.json").read_text())["figures"]
    assert figures["tuning"].keys() == figures["variants"].keys() == optimizers.VARIANTS.keys()
    for variant, found in figures["variants"].items():
        assert found["runs"].keys() == ({"4"} if variant == "AdamW" else {"2", "4"})
        assert all(len(runs) == 2 for runs in found["runs"].values())
        assert str(found["lr"]) in figures["tuning"][variant]
    split, whole = (
        figures["variants"][f"Muon, c_attn {how}"]["runs"] for how in ("split", "whole")
    )
    assert split["4"][0]["held_out"] != whole["4"][0]["held_out"]
    assert (tmp_path / "result.png").exists() == HAS_MATPLOTLIB

    monkeypatch.setattr(small, "Trainer", None)  # a new run would fail
    assert optimizers.main(options) == 0
    assert json.loads((tmp_path / "result.json").read_text())["figures"] == figures
