"""benchmarks/training/demo.py: the curve of several runs, one after the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.training import demo


def run(steps: int, losses: dict[int, float]) -> dict[str, object]:
    held_out = [{"step": step, "left_to_right": loss} for step, loss in losses.items()]
    return {"steps": steps, "tokens": 2_000_000 * steps, "held_out": held_out}


def test_a_run_begins_at_the_tokens_where_the_one_before_ended() -> None:
    runs = [run(5, {2: 3.0, 5: 2.5}), run(3, {1: 2.6, 3: 2.4})]
    assert demo.curves(runs, "left_to_right") == [
        ([4.0, 10.0], [3.0, 2.5]),
        ([12.0, 16.0], [2.6, 2.4]),
    ]


def test_it_draws_the_recorded_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    figures = tmp_path / "figures.json"
    figures.write_text(demo.FIGURES.read_text("utf-8"), "utf-8")
    demo.main([str(figures)])
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(figures.read_text())["training"]
