"""benchmarks/gpu/attention.py without a GPU: what it refuses, counts, prints and draws."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not available on this platform")

from benchmarks.clock import Clock
from benchmarks.gpu import attention as benchmark
from benchmarks.gpu.contenders import OURS, Problem

SMALL, LARGE = Problem(1, 8, 8, 2, 16), Problem(1, 16, 16, 2, 16)
SPEED = benchmark.Chart(
    "forward, in small", "forward", "T", (SMALL, LARGE), "tflops", "TFLOP/s", ceiling="matmul"
)
MEMORY = benchmark.Chart("memory", "backward", "T", (SMALL,), "peak_bytes", "GB", 1e9)


def row(contender, right=True, **figures):
    return {"contender": contender, "right": right, **figures}


SPEED_ROWS = [
    row(OURS, tflops=300.0),
    row("flash, heads expanded", tflops=100.0),
    row("flash, enable_gqa", tflops=200.0),
    row("cudnn, enable_gqa", right=False, tflops=900.0),
    {"contender": "efficient, enable_gqa", "refused": "no"},
]
MEMORY_ROWS = [
    row(OURS, peak_bytes=2e9),
    row("flash, heads expanded", peak_bytes=5e9),
    row("flash, heads copied", peak_bytes=9e9),
]
RESULTS = {
    ("forward", SMALL): SPEED_ROWS,
    ("forward", LARGE): SPEED_ROWS,
    ("backward", SMALL): MEMORY_ROWS,
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_that_it_needs_one(capsys):
    assert benchmark.main([]) == 1
    assert capsys.readouterr().err == ("benchmarks.gpu.attention needs a GPU: PyTorch sees none\n")


def test_each_backend_counts_in_its_fastest_form_that_is_right():
    assert benchmark.value(SPEED_ROWS, OURS, SPEED) == 300
    assert benchmark.value(SPEED_ROWS, "flash", SPEED) == 200
    assert math.isnan(benchmark.value(SPEED_ROWS, "cudnn", SPEED))
    assert math.isnan(benchmark.value(SPEED_ROWS, "efficient", SPEED))


def test_memory_is_compared_with_the_heads_as_views():
    assert benchmark.value(MEMORY_ROWS, OURS, MEMORY) == 2
    assert benchmark.value(MEMORY_ROWS, "flash", MEMORY) == 5


def test_the_tables_show_our_share_of_the_ceiling_and_plots_need_matplotlib(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    benchmark.report([SPEED, MEMORY], RESULTS, {"matmul": 600.0}, tmp_path / "attention_x.json")
    shown = capsys.readouterr()
    lines = [line.split() for line in shown.out.splitlines()]
    assert lines[1][:3] == ["T", OURS, "flash"]
    assert lines[2] == ["8", "300", "200", "-", "-", "-", "-", "-", "0.50"]
    assert "no plot" in shown.err
    assert not list(tmp_path.iterdir())


def test_plots_are_png_files_beside_the_results(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    benchmark.report([SPEED, MEMORY], RESULTS, {"matmul": 600.0}, tmp_path / "attention_x.json")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["attention_x_forward_in_small.png", "attention_x_memory.png"]


def test_a_problem_of_two_charts_is_measured_once(monkeypatch):
    calls = []

    def measure(problem, clock, repeats):
        calls.append(problem)
        return SPEED_ROWS

    monkeypatch.setitem(benchmark.MEASURES, "forward", measure)
    results = benchmark.measure_all(Clock(torch.device("cpu")), [SPEED, SPEED], 1)
    assert calls == [SMALL, LARGE]
    assert results == {("forward", SMALL): SPEED_ROWS, ("forward", LARGE): SPEED_ROWS}


def test_the_charts_cover_sequences_to_16k_and_batches_to_256():
    charts = benchmark.charts()
    assert len({chart.name for chart in charts}) == len(charts)
    problems = {(chart.kind, problem) for chart in charts for problem in chart.problems}
    for kind in ("forward", "backward"):
        assert {p.T for k, p in problems if k == kind} == {512, 1024, 2048, 4096, 8192, 16384}
    assert {p.B for k, p in problems if k == "decode"} == {1, 8, 16, 32, 64, 128, 256}
    assert all(p.T == 1 for k, p in problems if k == "decode")
