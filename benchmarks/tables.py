"""Update the tables of the documents from the files in benchmarks/results.

    python -m benchmarks.tables

A table stands between <!-- NAME --> and <!-- end -->. What no file holds is shown as a dash. A test
compares the documents with the files.
"""

from __future__ import annotations

import json
import math
import operator
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

from benchmarks.measure import ROOT
from mqa_gpt.bench.ceilings import Ceilings
from mqa_gpt.bench.report import BenchReport, Result

SHAPES = ("tiny_starcoder_py", "starcoderbase-1b")
BATCHES = (1, 8, 16)
DECODE, PREFILL = "tg31 @ d128", "pp128"
NONE = "–"
NAMED = ("torch", "numba", "transformers", "ctranslate2", "openvino")  # whose versions are shown

# The columns of the table of speeds: heading, the run of `mqa-gpt bench`, the program in it or
# "limit", and the program in cpu_start_*.json.
COLUMNS = (
    ("mqa-gpt", "float32", "mqa-gpt", "mqa-gpt"),
    ("CTranslate2", "float32", "ctranslate2 float32", "ctranslate2 float32"),
    ("OpenVINO", "float32", "openvino float32", ""),
    ("transformers", "float32", "transformers", "transformers"),
    ("limit", "float32", "limit", ""),
    ("mqa-gpt bfloat16", "bfloat16", "mqa-gpt", ""),
    ("mqa-gpt int8", "int8", "mqa-gpt", "mqa-gpt int8"),
    ("CTranslate2 int8", "int8", "ctranslate2 int8", "ctranslate2 int8"),
    ("OpenVINO int8", "int8", "openvino int8", ""),
    ("limit int8", "int8", "limit", ""),
)


@cache
def result(name: str) -> Any:
    """The contents of a file, or None."""
    path = ROOT / f"benchmarks/results/{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def measured(shape: str, kind: str, test: str, batch: int) -> dict[str, Any]:
    """The results of one test by `mqa-gpt bench`, by program. Of a large model, transformers has
    a run of its own, in which ours is measured again."""
    reports = (result(f"bench_{shape}_{kind}{end}") for end in ("_transformers", ""))
    return {
        found["contender"]: found
        for report in reports
        for found in (report["results"] if report else ())
        if (found["test"], found["batch"]) == (test, batch)
    }


def started(shape: str, program: str, what: str) -> float | None:
    """A figure of benchmarks.cpu.start."""
    found = result(f"cpu_start_{shape}")
    return found["figures"]["programs"].get(program, {}).get(what) if found else None


def shown(value: float | None, spec: str = ",.1f") -> str:
    return NONE if value is None else format(value, spec)


def markdown(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rate(shape: str, kind: str, program: str, test: str, batch: int) -> float | None:
    """Tokens per second; "limit" is what the bandwidth or the rate of products would allow us."""
    found = measured(shape, kind, test, batch)
    if program != "limit":
        return found[program]["median"] if program in found else None
    ours = found.get("mqa-gpt")
    return ours["median"] / (ours["mbu"] or ours["mfu"]) if ours else None


def speeds() -> str:
    """The one table."""
    rows = []
    for shape in SHAPES:
        for test, what in ((DECODE, "decode"), (PREFILL, "prefill")):
            for batch in BATCHES:
                found = [rate(shape, kind, name, test, batch) for _, kind, name, _ in COLUMNS]
                case = f"{what}, {batch} prompt{'s' * (batch > 1)}, tokens/s"
                rows.append([shape, case, *map(shown, found)])
        for what, case, unit in (
            ("seconds", "first token of a new process, s", 1.0),
            ("peak_bytes", "peak memory, GB", 1e9),
        ):
            cells = [started(shape, name, what) for *_, name in COLUMNS]
            rows.append(
                [shape, case, *(shown(None if x is None else x / unit, ".2f") for x in cells)]
            )
    rows = [row for row in rows if set(row[2:]) != {NONE}]
    return markdown(["", "", *(heading for heading, *_ in COLUMNS)], rows) + f"\n\n{spread()}"


def spread() -> str:
    """How far rounds are apart, and where they ran."""
    away: list[float] = []
    where: dict[str, set[str]] = {}  # dates by machine
    for shape in SHAPES:
        for kind in ("float32", "bfloat16", "int8"):
            report = result(f"bench_{shape}_{kind}")
            for found in report["results"] if report else ():
                if found["test"] in (DECODE, PREFILL) and len(found["seconds"]) > 1:
                    middle = statistics.median(found["seconds"])
                    quartiles = statistics.quantiles(found["seconds"], n=4, method="inclusive")
                    away += [abs(quartile / middle - 1) for quartile in quartiles]
            if report:
                cpu, versions = report["environment"]["cpu"], report["environment"]["versions"]
                named = ", ".join(
                    f"{name} {versions[name]}" for name in NAMED if versions.get(name)
                )
                at = f"{cpu['name']}, {cpu['capability']}, {cpu['threads']} threads; {named}"
                where.setdefault(at, set()).add(report["date"][:10])
    if not away:
        return "Not measured yet."
    at = "; and ".join(f"{at}; {', '.join(sorted(dates))}" for at, dates in where.items())
    return (
        f"Measured on {at}. The quartiles of the rounds are at most "
        f"{math.ceil(100 * max(away))}% away from the medians."
    )


def wins(kind: str, program: str, test: str, batch: int) -> bool:
    """Whether a program is faster than each other one in at least three quarters of the rounds."""
    shown_too = {name for _, of_kind, name, _ in COLUMNS if of_kind == kind}
    found = measured(SHAPES[0], kind, test, batch)
    found = {name: each for name, each in found.items() if name in shown_too}
    ours = found.pop(program, None)
    return bool(ours and found) and all(
        statistics.quantiles(
            map(operator.truediv, theirs["seconds"], ours["seconds"]), n=4, method="inclusive"
        )[0]
        > 1
        for theirs in found.values()
    )


def short_speeds() -> str:
    """The table of README.md: one shape, without the limits."""
    columns = [c for c in COLUMNS if c[2] != "limit" and c[1] != "bfloat16"]
    rows = []
    for test, what in ((DECODE, "decode"), (PREFILL, "prefill")):
        for batch in (1, 8):
            found = [rate(SHAPES[0], kind, name, test, batch) for _, kind, name, _ in columns]
            cells = [
                f"**{shown(x)}**" if wins(kind, name, test, batch) else shown(x)
                for x, (_, kind, name, _) in zip(found, columns, strict=True)
            ]
            rows.append([f"{what}, {batch} prompt{'s' * (batch > 1)}", *cells])
    return markdown(["", *(heading for heading, *_ in columns)], rows)


def goals() -> str:
    """What is aimed at, and how far it is reached."""

    def faster(kind: str, peer: str, test: str, batch: int) -> Callable[[str], float | None]:
        peer = peer if peer == "transformers" else f"{peer} {kind}"
        return lambda shape: measured(shape, kind, test, batch).get(peer, {}).get("ours_faster")

    def bandwidth(kind: str) -> Callable[[str], float | None]:
        def share(shape: str) -> float | None:
            ours = measured(shape, kind, DECODE, 1).get("mqa-gpt")
            read = (result(f"bench_{shape}_{kind}") or {"ceilings": {}})["ceilings"]
            return ours["gb_per_s"] / read["read_gb_per_s"] if ours else None

        return share

    def cold(shape: str) -> float | None:
        ours, theirs = (started(shape, name, "seconds") for name in ("mqa-gpt", "transformers"))
        return theirs / ours if ours and theirs else None

    def compiling(shape: str) -> float | None:
        names = ("mqa-gpt, nothing compiled", "mqa-gpt")
        longer, warm = (started(shape, name, "seconds") for name in names)
        return longer - warm if longer and warm else None

    def memory(shape: str) -> float | None:
        """Beyond the weights, GB; they may take 6% more, too."""
        peak, file = started(shape, "mqa-gpt", "peak_bytes"), result(f"cpu_start_{shape}")
        return (peak - 1.06 * file["figures"]["checkpoint_bytes"]) / 1e9 if peak else None

    table: list[tuple[str, float, Callable[[str], float | None]]] = [
        ("float32, 1 prompt, share of the bandwidth", 0.92, bandwidth("float32")),
        ("float32, 1 prompt, × CTranslate2", 1.0, faster("float32", "ctranslate2", DECODE, 1)),
        ("float32, 1 prompt, × transformers", 2.0, faster("float32", "transformers", DECODE, 1)),
        ("float32, 8 prompts, × CTranslate2", 1.8, faster("float32", "ctranslate2", DECODE, 8)),
        ("float32, 8 prompts, × transformers", 3.5, faster("float32", "transformers", DECODE, 8)),
        ("int8, 1 prompt, share of the bandwidth", 0.75, bandwidth("int8")),
        ("int8, 1 prompt, × CTranslate2 int8", 2.2, faster("int8", "ctranslate2", DECODE, 1)),
        ("int8, 1 prompt, × transformers float32", 6.0, faster("int8", "transformers", DECODE, 1)),
        ("int8, 8 prompts, × CTranslate2 int8", 2.5, faster("int8", "ctranslate2", DECODE, 8)),
        *(
            (f"{kind}, {what}, × {peer}{end}", aim, faster(kind, peer.lower(), test, batch))
            for kind, end in (("float32", ""), ("int8", " int8"))
            for what, test, batch, peer, aim in (
                ("prefill of 1 prompt", PREFILL, 1, "CTranslate2", 1.1),
                ("prefill of 8 prompts", PREFILL, 8, "CTranslate2", 1.1),
                ("1 prompt", DECODE, 1, "OpenVINO", 1.0),
                ("8 prompts", DECODE, 8, "OpenVINO", 1.0),
                ("prefill of 8 prompts", PREFILL, 8, "OpenVINO", 1.0),
            )
        ),
        ("first token of a new process, × transformers", 1.0, cold),
    ]
    rows = [
        [name, f"at least {aim:.2f}", *(met(aim, of(shape)) for shape in SHAPES)]
        for name, aim, of in table
    ]
    for name, aim, of in (
        ("first token, nothing compiled yet: seconds more", 10.0, compiling),
        ("memory in float32 beyond 1.06 times the weights, GB", 0.4, memory),
    ):
        cells = [met(aim, of(shape), at_most=True) for shape in SHAPES]
        rows.append([name, f"at most {aim:.2f}", *cells])
    return markdown(["", "goal", *SHAPES], rows)


def met(aim: float, value: float | None, at_most: bool = False) -> str:
    """A figure, and whether it misses its goal."""
    if value is None:
        return NONE
    is_missed = value > aim if at_most else value < aim
    return f"{value:.2f}{', missed' if is_missed else ''}"


def products() -> str:
    """Milliseconds of a product."""
    found = result("cpu_products")
    rows = [row for row in found["figures"] if "ms" in row] if found else []
    names = list(dict.fromkeys(row["product"] for row in rows))
    ms = {(row["K"], row["N"], row["rows"], row["product"]): row["ms"] for row in rows}
    cases = dict.fromkeys(key[:3] for key in ms)
    if not cases:
        return "Not measured yet."
    return markdown(
        ["K x N", "rows", *names],
        (
            [f"{K:,} x {N:,}", str(R), *(shown(ms.get((K, N, R, name)), ".2f") for name in names)]
            for K, N, R in cases
        ),
    )


PROFILES = [
    (f"{name}: a {kind}, {dtype}", f"{shape}_cpu{int8}{end}")
    for kind, end in (("step", ""), ("prefill", "_prefill"))
    for name, shape in (("tiny", "tiny_starcoder_py"), ("1B", "starcoderbase-1b"))
    for dtype, int8 in (("float32", ""), ("int8", "_int8"))
]


def profiles() -> str:
    """Milliseconds of each part, and the share of its roofline."""
    results = {title: result(f"step_profile_{name}") for title, name in PROFILES}
    found = {title: each["figures"] for title, each in results.items() if each}
    parts = [{p["part"]: p for p in each["parts"] if p["share"] > 0.001} for each in found.values()]
    names = list(dict.fromkeys(name for each in parts for name in each))
    if not names:
        return "Not measured yet."
    rows = []
    for name in names:
        cells = [each.get(name) for each in parts]
        rows.append(
            [name, *(f"{1000 * c['seconds']:.2f}, {c['of_roofline']:.0%}" if c else NONE
                     for c in cells)]
        )  # fmt: skip
    steps = [each["step_seconds"] for each in found.values()]
    whole = [f"{1000 * s['undivided']:.1f}, {s['least'] / s['undivided']:.0%}" for s in steps]
    return markdown(["", *found], [["**all**", *whole], *rows])


def speculation() -> str:
    """How many times as fast decoding becomes."""
    found = result("speculation_cpu")
    figures = found["figures"]["by_agreement"] if found else {}
    names = [name.split(", agreement ") for name in figures]
    right = list(dict.fromkeys(agreement for _, agreement in names))
    rows = [
        [kind, *(shown(figures[f"{kind}, agreement {a}"]["speedup"], ".2f") for a in right)]
        for kind in dict.fromkeys(kind for kind, _ in names)
    ]
    if not rows:
        return "Not measured yet."
    tasks = found["figures"]["of_the_prompt"]
    every = [*figures.values(), *tasks.values()]
    same = "in every case" if all(f["same_tokens"] for f in every) else "NOT in every case"
    texts = [
        f"{shown(f['speedup'], '.2f')} times ({f['speedup_range'][0]:.2f} to "
        f"{f['speedup_range'][1]:.2f}) {what}"
        for f, what in zip(
            tasks.values(),
            ("where it continues a file", "where it writes the file's beginning again"),
            strict=True,
        )
    ]
    return (
        f"{markdown(['the drafter is right', *right], rows)}\n\nWith `PromptLookup` on the demo "
        f"checkpoint and held-out modules: {', '.join(texts)} (medians and extremes). The tokens "
        f"were those of the plain loop {same}."
    )


def report() -> str:
    """A part of what `mqa-gpt bench` prints."""
    name = f"bench_{SHAPES[0]}_float32"
    found = result(name)
    if not found:
        return "Not measured yet."
    results = [
        Result(**each)
        for each in found["results"]
        if each["batch"] == 1 and each["test"] in (DECODE, PREFILL)
    ]
    parts = {"ceilings": Ceilings(**found["ceilings"]), "results": results}
    text = BenchReport(**found | parts).to_markdown().rstrip()
    lines = [f"    {line}".rstrip() for line in text.splitlines()[1:]]
    return "\n".join([f"Part of a report (`benchmarks/results/{name}.json`):", "", *lines])


SPLITS = tuple(2**power for power in range(8))


def waves(**conditions: Any) -> list[dict[str, Any]]:
    """The rows of benchmarks.gpu.waves with these entries."""
    found = result("kernel_waves")
    rows = found["figures"] if found else []
    return [row for row in rows if all(row.get(k) == v for k, v in conditions.items())]


def schedules() -> str:
    """Efficiency of attention in prefill and training."""
    cases = sorted(
        {
            (row["phase"], row["batch"], row["tokens"])
            for row in waves()
            if row["phase"] != "decode" and "efficiency" in row
        }
    )
    rows = []
    for shape in dict.fromkeys(row["shape"] for row in waves()):
        cells = []
        for phase, batch, tokens in cases:
            case = waves(shape=shape, phase=phase, batch=batch, tokens=tokens)
            of_each = [shown(row["efficiency"], ".2f") for row in case if "efficiency" in row]
            cells.append(" / ".join(of_each) or NONE)
        rows.append([shape, *cells])
    heading = [f"{phase}, {batch} x {tokens:,}" for phase, batch, tokens in cases]
    return markdown(["", *heading], rows) if rows else "Not simulated yet."


def products_of_a_step() -> str:
    """Programs, places and share of the bandwidth of the 7B model's products in a decode step."""
    shape = {"shape": "starcoderbase-7b", "phase": "decode"}
    rows, names = [], ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj", "lm_head")
    for weights in ("bfloat16", "int8"):
        for batch in sorted({row["batch"] for row in waves(**shape)}):
            found = {row["part"]: row for row in waves(**shape, weights=weights, batch=batch)}
            cells = [
                f"{found[name]['grid'][0]:,} / {132 * found[name]['blocks']}: "
                f"{found[name]['efficiency']:.2f}"
                for name in names
                if name in found
            ]
            rows.append([f"{weights}, {batch} row{'s' * (batch > 1)}", *cells])
    products = [r for r in waves(phase="decode") if "weights" in r and "efficiency" in r]
    if not products:
        return "Not simulated yet."
    table = markdown(["", *(f"`{name}`" for name in names)], rows)
    large = [row for row in products if row["shape"] != "tiny_starcoder_py"]
    least = min(large, key=lambda row: row["efficiency"])
    return (
        f"{table}\n\nThe lowest share in models from 1B on is {least['efficiency']:.2f}: "
        f"`{least['part']}` of {least['shape']} with {least['weights']} weights and "
        f"{least['batch']} rows."
    )


def splits() -> str:
    """Microseconds of attention in a decode step of the 7B model, by number of splits."""
    rows = []
    for row in waves(shape="starcoderbase-7b", phase="decode", part="attention"):
        cells = []
        for count in SPLITS:
            seconds = row["by_splits"].get(str(count))
            cell = shown(None if seconds is None else 1e6 * seconds)
            cells.append(f"**{cell}**" if count == row["splits"] else cell)
        rows.append([f"{row['batch']} x {row['tokens']:,}", *cells])
    heading = ["rows x keys", *map(str, SPLITS)]
    return markdown(heading, rows) if rows else "Not simulated yet."


BLOCKS = {
    "kernels/README.md": {
        "schedules": schedules,
        "products of a step": products_of_a_step,
        "splits": splits,
    },
    "README.md": {"speeds": short_speeds},
    "docs/bench.md": {"report": report},
    "benchmarks/README.md": {
        "speeds": speeds,
        "goals": goals,
        "products": products,
        "profiles": profiles,
        "speculation": speculation,
    },
}


def filled(page: str) -> str:
    """A document with its tables as the files have them."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, block in BLOCKS[page].items():
        before, after = re.split(rf"<!-- {name} -->.*?<!-- end -->", text, flags=re.S)
        text = f"{before}<!-- {name} -->\n\n{block()}\n\n<!-- end -->{after}"
    return text


def main() -> int:
    for page in BLOCKS:
        text = filled(page)
        (ROOT / page).write_text(text, encoding="utf-8")
        print(f"written: {page}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
