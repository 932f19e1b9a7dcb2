"""The numbers in benchmarks/README.md are those of the results."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.cpu import products
from benchmarks.measure import ROOT
from tests.helpers import quartiles_away

BENCHMARKS = ROOT / "benchmarks"
README = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
TEXT = " ".join(README.split())
MACHINES = {"Zen 4": "zen4", "Zen 5": "zen5", "Intel Xeon": "avx512"}
# The columns of the tables of `mqa-gpt bench`: of which file, and what.
RATES = [
    ("float32", "mqa-gpt"),
    ("int8", "mqa-gpt"),
    ("float32", "transformers"),
    ("float32", "ctranslate2 float32"),
    ("int8", "ctranslate2 int8"),
]
RATIOS = [
    ("tiny_starcoder_py_float32", "transformers"),
    ("tiny_starcoder_py_float32", "ctranslate2 float32"),
    ("tiny_starcoder_py_int8", "transformers"),
    ("tiny_starcoder_py_int8", "ctranslate2 int8"),
    ("starcoderbase-1b_int8", "ctranslate2 int8"),
]


def test_the_answers_in_the_readme_are_those_of_the_results():

    figures = results("mqa_vs_mha_tiny_starcoder_py_cpu")["figures"]
    ratios = {(c["batch"], c["context"]): c["ratio"] for c in figures["cases"]}
    for case in ((1, 256), (1, 4096), (8, 4096)):
        assert f"{ratios[case]['median']:.2f} times" in TEXT
    rows = figures["largest_batch"]["rows"]["4096"]
    assert f"{rows['MQA']} rows of 4,096 tokens fit into 16 GB instead of {rows['MHA']}." in TEXT
    away = [q / ratio["median"] - 1 for ratio in ratios.values() for q in ratio["quartiles"]]
    assert max(map(abs, away)) < 0.02


PROFILES = [
    *("tiny_starcoder_py_cpu", "tiny_starcoder_py_cpu_int8"),
    *("starcoderbase-1b_cpu", "starcoderbase-1b_cpu_int8"),
    *("tiny_starcoder_py_cpu_prefill", "tiny_starcoder_py_cpu_int8_prefill"),
]


def test_the_table_of_profiles_in_the_readme_is_that_of_the_results():
    columns = []
    for name in PROFILES:
        figures = results(f"step_profile_{name}")["figures"]
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
    rows = [list(row) for row in zip(*columns, strict=True)]
    assert cells_below("| Zen 4 | tiny: a step, float32 |", 1) == rows


def results(name: str) -> Any:
    return json.loads((BENCHMARKS / f"results/{name}.json").read_text())


def test_the_tables_of_the_readme_are_those_of_the_results():

    for title, machine in MACHINES.items():
        median = {
            (name, result["contender"], result["test"], result["batch"]): result["median"]
            for name in ("float32", "int8")
            for result in results(f"bench_tiny_starcoder_py_{name}_{machine}")["results"]
        }
        rows = [(test, batch) for batch in (1, 8) for test in ("pp128", "tg31 @ d128")]
        expected = [[f"{median[*column, *row]:,.1f}" for column in RATES] for row in rows]
        assert cells_below(f"| {title} |", 1) == expected

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
        (line,) = re.findall(rf"\| {title}, how many times as fast \|(.*)", README)
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
    assert cells_below("| bfloat16, Zen 4 |", 1) == expected

    ms = {
        (product["K"], product["N"], product["rows"], product["product"]): product["ms"]
        for product in results("cpu_products_zen4")["figures"]
    }
    sizes = [(768, 3072), (768, 49152), (2048, 8192)]
    expected = [
        [f"{ms[K, N, rows, name]:.2f}" for name in products.PRODUCTS]
        for K, N in sizes
        for rows in (1, 2, 8, 128)
    ]
    assert cells_below("| K x N |", 2) == expected


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
    (table,) = re.findall(r"\| at least \| tiny_starcoder_py \|.*\n.*\n((?:\|.*\n)+)", README)
    rows = [line.strip("| \n").split(" | ")[1:] for line in table.splitlines()]
    columns = [reached(shape) for shape in ("tiny_starcoder_py", "starcoderbase-1b")]
    expected = [
        [aim, *(found if float(found) >= float(aim) else f"{found}, missed" for found in pair)]
        for (aim, *_), pair in zip(rows, zip(*columns, strict=True), strict=True)
    ]
    assert rows == expected


def test_the_memory_in_the_readme_is_that_of_the_result():
    (answer,) = re.findall(r"\*\*Answer:\*\* hardly more than the weights\.(.*?)\n\n", README, re.S)
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
    assert re.findall(rf"{words} (\d+%)", TEXT) == [spread()]


def test_the_answers_about_speculation_in_the_readme_are_those_of_the_results():
    figures = results("speculation_cpu")["figures"]
    speedup = {name: f"{f['speedup']:.2f}" for name, f in figures["by_agreement"].items()}
    rows = [
        [speedup[f"{dtype}, agreement {agreement}"] for agreement in (0, 0.3, 0.6, 0.8, 0.95)]
        for dtype in ("float32", "int8")
    ]
    assert cells_below("| the drafter is right |", 1) == rows
    for task in figures["of_the_prompt"].values():
        low, high = task["speedup_range"]
        assert f"{task['speedup']:.2f} times ({low:.2f} to {high:.2f})" in TEXT


def cells_below(heading: str, labels: int) -> list[list[str]]:
    """What a table holds below its heading, without the first columns."""
    _, _, *lines = README[README.index(heading) :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.split("|")[1 + labels : -1]] for line in lines]
