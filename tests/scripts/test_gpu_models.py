"""gpu_models.py: its checks fail when something is wrong, and its rates are of what ran."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not available on this platform")

import gpu_models
from gpu_kernels import TINY, Twins

from mqa_gpt import GPT
from tests.scripts.marks import WITHOUT_GPU

CPU = torch.device("cpu")

pytestmark = WITHOUT_GPU


@pytest.fixture(scope="module")
def model() -> GPT:
    return Twins(TINY, torch.float32, False, CPU).plain


def test_recorded_values_and_kept_graphs_are_checked_on_replays(model, graphs, monkeypatch):
    kept = gpu_models.check_graphs(model)
    assert (kept["passed"], kept["equal"], kept["graphs"]) == (True, 3, 1)
    assert [graph.replays for graph in graphs] == [3 * 15 - 1]  # the first run compiles
    assert gpu_models.check_recorded(model)["passed"]
    assert len(graphs) > 2
    honest, calls = gpu_models.generate, []

    def wrong_when_recorded(*arguments):
        calls.append(honest(*arguments))
        return [row[::-1] for row in calls[-1]] if len(calls) == 2 else calls[-1]

    monkeypatch.setattr(gpu_models, "generate", wrong_when_recorded)
    row = gpu_models.check_recorded(model)
    assert not row["passed"]
    assert not row["equal_tokens"]
    assert row["errors"]["logits"] > 1


def test_replays_that_choose_other_tokens_than_the_modules_fail(model, monkeypatch):
    def generate(model, prompts, count, **options):
        return [[len(model.lm_head._forward_hooks)] * count for _ in prompts]

    monkeypatch.setattr(gpu_models, "generate", generate)
    assert gpu_models.check_loops(model, {}) == {
        "passed": False, "equal": 0, "tokens": 45 * 24,
    }  # fmt: skip


def test_the_rate_of_generation_has_no_part_in_reading_prompts_nor_in_recording(model, monkeypatch):
    clock = [0.0]

    def generate(model, prompts, count):
        clock[0] += 5 + 7 * (count > 1) + 0.25 * (count - 1)  # prompts, recording, steps

    monkeypatch.setattr(gpu_models, "generate", generate)
    monkeypatch.setattr(gpu_models.time, "perf_counter", lambda: clock[0])
    row = gpu_models.generation_speed(model, 3, 12)
    assert (row["first_token_s"], row["generated_per_s"]) == (5, 3 / 0.25)


def test_every_measured_step_follows_the_same_context(model, monkeypatch):
    contexts, greedy_step = [], gpu_models.greedy_step

    def told(model, cache):
        step, state = greedy_step(model, cache)

        def run():
            contexts.append(state.lengths.tolist())
            step()

        return run, state

    monkeypatch.setattr(gpu_models, "greedy_step", told)
    row = gpu_models.step_speed(model, 2, 12)
    assert contexts == 2 * [[12 + i] * 2 for i in range(gpu_models.STEPS)]  # to warm up, to measure
    # The float32 weights once, and 12.5 earlier tokens and the new one of two rows.
    config = model.config
    weights = 4 * (config.parameters - config.n_positions * config.n_embd)
    cache = 2 * 16.5 * 2 * config.n_layer * 16 * 4
    expected = (weights + cache) / row["step_us"] * 1e6 / 1e9
    assert row["gb_per_s"] == pytest.approx(expected)
