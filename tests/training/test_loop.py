"""Steps of tiny runs: learning a batch by heart, ways to compute the same curve, bad steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mqa_gpt.training import checkpoints
from mqa_gpt.training.log import read_log
from mqa_gpt.training.run import train
from tests.training.runs import (
    NO_DROPOUT,
    assert_same_run,
    last_tensors,
    results,
    start,
    tiny_run,
    write_sources,
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.mark.slow
def test_one_batch_is_learned_by_heart(sources: Path, tmp_path: Path) -> None:
    config = tiny_run(
        sources,
        **NO_DROPOUT,
        model_initializer_range=0.02,
        run_repeat_batch=True,
        run_steps=150,
        run_batch_size=2,
        run_evaluate_every=0,
        run_save_every=0,
    )
    start(config, tmp_path / "run")
    losses = [record["loss"] for record in read_log(tmp_path / "run") if record["kind"] == "train"]
    assert abs(losses[0] - math.log(290)) < 0.1
    assert losses[-1] < 0.01


SHORT = {"run_steps": 4, "run_batch_size": 2, "run_evaluate_every": 0, "run_evaluate_samples": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [
        {"model_backend": "reference"},
        {"model_backend": "triton", **SHORT},  # interpreted
        {"run_recompute": True},
    ],
)
def test_the_curve_does_not_depend_on_how_attention_is_computed(
    setting: dict[str, Any], sources: Path, tmp_path: Path
) -> None:
    usual = {**setting, "model_backend": "sdpa", "run_recompute": False}
    assert_same_curve(usual, setting, sources, tmp_path)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_curve(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def compile_without_cpp(module: torch.nn.Module) -> None:
        compiled.append(type(module).__name__)
        original(module, backend="aot_eager")  # Inductor needs a C++ compiler, and a minute

    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", compile_without_cpp)
    setting = {"run_compile": True, "run_recompute": True, **SHORT}
    assert_same_curve({**setting, "run_compile": False}, setting, sources, tmp_path)
    assert compiled == ["Block"] * 2


def assert_same_curve(
    one: dict[str, Any], other: dict[str, Any], sources: Path, folder: Path
) -> None:
    """Two runs without dropout have the same losses but for rounding."""
    for name, changes in (("one", one), ("other", other)):
        start(tiny_run(sources, **NO_DROPOUT, **changes), folder / name)
    pairs = list(zip(results(folder / "one"), results(folder / "other"), strict=True))
    for mine, its in pairs:
        assert its["loss"] == pytest.approx(mine["loss"], rel=1e-3)
    assert pairs[-1][0]["loss"] < 0.9 * pairs[0][0]["loss"]


def spoil_gradients(monkeypatch: pytest.MonkeyPatch, step: int, factor: float) -> None:
    """Multiply the gradients of one step."""
    from mqa_gpt.training import loop

    original = loop.add_gradients
    calls = [0]

    def add_gradients(objective: torch.nn.Module, *arguments: Any) -> tuple[float, int]:
        found = original(objective, *arguments)
        calls[0] += 1
        if calls[0] == step:
            for parameter in objective.parameters():
                assert parameter.grad is not None
                parameter.grad *= factor
        return found

    monkeypatch.setattr(loop, "add_gradients", add_gradients)


@pytest.mark.slow
def test_a_step_that_is_not_finite_stops_the_run_before_the_weights_change(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(sources)
    start(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        spoil_gradients(patch, 7, math.nan)
        with pytest.raises(FloatingPointError, match=r"step 7: .*norm nan; set run\.on_bad_step"):
            start(config, tmp_path / "run")
    assert checkpoints.complete(tmp_path / "run")[-1].name == "step-00000006"
    start(config, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(("factor", "spike_factor"), [(math.inf, 0.0), (1e4, 20.0)])
def test_a_bad_step_is_skipped_and_said_where_the_config_wants_that(
    factor: float,
    spike_factor: float,
    sources: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mqa_gpt.training.loop.SPIKE_WINDOW", 4)
    spoil_gradients(monkeypatch, 7, factor)
    config = tiny_run(sources, run_on_bad_step="skip", run_spike_factor=spike_factor)
    said: list[str] = []
    train(config, tmp_path / "run", device="cpu", say=said.append)
    assert checkpoints.read_state(checkpoints.complete(tmp_path / "run")[-1]).skipped == 1
    (line,) = [line for line in said if line.startswith("step 7 is skipped: the ")]
    assert ("times the median" in line) == bool(spike_factor)
    assert all(tensor.isfinite().all() for tensor in last_tensors(tmp_path / "run").values())
