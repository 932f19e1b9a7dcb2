"""benchmarks/step_profile.py: what it measures and counts, and that it runs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from benchmarks import step_profile
from benchmarks.clock import Clock
from mqa_gpt import GPT, KVCache
from mqa_gpt.bench.ceilings import Ceilings
from mqa_gpt.bench.counts import Work, work_by_part
from mqa_gpt.bench.run import random_model
from mqa_gpt.bench.timing import take_turns
from mqa_gpt.fast import compiled
from mqa_gpt.fast.plain import is_plain
from tests.helpers import random_ids, tiny_config

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


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


def random_tiny() -> tuple[GPT, KVCache]:
    model = random_model(tiny_config(), torch.float32, torch.device("cpu"))
    return model, KVCache(model.config, 2, 20, dtype=torch.float32)


def work(model: GPT, is_prefill: bool) -> dict[str, Work]:
    return work_by_part(model.config, 2, 20, torch.float32, itemsize=4, is_prefill=is_prefill)


@pytest.mark.parametrize("prefill", [False, True])
def test_every_module_is_recorded_and_the_logits_stay_the_same(prefill):
    model, cache = random_tiny()
    ids = random_ids(model.config, 2, 9)
    with torch.inference_mode():
        before, append = model(ids), KVCache.append
    with step_profile.step_of_parts(model, cache, prefill) as step:
        found = step_profile.profiled(step, Clock(torch.device("cpu")), 2)
    assert {name for part, name in found if part == "mlp.c_fc"} >= {"aten::addmm", "Python"}
    assert all(seconds >= 0 for seconds in found.values())
    assert {part for part, _ in found} == work(model, prefill).keys()
    assert is_plain(model)  # nothing is left of the names
    assert KVCache.append is append
    with torch.inference_mode():
        assert torch.equal(model(ids), before)


@pytest.mark.slow
def test_every_phase_of_the_compiled_pass_is_timed_while_it_runs(monkeypatch):
    pytest.importorskip("numba")
    model, cache = random_tiny()
    cache.kv.normal_()
    for is_prefill in (False, True):
        seconds = step_profile.compiled_parts(model, cache, is_prefill, 3)
        # The products' phases include these two, and the others have theirs.
        assert seconds.keys() == work(model, is_prefill).keys() - {"GELU", "split"}
        assert all(each > 0 for each in seconds.values())
        step = step_profile.make_step(model, cache, is_prefill)
        times = take_turns({"step": step}, 9, "")["step"]
        assert sum(seconds.values()) < 100 * min(times)


def test_a_decode_step_is_that_of_the_plain_loop_and_a_prefill_reads_the_whole_context(monkeypatch):
    model, cache = random_tiny()
    monkeypatch.setattr(compiled, "HAS_NUMBA", False)
    calls, seen = [], []  # of the model, by tokens; keys in the first layer
    call, append = GPT.__call__, KVCache.append
    monkeypatch.setattr(
        GPT,
        "__call__",
        lambda self, ids, **rest: calls.append(ids.shape) or call(self, ids, **rest),
    )
    monkeypatch.setattr(
        KVCache,
        "append",
        lambda self, layer, kv: seen.append(self.end + kv.shape[1]) or append(self, layer, kv),
    )
    for is_prefill in (False, True):
        step = step_profile.make_step(model, cache, is_prefill)
        step()
        step()
    assert calls == [(2, 1)] * 2 + [(2, 20)] * 2
    assert seen == [20] * 4 * 2


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


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        [],
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
    assert figures["operators"] == []  # all of it is one function
    assert (figures["ceilings"]["int8_matmul_tflops"] is not None) == ("int8" in changes)
    assert all(option in found["command"] for option in changes)
    assert output.with_suffix(".png").exists() == HAS_MATPLOTLIB
    assert "of roofline" in capsys.readouterr().out


def test_without_matplotlib_there_are_results_and_no_plot(
    tiny_shape, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(compiled, "HAS_NUMBA", False)
    output = tmp_path / "result.json"
    options = ["--shape", tiny_shape, "--device", "cpu", "--context", "20", "--repeats", "2"]
    step_profile.main([*options, "--output", str(output)])
    assert list(tmp_path.iterdir()) == [output]
    assert json.loads(output.read_text())["figures"]["operators"]
    assert "no plot: matplotlib is not installed" in capsys.readouterr().err


def test_one_thread_without_the_compiled_pass_is_refused(tiny_shape, monkeypatch, capsys):
    monkeypatch.setattr(compiled, "HAS_NUMBA", False)
    options = ["--shape", tiny_shape, "--device", "cpu", "--context", "20", "--one-thread"]
    assert step_profile.main(options) == 2
    assert "--one-thread needs numba" in capsys.readouterr().err


def test_the_plot_is_a_png_file(tmp_path):
    pytest.importorskip("matplotlib")
    limits = Ceilings(read_gb_per_s=2, copy_gb_per_s=1, matmul_tflops=0.001)
    work = {"a": Work(2_000_000_000, 5), "b": Work(8, 3_000_000_000)}
    rows = step_profile.table({"b": 6.0, "a": 2.0}, work, limits)
    step_profile.plot(rows, "title", tmp_path / "a.png")
    drawn = (tmp_path / "a.png").read_bytes()
    assert drawn.startswith(b"\x89PNG")
    assert len(drawn) > 10_000
