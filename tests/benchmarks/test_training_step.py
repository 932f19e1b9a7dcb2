"""benchmarks/training_step.py: that both train the same model, and that it runs."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import training_step
from benchmarks.training_step import OURS, THEIRS, make_step
from tests.helpers import tiny_config


@pytest.mark.parametrize("recompute", [False, True])
def test_both_models_have_the_same_losses_step_by_step(recompute):
    config = tiny_config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ids = torch.randint(config.vocab_size, (3, 21))
    ours, theirs = (
        make_step(name, config, ids, torch.float32, recompute=recompute and name == OURS)
        for name in (OURS, THEIRS)
    )
    for _ in range(3):
        assert ours() == pytest.approx(theirs(), rel=1e-5)
    assert ours() < make_step(OURS, config, ids, torch.float32)()  # the weights have moved


def test_only_our_model_recomputes(monkeypatch):
    asked = []
    monkeypatch.setattr(
        training_step, "prepare_blocks", lambda model, loop: asked.append(loop.recompute)
    )
    config, ids = tiny_config(), torch.zeros(1, 9, dtype=torch.long)
    for name in (OURS, THEIRS):
        make_step(name, config, ids, torch.float32, recompute=True)
    assert asked == [True]


@pytest.mark.slow
def test_it_runs_and_its_ratios_are_those_of_its_figures(tiny_shape, tmp_path, monkeypatch):
    asked = []

    def memory_of(name, options):
        asked.append((name, options.recompute))
        size = {OURS: 30, THEIRS: 40}[name]
        return {"held_bytes": 20, "peak_bytes": size, "added_bytes": size - 20}

    monkeypatch.setattr(training_step, "memory_of", memory_of)
    output = tmp_path / "result.json"
    options = ["--shape", tiny_shape, "--batch=2", "--tokens=16", "--repeats=2", "--recompute"]
    assert training_step.main([*options, "--output", str(output)]) == 0
    assert asked == [(OURS, True), (THEIRS, True)]
    figures = json.loads(output.read_text())["figures"]
    losses = figures["loss_of_first_step"]
    assert losses[OURS] == pytest.approx(losses[THEIRS], rel=1e-5)
    times = figures["times"]
    assert figures["speedup"] == pytest.approx(
        times[THEIRS]["median"] / times[OURS]["median"], rel=1e-3
    )
    assert (figures["peak_ratio"], figures["added_ratio"]) == (0.75, 0.5)


def test_the_memory_of_one_is_measured_in_this_process(tiny_shape, capsys):
    options = ["--shape", tiny_shape, "--batch=1", "--tokens=8", "--recompute"]
    assert training_step.main([*options, "--memory-of", OURS]) == 0
    memory = json.loads(capsys.readouterr().out)
    assert memory["added_bytes"] == memory["peak_bytes"] - memory["held_bytes"]
    assert memory["peak_bytes"] >= memory["held_bytes"] > 0
