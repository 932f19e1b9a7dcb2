"""benchmarks/mqa_vs_mha.py: what it compares and counts, and that it runs."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from benchmarks import mqa_vs_mha
from benchmarks.measure import ROOT
from mqa_gpt import GPT, GPTConfig, KVCache
from mqa_gpt.bench.counts import decode_bytes
from mqa_gpt.bench.run import random_model
from tests.helpers import tiny_config

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


def models_of_both(shape: str) -> dict[str, GPT]:
    configs = mqa_vs_mha.both_configs(GPTConfig.preset(shape))
    return {name: GPT(config).eval() for name, config in configs.items()}


def matrices(model: GPT) -> int:
    return sum(p.numel() for p in model.parameters() if p.ndim == 2)


def test_both_models_have_the_same_width_layers_and_number_of_weights(tiny_shape):
    configs = mqa_vs_mha.both_configs(GPTConfig.preset(tiny_shape))
    models = {name: GPT(config) for name, config in configs.items()}
    assert [configs[name].n_kv_head for name in ("MQA", "MHA")] == [1, 3]
    assert {c.n_embd for c in configs.values()} == {60}
    assert {c.n_layer for c in configs.values()} == {2}
    assert matrices(models["MQA"]) == matrices(models["MHA"])
    for name, model in models.items():
        assert configs[name].parameters == sum(p.numel() for p in model.parameters())


def test_the_largest_batch_fits_and_one_row_more_does_not():
    config, dtype = tiny_config(), torch.float32
    weights = sum(p.nbytes for p in GPT(config).parameters())
    cache = KVCache(config, 7, 50, dtype=dtype).kv.nbytes
    assert mqa_vs_mha.largest_batch(config, dtype, 50, weights + cache) == 7
    assert mqa_vs_mha.largest_batch(config, dtype, 50, weights + cache - 1) == 6
    assert mqa_vs_mha.largest_batch(config, dtype, 50, weights - 1) == 0


def test_a_decode_step_attends_to_the_whole_context_each_time():
    model = random_model(tiny_config(), torch.float32, torch.device("cpu"))
    seen = []
    for block in model.transformer.h:
        run = block.attn.attend
        block.attn.attend = lambda q, k, *rest, run=run: (
            seen.append(k.shape[:2]) or run(q, k, *rest)
        )
    step = mqa_vs_mha.decode_step(model, 3, 20)
    seen.clear()
    step()
    step()
    assert seen == [(3, 20)] * 4


def test_a_step_that_generate_would_replay_keeps_its_slot(tiny_shape, monkeypatch):
    monkeypatch.setattr(mqa_vs_mha, "can_replay", lambda model: True)
    make, slots = mqa_vs_mha.greedy_step, []

    def watched(model, cache):
        run, state = make(model, cache)

        def seen() -> None:
            slots.append((*state.lengths.tolist(), cache.max_length))
            run()

        return seen, state

    monkeypatch.setattr(mqa_vs_mha, "greedy_step", watched)
    models = models_of_both(tiny_shape)
    case = mqa_vs_mha.measure(models, 2, 20, 3, False)
    assert {len(case["times"][name]["seconds"]) for name in ("MQA", "MHA")} == {3}
    assert slots == [(19, 19, 20)] * 2 * (2 + 1 + 3)  # to record, to warm up, measured


@pytest.mark.parametrize("one_thread", [True, False])
def test_mqa_against_mha_is_written_as_json_and_drawn(tiny_shape, tmp_path, one_thread, capsys):
    output = tmp_path / "result.json"
    options = [
        "--shape",
        tiny_shape,
        "--device",
        "cpu",
        "--batch",
        "1",
        "2",
        "--context",
        "9",
        "20",
    ]
    options += ["--repeats", "3", "--output", str(output), "--note", "quiet"]
    mqa_vs_mha.main(options + ["--one-thread"] * one_thread)
    found = json.loads(output.read_text())
    cases = found["figures"]["cases"]
    assert [(c["batch"], c["context"]) for c in cases] == [(1, 9), (1, 20), (2, 9), (2, 20)]
    for case in cases:
        low, high = case["ratio"]["quartiles"]
        assert low <= case["ratio"]["median"] <= high
        assert case["cache_bytes"]["MHA"] == 3 * case["cache_bytes"]["MQA"]
    assert found["settings"]["note"] == "quiet"
    assert ("--one-thread" in found["command"]) == one_thread
    assert output.with_suffix(".png").exists() == HAS_MATPLOTLIB
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_a_case_that_does_not_fit_is_left_out_with_the_reason(tiny_shape, monkeypatch):
    monkeypatch.setattr(mqa_vs_mha, "available_memory", lambda device: 1000)
    models = models_of_both(tiny_shape)
    case = mqa_vs_mha.measure(models, 1, 20, 3, False)
    assert "do not fit" in case["left_out"]
    assert "times" not in case


def test_the_plot_is_a_png_file(tmp_path):
    pytest.importorskip("matplotlib")
    file = ROOT / "benchmarks/results/mqa_vs_mha_tiny_starcoder_py_cpu.json"
    mqa_vs_mha.plot(json.loads(file.read_text())["figures"], "title", tmp_path / "a.png")
    drawn = (tmp_path / "a.png").read_bytes()
    assert drawn.startswith(b"\x89PNG")
    assert len(drawn) > 10_000


def test_the_ratios_of_times_and_bytes_on_the_page_are_those_of_the_result():
    result = ROOT / "benchmarks/results/mqa_vs_mha_tiny_starcoder_py_cpu.json"
    page = (ROOT / "docs/experiments/decode-time.md").read_text()
    cells: dict[int, list[str]] = {}
    configs = mqa_vs_mha.both_configs(GPTConfig.preset("tiny_starcoder_py"))
    for case in json.loads(result.read_text())["figures"]["cases"]:
        mqa, mha = (
            decode_bytes(configs[name], case["batch"], [case["context"]], 4, torch.float32)
            for name in ("MQA", "MHA")
        )
        cells.setdefault(case["batch"], []).append(
            f"{case['ratio']['median']:.2f} ({mha / mqa:.2f})"
        )
    assert len(cells) == 3
    for batch, row in cells.items():
        assert f"| {batch} | {' | '.join(row)} |" in page
