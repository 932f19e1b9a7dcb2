"""What a run will take, from a few steps that leave nothing behind."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mqa_gpt.training import plan
from mqa_gpt.training.plan import Plan, plan_run
from tests.training.runs import say_nothing, tiny_run, write_sources

LEAST = Plan(
    parameters=1_000, state_bytes=2 * 10**9, peak_bytes=None, steps=50, tokens=70_000, epochs=1.25
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.mark.parametrize(("name", "averages"), [("adamw", 0), ("muon", 1)])
def test_memory_is_that_of_weights_gradients_moments_and_average(
    name: str, averages: int, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny_run(sources, optimizer_name=name, averaging_decay=0.9 * averages)
    found = plan_run(config, device="cpu", say=say_nothing)
    assert list(tmp_path.iterdir()) == []
    # V C + positions C + 2 layers + last norm
    layer = 24 * 36 + 36 + 24 * 24 + 24 + 2 * 24 * 40 + 40 + 24 + 4 * 24
    parameters = 290 * 24 + 48 * 24 + 2 * layer + 48
    assert found.parameters == parameters
    hidden = 2 * (24 * 36 + 24 * 24 + 2 * 24 * 40)  # Muon keeps one moment of these
    moments = 2 * parameters - (hidden if name == "muon" else 0)
    counters = 4 * (2 * 12 + 4 - (8 if name == "muon" else 0))
    assert found.state_bytes == 4 * (2 * parameters + moments + averages * parameters) + counters
    assert (found.steps, found.tokens) == (12, 12 * 8 * 40)
    assert found.seconds is not None
    assert found.seconds_per_step is not None
    assert found.seconds == pytest.approx(12 * found.seconds_per_step)
    assert found.peak_bytes is None or found.peak_bytes > found.state_bytes


def test_a_run_that_does_not_fit_is_not_started(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "available_memory", lambda device: 1000)
    found = plan_run(tiny_run(sources), device="cpu", say=say_nothing)
    assert found.seconds is found.peak_bytes is None
    assert (
        found.to_text().splitlines()[-1].startswith("time         not measured: the run does not")
    )


def test_the_text_has_a_line_for_each_figure() -> None:
    found = dataclasses.replace(
        LEAST, peak_bytes=3 * 10**9, seconds_per_step=0.5, tokens_per_second=2800.0, mfu=0.41
    )
    assert dataclasses.replace(found, seconds=25.0).to_text().splitlines() == [
        "parameters   1,000",
        "memory       2.00 GB of weights, gradients, moments and averages; "
        "3.00 GB at the peak of the timed steps",
        "steps        50",
        "tokens       70,000, 1.2 epochs",
        "speed        0.500 s a step, 2,800 tok/s, MFU 41%",
        "time         25 s, and that of evaluation",
    ]
    assert "time         3 h 20 min" in dataclasses.replace(found, seconds=12_000.0).to_text()
    assert "time         20 min" in dataclasses.replace(found, seconds=1_200.0).to_text()
