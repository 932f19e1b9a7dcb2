"""The results of `mqa_gpt.bench.run` as an object, JSON, CSV and a Markdown table."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass, fields
from typing import Any

from mqa_gpt.attention import backend_text
from mqa_gpt.bench.ceilings import Ceilings


@dataclass(frozen=True)
class Result:
    """One test of one program.

    Attributes:
        contender: the program.
        tokens: of all rows together.
        mean, stdev, median: tokens per second over the repeats; stdev is the sample's, 0 for one.
        gb_per_s, mbu: of decode tests, else None.
        tflops, mfu: of prefill tests, else None.
        ours_faster: the program's time over that of mqa-gpt in the same round, the median of the
            rounds; below 1 mqa-gpt is slower. None for mqa-gpt itself.
        same_tokens: whether mqa-gpt wrote the same tokens; None for itself.
        seconds: of every repeat.
    """

    test: str
    batch: int
    contender: str
    tokens: int
    mean: float
    stdev: float
    median: float
    gb_per_s: float | None
    mbu: float | None
    tflops: float | None
    mfu: float | None
    ours_faster: float | None
    same_tokens: bool | None
    seconds: list[float]


@dataclass(frozen=True)
class BenchReport:
    """The result of `benchmark`.

    Attributes:
        weights: "random" for a shape, else "checkpoint".
        backend: the attention backend that computed.
        asked_backend: the same, or "auto".
        quantize: the argument of `benchmark`; it does not quantize the peers' weights.
        weight_bytes: what each forward pass reads of the weights.
        cache_bytes_per_token: K and V.
        peak_memory_bytes: of this process after loading the model and running every test once,
            before any peer is loaded; None where the system does not say.
        command: what started the process.
        environment: see `mqa_gpt.machine.describe`.
    """

    model: str
    weights: str
    config: dict[str, Any]
    parameters: int
    dtype: str
    device: str
    backend: str
    asked_backend: str
    quantize: str | None
    repeats: int
    weight_bytes: int
    cache_bytes_per_token: int
    peak_memory_bytes: int | None
    ceilings: Ceilings
    results: list[Result]
    command: str
    date: str
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return asdict(self)

    def to_csv(self) -> str:
        """A header and one line per result, which repeats what the results share."""
        names = (
            "model",
            "weights",
            "parameters",
            "dtype",
            "device",
            "backend",
            "quantize",
            "repeats",
        )
        shared = {name: getattr(self, name) for name in (*names, "peak_memory_bytes")}
        shared |= asdict(self.ceilings)
        own = [field.name for field in fields(Result) if field.name != "seconds"]
        text = io.StringIO()
        writer = csv.DictWriter(text, [*shared, *own], lineterminator="\n")
        writer.writeheader()
        for result in self.results:
            writer.writerow(shared | {name: getattr(result, name) for name in own})
        return text.getvalue()

    def to_markdown(self) -> str:
        """The model and the ceilings, then a table with one row per result."""
        has_peers = any(result.ours_faster is not None for result in self.results)
        head = ["test", "batch", "by", "tok/s", "median", "GB/s", "MBU", "TFLOP/s", "MFU"]
        rows = [head + ["mqa-gpt is", "same tokens"] * has_peers]
        for r in self.results:
            spread = f" ± {r.stdev:,.1f}" if self.repeats > 1 else ""
            cells = [r.test, str(r.batch), r.contender, f"{r.mean:,.1f}{spread}"]
            cells += [f"{r.median:,.1f}", _cell(r.gb_per_s, ".1f"), _cell(r.mbu, ".0%")]
            cells += [_cell(r.tflops, ".3g"), _cell(r.mfu, ".0%")]
            if has_peers:
                cells.append("" if r.ours_faster is None else times_faster(r.ours_faster))
                cells.append({None: "", True: "yes", False: "no"}[r.same_tokens])
            rows.append(cells)
        threads = self.environment["cpu"]["threads"]
        where = (
            f"{self.device}, {_counted(threads, 'thread')}" if self.device == "cpu" else self.device
        )
        peak = self.peak_memory_bytes
        memory = "" if peak is None else f", peak memory {peak / 1e9:.2f} GB"
        weights = "" if self.quantize is None else f" with {self.quantize} weights"
        c = self.ceilings
        int8 = c.int8_matmul_tflops
        return "\n".join(
            [
                f"{self.model}: {count_text(self.parameters)} parameters, {self.weights} weights, "
                f"{self.dtype}{weights} on {where}, "
                f"attention {backend_text(self.asked_backend, self.backend)}{memory}",
                f"ceilings: {c.read_gb_per_s:.1f} GB/s read, {c.copy_gb_per_s:.1f} GB/s copied, "
                f"{c.matmul_tflops:.3g} TFLOP/s multiplied"
                f"{'' if int8 is None else f', {int8:.3g} in 8 bits'}; "
                f"{_counted(self.repeats, 'repeat')}",
                "",
                *_table(rows),
                "",
            ]
        )


def times_faster(ratio: float) -> str:
    """Their time over ours in words, such as "1.65 x faster" or "2.50 x slower"."""
    return f"{1 / ratio:.2f} x slower" if ratio < 1 else f"{ratio:.2f} x faster"


def count_text(count: int) -> str:
    """A number of parameters in three digits, such as "5.46 M" or "15.5 B"."""
    value, unit = (count / 1e9, "B") if count >= 999.5e6 else (count / 1e6, "M")
    return f"{value:.3g} {unit}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _table(rows: list[list[str]]) -> list[str]:
    """Lines of Markdown; all columns but the first three are aligned on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * (w - 1) + ":" if i >= 3 else "-" * w for i, w in enumerate(widths)]
    padded = [
        [cell.rjust(w) if i >= 3 else cell.ljust(w)
         for i, (cell, w) in enumerate(zip(cells, widths, strict=True))]
        for cells in rows
    ]  # fmt: skip
    return [f"| {' | '.join(cells)} |" for cells in [padded[0], rule, *padded[1:]]]


def _cell(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)
