"""benchmarks/step_profile.py: what it measures and counts, and that it runs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from benchmarks import step_profile
from benchmarks.clock import Clock
from benchmarks.measure import ROOT
from mqa_gpt import GPT, KVCache
from mqa_gpt.bench.ceilings import Ceilings
from mqa_gpt.bench.counts import Work, work_by_part
from mqa_gpt.bench.run import random_model
from mqa_gpt.bench.timing import take_turns
from mqa_gpt.fast.flat import is_plain
from tests.helpers import random_ids, tiny_config

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


def test_a_part_takes_its_time_less_that_of_the_parts_inside():
    times = iter([0, 1, 2, 3, 5, 9])
    timer = step_profile.PartTimer(lambda: next(times))
    with timer.part("outer"):
        with timer.part("inner"):  # 1 to 2
            pass
        with timer.part("inner"):  # 3 to 5
            pass
    assert timer.seconds == {"inner": 3, "outer": 6}


def test_a_part_is_limited_by_what_takes_longer():
    limits = Ceilings(read_gb_per_s=2, copy_gb_per_s=1, matmul_tflops=0.001)
    work = {"a": Work(2_000_000_000, 5), "b": Work(8, 3_000_000_000)}
    a, b = step_profile.table({"b": 6.0, "a": 2.0}, work, limits)[::-1]
    assert (a["least_seconds"], a["limited_by"], a["of_roofline"]) == (1, "memory", 0.5)
    assert (b["least_seconds"], b["limited_by"], b["of_roofline"]) == (3, "arithmetic", 0.5)
    assert (a["share"], b["share"]) == (0.25, 0.75)


def test_only_products_with_8_bit_weights_are_measured_by_the_rate_of_8_bit_products():
    limits = Ceilings(2, 1, matmul_tflops=0.001, int8_matmul_tflops=0.004)
    work = {"a": Work(0, 4_000_000_000, 1), "b": Work(0, 1_000_000_000)}
    rows = step_profile.table({"a": 1.0, "b": 1.0}, work, limits)
    assert [row["least_seconds"] for row in rows] == [1, 1]


@pytest.mark.parametrize("prefill", [False, True])
@pytest.mark.parametrize("measure", ["timer", "profiler"])
def test_every_part_of_the_model_is_measured_and_the_logits_stay_the_same(measure, prefill):
    config = tiny_config()
    model = random_model(config, torch.float32, torch.device("cpu"))
    ids = random_ids(config, 2, 9)
    with torch.inference_mode():
        before = model(ids)
    cache, append = KVCache(config, 2, 20, dtype=torch.float32), KVCache.append
    if measure == "timer":
        timer = step_profile.PartTimer(lambda: 0.0)
        with step_profile.step_of_parts(model, cache, prefill, timer.part) as step:
            names = step_profile.timed_parts(step, timer, 2).keys()
    else:
        clock = Clock(torch.device("cpu"))
        with step_profile.step_of_parts(model, cache, prefill, step_profile.profiler_part) as step:
            found = step_profile.profiled(step, clock, 2)
        names = {part for part, _ in found}
        assert {name for part, name in found if part == "mlp.c_fc"} >= {"aten::addmm", "Python"}
        assert all(seconds >= 0 for seconds in found.values())
    assert (
        names == work_by_part(config, 2, 20, torch.float32, itemsize=4, is_prefill=prefill).keys()
    )
    assert is_plain(model)  # nothing is left of the names
    assert KVCache.append is append
    with torch.inference_mode():
        assert torch.equal(model(ids), before)


@pytest.mark.parametrize("in_parts", [False, True])
def test_a_decode_step_is_that_of_the_plain_loop_and_a_prefill_reads_the_whole_context(
    in_parts, monkeypatch
):
    model = random_model(tiny_config(), torch.float32, torch.device("cpu"))
    cache = KVCache(model.config, 2, 20, dtype=torch.float32)
    calls = []  # of the model itself, by numbers of tokens
    call = GPT.__call__
    monkeypatch.setattr(
        GPT,
        "__call__",
        lambda self, ids, **rest: calls.append(ids.shape) or call(self, ids, **rest),
    )
    seen = []  # numbers of keys in the first layer
    append = KVCache.append
    monkeypatch.setattr(
        KVCache,
        "append",
        lambda self, layer, kv: seen.append(self.end + kv.shape[1]) or append(self, layer, kv),
    )

    def run(is_prefill: bool) -> None:
        if in_parts:
            part = step_profile.profiler_part
            with step_profile.step_of_parts(model, cache, is_prefill, part) as step:
                step()
        else:
            step_profile.make_step(model, cache, is_prefill)()

    for _ in range(2):
        run(False)
    assert (calls, seen) == ([], [20] * 2 * 2)
    for _ in range(2):
        run(True)
    assert (calls, seen) == ([(2, 20)] * 2, [20] * 4 * 2)


def test_what_runs_several_times_in_a_step_is_added_up():
    x = torch.rand(500, 500)

    def step() -> None:
        with step_profile.profiler_part("a"):
            for rows in (x, x[:1], x[:1]):
                rows @ x

    found = step_profile.profiled(step, Clock(torch.device("cpu")), 3)
    times = take_turns({"step": step}, 9, "")["step"]
    # The median of the three products is that of one row.
    assert found["a", "aten::mm"] > 0.2 * min(times)


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["--one-thread"],
        ["--quantize", "int8"],
        ["--prefill"],
        ["--one-thread", "--prefill", "--quantize", "int8"],
    ],
)
def test_a_profile_is_written_as_json_and_drawn(tiny_shape, tmp_path: Path, changes, capsys):
    output = tmp_path / "result.json"
    options = ["--shape", tiny_shape, "--device", "cpu", "--context", "20", "--repeats", "2"]
    assert step_profile.main([*options, "--output", str(output), *changes]) == 0
    found = json.loads(output.read_text())
    figures = found["figures"]
    assert sum(part["share"] for part in figures["parts"]) == pytest.approx(1)
    assert bool(figures["operators"]) != ("--one-thread" in changes)
    assert (figures["ceilings"]["int8_matmul_tflops"] is not None) == ("int8" in changes)
    assert all(option in found["command"] for option in changes)
    assert output.with_suffix(".png").exists() == HAS_MATPLOTLIB
    assert "of roofline" in capsys.readouterr().out


def test_without_matplotlib_there_are_results_and_no_plot(
    tiny_shape, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    output = tmp_path / "result.json"
    options = ["--shape", tiny_shape, "--device", "cpu", "--context", "20", "--repeats", "2"]
    step_profile.main([*options, "--output", str(output)])
    assert list(tmp_path.iterdir()) == [output]
    assert "no plot: matplotlib is not installed" in capsys.readouterr().err


def test_the_plot_is_a_png_file(tmp_path):
    pytest.importorskip("matplotlib")
    file = ROOT / "benchmarks/results/step_profile_tiny_starcoder_py_cpu.json"
    step_profile.plot(json.loads(file.read_text())["figures"]["parts"], "title", tmp_path / "a.png")
    drawn = (tmp_path / "a.png").read_bytes()
    assert drawn.startswith(b"\x89PNG")
    assert len(drawn) > 10_000
