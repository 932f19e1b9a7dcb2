"""benchmarks/mqa_vs_mha.py and step_profile.py: what they compare and count, and that they run."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cpu_products
import mqa_vs_mha
import pytest
import step_profile
import torch
from mqa_gpt.generation.decode_graph import Decoder
from torch import nn

from mqa_gpt import GPT, GPTConfig, KVCache, config
from mqa_gpt.bench import ceilings
from mqa_gpt.bench import run as bench
from mqa_gpt.bench.ceilings import Ceilings
from mqa_gpt.bench.counts import Work, work_by_part
from mqa_gpt.bench.run import random_model
from mqa_gpt.fast import flat as inlining
from mqa_gpt.fast.packing import can_pack
from tests.helpers import quartiles_away, random_ids, relative_error, tiny_config

TINY = (2, 3, 60, 97, 112, "gelu", 0)  # layers, heads, width, vocabulary, context
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


@pytest.fixture
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An official shape that is measured in no time; the number of threads is put back."""
    threads = torch.get_num_threads()
    monkeypatch.setitem(config.PRESETS, "tiny", TINY)
    monkeypatch.setattr(ceilings, "PROBE_BYTES", 1 << 20)
    monkeypatch.setattr(ceilings, "CPU_PROBE_SIZE", 64)
    yield "tiny"
    torch.set_num_threads(threads)


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
    step()
    step()
    assert seen == [(3, 20)] * 4


def test_a_step_that_generate_would_replay_is_recorded_before_it_is_timed_and_keeps_its_place(
    tiny_shape, graphs, monkeypatch
):
    monkeypatch.setattr(mqa_vs_mha, "can_replay", lambda model: True)
    places = set()
    run = Decoder.run

    def seen(self: Decoder) -> None:
        places.add((*self.state.cache.lengths.tolist(), self.state.cache.max_length))
        run(self)

    monkeypatch.setattr(Decoder, "run", seen)
    models = models_of_both(tiny_shape)
    case = mqa_vs_mha.measure(models, 2, 20, 3, False)
    assert {len(case["times"][name]["seconds"]) for name in ("MQA", "MHA")} == {3}
    assert places == {(19, 19, 20)}
    assert [graph.replays for graph in graphs] == [1 + 1 + 3] * 2  # when recorded, to warm up


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


def test_plots_are_png_files(tmp_path):
    pytest.importorskip("matplotlib")
    results = Path(mqa_vs_mha.__file__).parent / "results"
    found = json.loads((results / "mqa_vs_mha_tiny_starcoder_py_cpu.json").read_text())
    mqa_vs_mha.plot(found["figures"], "title", tmp_path / "a.png")
    found = json.loads((results / "step_profile_tiny_starcoder_py_cpu.json").read_text())
    step_profile.plot(found["figures"]["parts"], "title", tmp_path / "b.png")
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000


def test_without_matplotlib_there_are_results_and_no_plot(
    tiny_shape, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    output = tmp_path / "result.json"
    options = ["--shape", tiny_shape, "--device", "cpu", "--context", "20", "--repeats", "2"]
    step_profile.main([*options, "--output", str(output)])
    assert list(tmp_path.iterdir()) == [output]
    assert "no plot: matplotlib is not installed" in capsys.readouterr().err


def test_a_case_that_does_not_fit_is_left_out_with_the_reason(tiny_shape, monkeypatch):
    monkeypatch.setattr(mqa_vs_mha, "available_memory", lambda device: 1000)
    models = models_of_both(tiny_shape)
    case = mqa_vs_mha.measure(models, 1, 20, 3, False)
    assert "do not fit" in case["left_out"]
    assert "times" not in case


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
    config = tiny_config()
    work = work_by_part(config, 1, 20, torch.float32, itemsize=1, is_prefill=False)
    assert {name for name, part in work.items() if part.itemsize == 1} == {
        *("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "lm_head")
    }
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
        clock = step_profile.Clock(torch.device("cpu"))
        with step_profile.step_of_parts(model, cache, prefill, step_profile.profiler_part) as step:
            found = step_profile.profiled(step, clock, 2)
        names = {part for part, _ in found}
        assert {name for part, name in found if part == "mlp.c_fc"} >= {"aten::addmm", "Python"}
        assert all(seconds >= 0 for seconds in found.values())
    assert (
        names == work_by_part(config, 2, 20, torch.float32, itemsize=4, is_prefill=prefill).keys()
    )
    assert inlining.is_plain(model)  # nothing is left of the names
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

    found = step_profile.profiled(step, step_profile.Clock(torch.device("cpu")), 3)
    times = bench.take_turns({"step": step}, 9, "")["step"]
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


def test_the_answers_in_the_readme_are_those_of_the_results():
    folder = Path(mqa_vs_mha.__file__).parent
    text = " ".join((folder / "README.md").read_text().split())

    found = json.loads((folder / "results/mqa_vs_mha_tiny_starcoder_py_cpu.json").read_text())
    figures = found["figures"]
    ratios = {(c["batch"], c["context"]): c["ratio"] for c in figures["cases"]}
    for case in ((1, 256), (1, 4096), (8, 4096)):
        assert f"{ratios[case]['median']:.2f} times" in text
    rows = figures["largest_batch"]["rows"]["4096"]
    assert f"{rows['MQA']} rows of 4,096 tokens fit into 16 GB instead of {rows['MHA']}." in text
    away = [q / ratio["median"] - 1 for ratio in ratios.values() for q in ratio["quartiles"]]
    assert max(map(abs, away)) < 0.02


PROFILES = [
    *("tiny_starcoder_py_cpu", "tiny_starcoder_py_cpu_int8"),
    *("starcoderbase-1b_cpu", "starcoderbase-1b_cpu_int8"),
    *("tiny_starcoder_py_cpu_prefill", "tiny_starcoder_py_cpu_int8_prefill"),
]


def test_the_table_of_profiles_in_the_readme_is_that_of_the_results():
    folder = Path(step_profile.__file__).parent
    columns = []
    for name in PROFILES:
        path = folder / f"results/step_profile_{name}.json"
        figures = json.loads(path.read_text())["figures"]
        step = figures["step_seconds"]
        parts = {part["part"]: part for part in figures["parts"]}
        names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "lm_head")
        linear = [parts.pop(name) for name in names]
        least = sum(part["least_seconds"] for part in linear)
        column = [
            f"{1000 * step['undivided']:,.1f}",
            f"{step['undivided'] / step['least']:.2f}",
            f"{sum(part['share'] for part in linear):.0%}",
            f"{least / sum(part['seconds'] for part in linear):.0%}",
            f"{parts.pop('attention')['share']:.0%}",
            f"{parts.pop('GELU')['share']:.0%}",
            f"{sum(part['share'] for part in parts.values()):.0%}",
        ]
        columns.append(column)
    text = (folder / "README.md").read_text()
    rows = [list(row) for row in zip(*columns, strict=True)]
    assert cells_below(text, "| Zen 4 | tiny: a step, float32 |", 1) == rows


BENCHMARKS = Path(mqa_vs_mha.__file__).parent
MACHINES = {"Zen 4": "zen4", "Zen 5": "zen5", "Intel Xeon": "avx512"}
# The columns of the tables of `mqa-gpt bench`: of which file, and what.
RATES = [
    ("float32", "mqa-gpt"),
    ("int8", "mqa-gpt"),
    ("int8", "transformers"),
    ("int8", "ctranslate2 float32"),
    ("int8", "ctranslate2 int8"),
]
RATIOS = [
    ("tiny_starcoder_py_float32", "transformers"),
    ("tiny_starcoder_py_float32", "ctranslate2 float32"),
    ("tiny_starcoder_py_int8", "transformers"),
    ("tiny_starcoder_py_int8", "ctranslate2 int8"),
    ("starcoderbase-1b_int8", "ctranslate2 int8"),
]


def results(name: str) -> Any:
    return json.loads((BENCHMARKS / f"results/{name}.json").read_text())


def test_the_tables_of_the_readme_are_those_of_the_results():
    text = (BENCHMARKS / "README.md").read_text()

    for title, machine in MACHINES.items():
        median = {
            (name, result["contender"], result["test"], result["batch"]): result["median"]
            for name in ("float32", "int8")
            for result in results(f"bench_tiny_starcoder_py_{name}_{machine}")["results"]
        }
        rows = [(test, batch) for batch in (1, 8) for test in ("pp128", "tg31 @ d128")]
        expected = [[f"{median[*column, *row]:,.1f}" for column in RATES] for row in rows]
        assert cells_below(text, f"| {title} |", 1) == expected

    def faster(machine: str, name: str, peer: str, batch: int) -> str:
        (ratio,) = (
            result["ours_faster"]
            for result in results(f"bench_{name}_{machine}")["results"]
            if (result["contender"], result["test"], result["batch"])
            == (peer, "tg31 @ d128", batch)
        )
        return f"{ratio:.2f}"

    for machine in ("zen4", "zen5"):
        title = machine.replace("zen", "Zen ")
        (line,) = re.findall(rf"\| {title}, how many times as fast \|(.*)", text)
        assert re.findall(r"\d+\.\d\d", line) == [
            faster(machine, *column, batch) for column in RATIOS for batch in (1, 8)
        ]

    bfloat16 = {
        shape: {
            (result["test"], result["batch"]): f"{result['ours_faster']:.2f}"
            for result in results(f"bench_{shape}_bfloat16_zen4")["results"]
            if result["contender"] == "transformers"
        }
        for shape in ("tiny_starcoder_py", "starcoderbase-1b")
    }
    cases = [(test, batch) for test in ("pp128", "tg31 @ d128") for batch in (1, 8)]
    expected = [[ratios[case] for case in cases] for ratios in bfloat16.values()]
    assert cells_below(text, "| bfloat16, Zen 4 |", 1) == expected

    ms = {
        (product["K"], product["N"], product["rows"], product["product"]): product["ms"]
        for product in results("cpu_products_zen4")["figures"]
    }
    sizes = [(768, 3072), (768, 49152), (2048, 8192)]
    expected = [
        [f"{ms[K, N, rows, name]:.2f}" for name in cpu_products.CONTENDERS]
        for K, N in sizes
        for rows in (1, 2, 8, 128)
    ]
    assert cells_below(text, "| K x N |", 2) == expected


def reached(shape: str) -> list[str]:
    """What is aimed at, as far as a shape reaches it on Zen 4, in the order of the table."""
    decoded = results(f"cpu_decode_{shape}_zen4")["figures"]
    batches = [decoded[f"batch {batch}"] for batch in (1, 8)]

    def beside_transformers(name: str, ratio: str) -> list[float]:
        return [batch[name][ratio] for batch in batches]

    def beside_ctranslate2(name: str) -> list[float]:
        found = measured(f"{shape}_{name}_zen4", f"ctranslate2 {name}")
        return [found["tg31 @ d128", batch]["ours_faster"] for batch in (1, 8)]

    ratios = [
        *beside_transformers("mqa-gpt", "decode_ratio"),
        *beside_ctranslate2("float32"),
        *beside_transformers("mqa-gpt int8", "decode_ratio"),
        *beside_ctranslate2("int8"),
        *beside_transformers("mqa-gpt", "prefill_ratio"),
        *beside_transformers("mqa-gpt int8", "prefill_ratio"),
        decoded["cold start"]["ratio"],
    ]
    return [f"{ratio:.2f}" for ratio in ratios]


def test_what_is_aimed_at_and_not_reached_is_said_to_be_so():
    text = (BENCHMARKS / "README.md").read_text()
    (table,) = re.findall(r"\| at least \| tiny_starcoder_py \|.*\n.*\n((?:\|.*\n)+)", text)
    rows = [line.strip("| \n").split(" | ")[1:] for line in table.splitlines()]
    columns = [reached(shape) for shape in ("tiny_starcoder_py", "starcoderbase-1b")]
    expected = [
        [aim, *(found if float(found) >= float(aim) else f"{found}, missed" for found in pair)]
        for (aim, *_), pair in zip(rows, zip(*columns, strict=True), strict=True)
    ]
    assert rows == expected


def test_the_memory_in_the_readme_is_that_of_the_result():
    text = (BENCHMARKS / "README.md").read_text()
    (answer,) = re.findall(r"\*\*Answer:\*\* hardly more than the weights\.(.*?)\n\n", text, re.S)
    figures = results("cpu_memory_starcoderbase-1b")["figures"]
    peaks = (figures["peak_bytes_after"][when] for when in ("load", "import", "decoding"))
    expected = [f"{count / 1e9:.2f}" for count in (figures["checkpoint_bytes"], *peaks)]
    assert re.findall(r"(\d+\.\d+) GB", answer) == expected


def measured(name: str, contender: str) -> dict[tuple[str, int], dict[str, Any]]:
    """What a file of `mqa-gpt bench` holds of a contender in the tests of the tables."""
    return {
        (result["test"], result["batch"]): result
        for result in results(f"bench_{name}")["results"]
        if result["contender"] == contender and result["test"] in ("pp128", "tg31 @ d128")
    }


def spread_of_rates(machine: str) -> str:
    found = [
        result
        for name, contender in RATES
        for result in measured(f"tiny_starcoder_py_{name}_{machine}", contender).values()
    ]
    return quartiles_away(
        (result["median"], [result["tokens"] / seconds for seconds in result["seconds"]])
        for result in found
    )


def spread_of_ratios(columns: list[tuple[str, str]], tests: str = "") -> str:
    """Of the tests whose names begin so."""
    numbers = []
    for name, peer in columns:
        ours = measured(name, "mqa-gpt")
        for case, result in measured(name, peer).items():
            if case[0].startswith(tests):
                rounds = zip(result["seconds"], ours[case]["seconds"], strict=True)
                numbers.append((result["ours_faster"], [their / our for their, our in rounds]))
    return quartiles_away(numbers)


def spread_of_products() -> str:
    longer = [
        product["max_ms"] / product["min_ms"] - 1
        for product in results("cpu_products_zen4")["figures"]
        if product.get("rows") in (1, 2, 8, 128)
    ]
    return f"{math.ceil(100 * statistics.median(longer))}%"


def spread_of_speculation() -> str:
    figures = results("speculation_cpu")["figures"]["by_agreement"].values()

    def speedups(times: dict[str, Any]) -> list[float]:
        rounds = zip(*(times[name]["seconds"] for name in ("first", "plain", "draft")), strict=True)
        return [(plain - first) / (draft - first) for first, plain, draft in rounds]

    return quartiles_away((figure["speedup"], speedups(figure["times"])) for figure in figures)


ZENS = [(f"{name}_{machine}", peer) for machine in ("zen4", "zen5") for name, peer in RATIOS]
BFLOAT16 = [
    (f"{shape}_bfloat16_zen4", "transformers")
    for shape in ("tiny_starcoder_py", "starcoderbase-1b")
]


@pytest.mark.parametrize(
    ("words", "spread"),
    [
        ("on Zen 4 at most", lambda: spread_of_rates("zen4")),
        ("on Zen 5 at most", lambda: spread_of_rates("zen5")),
        ("on the Xeon at most", lambda: spread_of_rates("avx512")),
        ("The quartiles of the rounds' ratios are at most", lambda: spread_of_ratios(ZENS, "tg")),
        ("ratios in bfloat16 are at most", lambda: spread_of_ratios(BFLOAT16)),
        ("the slowest round took at most", spread_of_products),
        ("The quartiles of the rounds' speedups are at most", spread_of_speculation),
    ],
)
def test_the_spreads_in_the_readme_are_those_of_the_results(words: str, spread: Callable[[], str]):
    text = " ".join((BENCHMARKS / "README.md").read_text().split())
    assert re.findall(rf"{words} (\d+%)", text) == [spread()]


def test_the_answers_about_speculation_in_the_readme_are_those_of_the_results():
    text = (BENCHMARKS / "README.md").read_text()
    figures = results("speculation_cpu")["figures"]
    speedup = {name: f"{f['speedup']:.2f}" for name, f in figures["by_agreement"].items()}
    rows = [
        [speedup[f"{dtype}, agreement {agreement}"] for agreement in (0, 0.3, 0.6, 0.8, 0.95)]
        for dtype in ("float32", "int8")
    ]
    assert cells_below(text, "| draft agrees with |", 1) == rows
    for task in figures["of_the_prompt"].values():
        low, high = task["speedup_range"]
        assert f"{task['speedup']:.2f} times ({low:.2f} to {high:.2f})" in " ".join(text.split())


def cells_below(text: str, heading: str, labels: int) -> list[list[str]]:
    """What a table holds below its heading, without the first columns."""
    _, _, *lines = text[text.index(heading) :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.split("|")[1 + labels : -1]] for line in lines]


@pytest.mark.parametrize(
    "name", [name for name in cpu_products.CONTENDERS if name.startswith(("float32", "bfloat16"))]
)
def test_a_product_without_integers_is_that_of_the_weight(name: str):
    dtype = torch.float32 if name.startswith("float32") else torch.bfloat16
    if name != str(dtype).removeprefix("torch.") and not can_pack(nn.Linear(1, 1, dtype=dtype)):
        pytest.skip(f"no packed {dtype} products here")
    weight = torch.randn(32, 64)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02  # bfloat16 has 8 bits
    with torch.inference_mode():
        bytes_, product = cpu_products.CONTENDERS[name](weight)
        assert bytes_ == weight.numel() * dtype.itemsize
        for rows in (1, 2, 5):
            x = torch.randn(rows, 64)
            assert relative_error(product(x), x @ weight.t()) < tolerance


def test_products_are_timed_and_what_is_not_there_is_said(tmp_path: Path, monkeypatch):
    def absent(weight: torch.Tensor) -> cpu_products.Copy:
        raise RuntimeError("not in this PyTorch")

    monkeypatch.setitem(cpu_products.CONTENDERS, "absent", absent)
    output = tmp_path / "products.json"
    arguments = [
        "--sizes",
        "64x32",
        "--rows",
        "1",
        "3",
        "--repeats",
        "2",
        "--megabytes",
        "1",
        "--output",
    ]
    cpu_products.main([*arguments, str(output)])
    figures = json.loads(output.read_text())["figures"]
    timed = [row for row in figures if "ms" in row]
    assert {"float32", "float32 packed"} <= {row["product"] for row in timed}
    assert {(row["K"], row["N"]) for row in timed} == {(64, 32)}
    assert {row["rows"] for row in timed} == {1, 3}
    plain = next(row for row in timed if row["product"] == "float32")
    assert plain["copies"] == 1_000_000 // (4 * 64 * 32)
    assert plain["gb_per_s"] == pytest.approx(4 * 64 * 32 / plain["ms"] / 1e6)
    assert [row for row in figures if row["product"] == "absent"] == [
        {"K": 64, "N": 32, "product": "absent", "reason": "not in this PyTorch"}
    ]
