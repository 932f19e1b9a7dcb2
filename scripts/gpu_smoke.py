"""Section of gpu_report.py: does every kernel run at all? The first thing to know on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from gpu_kernels import (
    CASES,
    REPLAYED,
    SMALL_CASES,
    Case,
    Row,
    Twins,
    check_attention,
    check_replays,
    check_step,
    each,
    poison_allocations,
    shallow,
)

from mqa_kernels import launch


def smoke(device: torch.device) -> Iterator[Row]:
    """Attention both ways, a fused step, a recorded step whose kernels overlap, and a verdict."""
    poison_allocations()
    # Training of a ragged batch, and one token of two rows whose keys are split.
    cases = [SMALL_CASES[0], Case(1, 400, 4, 1, 16, (399, 200))]
    if device.type == "cuda":
        cases = [CASES[2], CASES[1]]
    checks: dict[str, Callable[[], Row]] = {
        f"attention, {case.T} of {case.S}": partial(check_attention, device, case, torch.bfloat16)
        for case in cases
    }
    *_, config = shallow(device).values()  # the smallest
    # Of the same rows, because compiling takes most of the time.
    for int8 in (False, True):
        models = Twins(replace(config, n_layer=1), torch.bfloat16, int8, device)
        weights = "int8" if int8 else "bfloat16"
        for rows in REPLAYED:
            checks[f"fused step, {weights}, {rows} rows"] = partial(check_step, models, rows)
            if not int8:
                replays = partial(check_replays, models.model, rows, 3)
                checks[f"recorded step, {rows} rows"] = replays
    passed = True
    for row in each(({"check": name}, check) for name, check in checks.items()):
        passed = passed and bool(row.get("passed"))
        yield row
    how = "with overlap" if launch.overlap(device)["OVERLAP"] else "without overlap"
    yield {
        "verdict": f"every kernel runs, and in graphs {how}" if passed else "see what failed above",
        "passed": passed,
    }
