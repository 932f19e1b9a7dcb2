"""Runs that go on from another run's checkpoint with another length or schedule."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from mqa_gpt.errors import InputError
from mqa_gpt.training import branch as branching
from mqa_gpt.training.branch import branch
from mqa_gpt.training.config import read_run_config
from mqa_gpt.training.log import read_log
from tests.training.runs import assert_same_run, results, start, tiny_run, write_sources

WSD = {"schedule_name": "wsd", "schedule_final": 0.0, "schedule_decay_share": 0.5}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.mark.slow
@pytest.mark.parametrize("links", [True, False])
def test_a_longer_branch_of_a_stable_run_has_the_bits_of_a_run_of_that_length(
    links: bool, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the checkpoint both schedules are the same: warm-up, then stable."""
    if not links:

        def refuse(*_: Any) -> None:
            raise OSError("another file system")

        monkeypatch.setattr(branching.os, "link", refuse)
    stable = tiny_run(sources, run_steps=4, schedule_name="constant", averaging_decay=0.9)
    whole = tiny_run(sources, run_steps=12, averaging_decay=0.9, **WSD)  # stable for 6 steps
    start(stable, tmp_path / "stable")
    before = results(tmp_path / "stable")
    start(whole, tmp_path / "branch", branch_from=tmp_path / "stable")
    start(whole, tmp_path / "whole")
    assert_same_run(tmp_path / "branch", tmp_path / "whole")
    assert results(tmp_path / "stable") == before  # untouched
    rates = [r["lr"] for r in read_log(tmp_path / "branch") if r["kind"] == "train"]
    assert rates[3] == rates[5] == 0.01 > rates[-1]
    assert read_run_config(tmp_path / "branch/config.toml") == whole
    (event,) = [r["message"] for r in read_log(tmp_path / "branch") if r["kind"] == "event"]
    assert event.startswith(f"continues from step 4 of {tmp_path}/stable with run.steps was 4 and")
    assert "schedule.name was 'constant' and is 'wsd'" in event
    data = tmp_path / "branch/data/training/index.json"
    assert (os.stat(data).st_nlink > 1) == links  # noqa: PTH116
    start(whole, tmp_path / "branch", resume=True)  # it is a run like any other


def test_the_current_folder_is_not_replaced(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.toml").touch()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (Path(), tmp_path / "here"):
        with pytest.raises(InputError, match="cannot continue in the current folder"):
            branch(tmp_path / "run", out, tiny_run(sources))


@pytest.mark.slow
def test_what_cannot_be_continued_is_refused_and_leaves_nothing(
    sources: Path, tmp_path: Path
) -> None:
    start(tiny_run(sources, run_steps=4), tmp_path / "run")
    longer = tiny_run(sources, run_steps=6)
    out = tmp_path / "out"
    with pytest.raises(InputError, match="nothere holds no run: name a folder"):
        branch(tmp_path / "nothere", out, longer)
    with pytest.raises(InputError, match=r"is of step 4 and run.steps is 4: it must be more"):
        branch(tmp_path / "run", out, tiny_run(sources, run_steps=4))
    other = tiny_run(
        sources,
        **{"run_steps": 6, "model_n_layer": 3, "data_length": 41, "optimizer_lr": 0.02},
        data_infilling={"rate": 0.4, "end_in_context": False},
    )
    with pytest.raises(InputError) as caught:
        start(other, out, branch_from=tmp_path / "run")
    assert "model.n_layer was 2 and is 3" in str(caught.value)
    assert "data.length was 40 and is 41" in str(caught.value)
    assert "data.infilling.rate was 0.5 and is 0.4" in str(caught.value)
    assert "lr" not in str(caught.value)
    assert "end_in_context" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    with pytest.raises(InputError, match="holds a run: pass --resume"):
        start(longer, tmp_path / "run", branch_from=tmp_path / "run")
    with pytest.raises(InputError, match="--from another one: choose one"):
        start(longer, out, branch_from=tmp_path / "run", resume=True)
    (tmp_path / "run/checkpoints").rename(tmp_path / "moved")
    with pytest.raises(InputError, match="has no checkpoint yet"):
        branch(tmp_path / "run", out, longer)
