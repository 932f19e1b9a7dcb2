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
        ("NVIDIA A100 80GB PCIe", "A100 PCIe"),
        # Others of that name, with other figures.
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA A10", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_a_gpu_is_known_by_its_name(name: str, found: str | None) -> None:
    device = find_device(name)
    assert (device and device.name) == found


# GB, TB/s, and the TFLOP/s of 16-bit products "with sparsity" that stand on the front pages.
# T4 has no sparsity: twice its figure.
FRONT_PAGES = {
    "L4": (24, 0.300, 242),
    "T4": (16, 0.320, 130),
    "A10G": (24, 0.600, 140),
    "L40S": (48, 0.864, 733),
    "RTX 4090": (24, 1.008, 330.4),
    "A100 PCIe": (80, 1.935, 624),
    "A100 80GB": (80, 2.039, 624),
    "A100": (40, 1.555, 624),
    "H100 PCIe": (80, 2.0, 1513),
    "H100": (80, 3.35, 1979),
    "H200": (141, 4.8, 1979),
    "B200": (180, 8.0, 4500),
}


def test_the_figures_are_dense_and_of_one_unit() -> None:
    assert FRONT_PAGES.keys() == {device.name for device in DEVICES}
    for device in DEVICES:
        memory, bandwidth, sparse = FRONT_PAGES[device.name]
        assert device.memory == memory * 1e9, device.name
        assert device.bandwidth == pytest.approx(bandwidth * 1e12), device.name
        rate = device.rates[torch.float16]
        assert rate == pytest.approx(sparse / 2 * 1e12, rel=0.02), device.name
        assert device.rates.get(torch.bfloat16, rate) == rate
    assert [device.name for device in DEVICES if torch.bfloat16 not in device.rates] == ["T4"]


def test_the_slower_of_memory_and_arithmetic_decides() -> None:
    device = DEVICES[0]._replace(bandwidth=2.0, rates={torch.float32: 10.0})
    assert device.balance(torch.float32) == 5
    assert device.least_seconds(20, 2, torch.float32) == (2, False)
    assert device.least_seconds(20, 8, torch.float32) == (4, True)


def test_no_product_is_measured_on_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "PROBE_BYTES", 1 << 10)
    monkeypatch.setattr(ceilings, "CPU_PROBE_SIZE", 64)
    factors: list[torch.Tensor] = []
    monkeypatch.setattr(torch, "_int_mm", lambda *both: factors.extend(both))
    found = ceilings.probes(torch.device("cpu"), torch.float32, in_8_bits=True)
    found["int8_matmul_tflops"].run()
    assert [x.dtype for x in factors] == [torch.int8] * 2
    assert all((x != 0).float().mean() > 0.9 for x in factors)
    assert all(x.min() < -100 and x.max() > 100 for x in factors)


def test_this_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "PROBE_BYTES", 1 << 20)
    monkeypatch.setattr(ceilings, "CPU_PROBE_SIZE", 64)
    device = measured_device(torch.device("cpu"), torch.float32, repeats=2)
    assert device.name == "this CPU"
    assert "thread" in device.source
    assert device.is_measured
    assert device.bandwidth > 1e6
    assert device.rates[torch.float32] > 1e6
