"""Model FLOPs utilisation: the two counts, and the peak that they are a share of."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mqa_gpt import GPT
from mqa_gpt.bench.counts import training_flops
from mqa_gpt.training import speed
from mqa_gpt.training.speed import Speed, speed_of
from tests.helpers import random_ids, tiny_config


@pytest.mark.parametrize("multi_query", [True, False])
def test_operations_are_three_times_those_that_torch_counts_in_a_forward_pass(
    multi_query: bool,
) -> None:
    config, B, T = tiny_config(multi_query=multi_query), 3, 11
    model = GPT(config, backend="reference").eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(random_ids(config, B, T))
    assert B * T * training_flops(config, T, causal=False) == 3 * counter.get_total_flops()


def test_the_counts_are_the_formulas() -> None:
    config, T = tiny_config(), 40
    parts = config.parameters_by_part
    biases = 2 * (60 + 2 * 20 + 60 + 136 + 60)
    N = parts["attention"] + parts["MLP"] - biases + parts["token embedding"]
    C, L = config.n_embd, config.n_layer
    assert training_flops(config, T, causal=False) == 6 * N + 12 * L * C * T
    assert training_flops(config, T, causal=True) == 6 * N + 6 * L * C * (T + 1)
    untied = dataclasses.replace(config, tie_word_embeddings=False)
    assert training_flops(untied, T, causal=True) == training_flops(config, T, causal=True)


def test_utilisation_is_the_share_of_the_peak() -> None:
    scale = Speed(peak=1000.0, source="", flops=10.0, causal_flops=8.0)
    assert scale.utilisation(50) == {"mfu": 0.5, "mfu_causal": 0.4}


def test_a_cpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "PROBE_SIZE", 64)
    found = speed_of(tiny_config(), 40, torch.device("cpu"), "float32")
    assert found.peak > 0
    assert found.source == "measured product of float32 matrices, 64 x 64"


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
    ],
)
def test_a_known_gpu_has_the_peak_of_its_data_sheet(
    name: str, peak: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found = speed_of(tiny_config(), 40, torch.device("cuda"), "bfloat16")
    assert found.peak == peak
