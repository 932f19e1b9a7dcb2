"""Figures of named GPUs, found by the names that CUDA gives them."""

from __future__ import annotations

import pytest
import torch

from mqa_gpt.bench import ceilings
from mqa_gpt.bench.devices import DEVICES, find_device, measured_device


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("Tesla T4", "T4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 4090"),
        ("NVIDIA A10", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_a_gpu_is_known_by_its_name(name: str, found: str | None) -> None:
    device = find_device(name)
    assert (device and device.name) == found


def test_the_figures_are_dense_and_of_one_unit() -> None:
    for device in DEVICES:
        # No GPU of these makes as few as 20 or as many as 500 operations for each byte it moves.
        assert 20 < device.rates[torch.float16] / device.bandwidth < 500, device.name
        assert 5 < device.memory / device.bandwidth * 1000 < 100, device.name
    assert [device.name for device in DEVICES if torch.bfloat16 not in device.rates] == ["T4"]


def test_the_slower_of_memory_and_arithmetic_decides() -> None:
    device = DEVICES[0]._replace(bandwidth=2.0, rates={torch.float32: 10.0})
    assert device.balance(torch.float32) == 5
    assert device.least_seconds(20, 2, torch.float32) == (2, False)
    assert device.least_seconds(20, 8, torch.float32) == (4, True)


def test_this_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "PROBE_BYTES", 1 << 20)
    monkeypatch.setattr(ceilings, "CPU_PROBE_SIZE", 64)
    device = measured_device(torch.device("cpu"), torch.float32, repeats=2)
    assert device.name == "this CPU"
    assert "thread" in device.source
    assert device.is_measured
    assert device.bandwidth > 1e6
    assert device.rates[torch.float32] > 1e6
