"""The plot of a run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mqa_gpt.errors import InputError
from mqa_gpt.training.log import RunLog
from mqa_gpt.training.plot import plot_run


def write_log(folder: Path, steps: int) -> None:
    log = RunLog(folder)
    for step in range(1, steps + 1):
        values = {"loss": 3 / step, "grad_norm": 1.0, "lr": 0.1, "tokens_per_second": 10.0}
        log.write("train", step, **values | {"loss": float("nan")} if step == 3 else values)
    log.write("held_out", steps, loss=1.0, left_to_right=1.1, infilling=None)
    log.close()


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 900])
def test_it_is_a_picture_in_the_runs_folder_or_elsewhere(tmp_path: Path, steps: int) -> None:
    write_log(tmp_path, steps)
    assert plot_run(tmp_path).read_bytes().startswith(b"\x89PNG")
    drawn = plot_run(tmp_path, tmp_path / "curves.svg").read_text()
    texts = set(re.findall("<!-- (.*) -->", drawn))  # as matplotlib notes them
    assert {"training", "held out, all", "held out, left to right", "learning rate"} <= texts
    assert "held out, middles" not in texts  # was never measured
    with pytest.raises(InputError, match=r"curves\.nothing cannot be drawn"):
        plot_run(tmp_path, tmp_path / "curves.nothing")


def test_a_folder_without_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run: name a folder"):
        plot_run(tmp_path)
    (tmp_path / "config.toml").touch()
    with pytest.raises(InputError, match=r"log\.jsonl holds no steps yet"):
        plot_run(tmp_path)
