"""gpu_autotune.py: tiles are compared, and those that fail are named."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not available on this platform")

import gpu_autotune

from tests.scripts.marks import WITHOUT_GPU

CPU = torch.device("cpu")

pytestmark = WITHOUT_GPU


def test_autotune_finds_the_fastest_tiles_and_names_those_that_fail(monkeypatch):
    seconds = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(gpu_autotune, "seconds_of", lambda action: next(seconds))
    changes = [{"N": 32}, {"N": 128}, {"unknown": 1}]
    search = gpu_autotune.Search(
        "forward", "mqa_kernels.forward", "forward_tiles", changes,
        lambda device: gpu_autotune.forward_call(5, device),
    )  # fmt: skip
    row = gpu_autotune.fastest(CPU, search)
    assert (row["shipped_us"], row["best"], row["best_us"]) == (3e6, "{'N': 32}", 1e6)
    assert "Tiles(M=128, N=64" in row["shipped"]
    shipped, small, large, wrong = row["candidates"]
    assert shipped["difference"] == 0
    assert max(small["difference"], large["difference"]) < 0.1
    assert "unknown" in wrong["error"]


@pytest.mark.parametrize(("times", "best"), [([None, 2.0, 1.0], 1e6), ([None] * 3, None)])
def test_tiles_are_compared_even_if_the_shipped_ones_do_not_run(times, best, monkeypatch):
    left = iter(times)

    def seconds_of(action):
        if (seconds := next(left)) is None:
            raise RuntimeError("out of resources")
        return seconds

    monkeypatch.setattr(gpu_autotune, "seconds_of", seconds_of)
    search = gpu_autotune.Search(
        "linear", "mqa_kernels.fused_ops", "linear_tiles", gpu_autotune.MANY_ROWS[:2],
        lambda device: gpu_autotune.linear_call(33, 32, 48, device),
    )  # fmt: skip
    row = gpu_autotune.fastest(CPU, search)
    assert (row["shipped_us"], row["best_us"]) == (None, best)
    assert row["best"] == (str(gpu_autotune.MANY_ROWS[1]) if best else "none runs")
    assert row["candidates"][0]["error"] == "out of resources"


def test_autotune_compares_with_the_shipped_tiles():
    rows = list(gpu_autotune.autotune(CPU))
    assert not [row for row in rows if "error" in row], rows
    names = [row["kernel"] for row in rows]
    assert names[:4] == ["forward", "decode", "dQ", "dK, dV"]
    assert (names[4], names[-1]) == ("linear 32 to 32, 1 rows", "linear 32 to 64, 64 rows")
    assert {row["best"] for row in rows} == {"shipped"}  # without a GPU the only one
