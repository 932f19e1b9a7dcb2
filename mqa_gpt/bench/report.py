"""What `mqa_gpt.bench.run` found, as an object, as JSON, as CSV and as a Markdown table."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass, fields
from typing import Any

from mqa_gpt.attention import backend_text
from mqa_gpt.bench.ceilings import Ceilings


@dataclass(frozen=True)
class Result:
    """One test of one contender.

    Attributes:
        tokens: of all rows together.
        mean, stdev, median: tokens per second over the repeats; stdev is the sample's, 0 for one.
        gb_per_s, mbu: of decode tests, else None.
        tflops, mfu: of prefill tests, else None.
        ours_faster: how many times as fast mqa-gpt was in the same round, the median of the
            rounds; None for itself.
        same_tokens: whether mqa-gpt wrote the same tokens; None for itself.
        seconds: every repeat.
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
class Report:
    """What `benchmark` found.

    Attributes:
        weights: "random" of a shape, else "checkpoint".
        backend: the attention backend that computed.
        asked_backend: that, or "auto".
        quantize: what `benchmark` was asked for; the peers' weights are never quantized by it.
        weight_bytes: that each forward pass reads.
        cache_bytes_per_token: of K and V.
        peak_memory_bytes: the most this process held until it had loaded the model and run every
            test once, before any peer was loaded; None where the system does not say.
        command: of the process that measured.
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
        """The report as JSON can hold it, but for NaN."""
        return asdict(self)

    def to_csv(self) -> str:
        """A heading and one line per result, each with what the results share; no repeats."""
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
        """A table with one row per result, below what it was measured on."""
        has_peers = any(result.ours_faster is not None for result in self.results)
        head = ["test", "batch", "by", "tok/s", "median", "GB/s", "MBU", "TFLOP/s", "MFU"]
        rows = [head + ["mqa-gpt is faster by", "same tokens"] * has_peers]
        for r in self.results:
            cells = [r.test, str(r.batch), r.contender, f"{r.mean:,.1f} ± {r.stdev:,.1f}"]
            cells += [f"{r.median:,.1f}", _cell(r.gb_per_s, ".1f"), _cell(r.mbu, ".0%")]
            cells += [_cell(r.tflops, ".3g"), _cell(r.mfu, ".0%")]
            if has_peers:
                cells.append("" if r.ours_faster is None else f"{r.ours_faster:.2f} x")
                cells.append({None: "", True: "yes", False: "no"}[r.same_tokens])
            rows.append(cells)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        numbers = range(3, len(widths))  # columns to be aligned on the right
        rule = ["-" * (w - 1) + ":" if i in numbers else "-" * w for i, w in enumerate(widths)]
        table = [
            [cell.rjust(w) if i in numbers else cell.ljust(w)
             for i, (cell, w) in enumerate(zip(cells, widths, strict=True))]
            for cells in rows
        ]  # fmt: skip
        lines = [f"| {' | '.join(cells)} |" for cells in [table[0], rule, *table[1:]]]
        threads = self.environment["cpu"]["threads"]
        where = f"{self.device}, {threads} threads" if self.device == "cpu" else self.device
        peak = self.peak_memory_bytes
        memory = "" if peak is None else f", peak memory {peak / 1e9:.2f} GB"
        weights = "" if self.quantize is None else f" with {self.quantize} weights"
        about = (
            f"{self.model}: {self.parameters / 1e9:.3g} B parameters, {self.weights} weights, "
            f"{self.dtype}{weights} on {where}, "
            f"attention {backend_text(self.asked_backend, self.backend)}{memory}"
        )
        c = self.ceilings
        int8 = c.int8_matmul_tflops
        limits = (
            f"ceilings: {c.read_gb_per_s:.1f} GB/s read, {c.copy_gb_per_s:.1f} GB/s copied, "
            f"{c.matmul_tflops:.3g} TFLOP/s multiplied"
            f"{'' if int8 is None else f', {int8:.3g} in 8 bits'}; {self.repeats} repeats"
        )
        return "\n".join([about, limits, "", *lines, ""])


def _cell(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)
