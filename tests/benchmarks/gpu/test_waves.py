"""benchmarks/gpu/waves.py without a compiler: which launches it finds, and what it says of them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not available on this platform")

from benchmarks.gpu import waves
from benchmarks.gpu.schedule import MULTIPROCESSORS
from benchmarks.gpu.waves import Launch, Resources, launches_of, rows_of
from benchmarks.measure import ROOT
from mqa_gpt.config import GPTConfig
from mqa_kernels import attention

SHAPE = "starcoderbase-7b"
BLOCKS = 2
RECORDED = json.loads((ROOT / "benchmarks/results/kernel_waves.json").read_text())["figures"]


@pytest.fixture(autouse=True)
def _compiled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel has 128 registers, and two blocks fit."""
    monkeypatch.setattr(waves.KERNEL, "run", lambda *_, **__: SimpleNamespace())
    monkeypatch.setattr(waves, "resources", lambda _: Resources(128, 80_000, BLOCKS))


def found(phase: str, shape: str = SHAPE, **conditions: object) -> list[dict]:
    rows = rows_of(shape, phase)
    return [row for row in rows if all(row.get(k) == v for k, v in conditions.items())]


def test_a_call_is_recorded_with_its_grid_and_runs_nothing():
    q, k = torch.empty(2, 64, 32, 128), torch.empty(2, 64, 1, 128)
    (launch,) = launches_of(lambda: attention(q, k, k))
    assert launch.kernel == "forward_kernel"
    assert launch.grid == (64 * 32 // launch.options["M"], 2, 1)
    assert launch.programs == launch.grid[0] * 2
    assert launch.places == BLOCKS * MULTIPROCESSORS


def test_training_has_the_launches_of_attention_and_its_gradient(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(waves, "resources", lambda _: Resources(227, 115_200, 1))
    for B, T in waves.TRAINING:
        rows = found("training", batch=B, tokens=T)
        assert [row["part"] for row in rows] == ["forward", "dQ", "dK, dV"]
        assert all(0.96 < row["efficiency"] <= 1 for row in rows)


def test_a_decode_step_has_the_launches_of_a_layer_and_of_the_head():
    rows = found("decode", batch=8, weights="int8")
    assert [row["part"] for row in rows] == list(waves.PRODUCTS)
    c_attn = rows[0]
    assert c_attn["grid"] == (136,)  # 4,352 outputs, 32 each
    assert (c_attn["waves"], c_attn["last_wave"]) == (1, pytest.approx(136 / 264))
    assert [row["part"] for row in found("decode", batch=8, tokens=8192)] == [
        "attention", "combine"
    ]  # fmt: skip


def test_decoding_is_never_faster_than_the_memory():
    rows = found("decode")
    products = [row for row in rows if "efficiency" in row]
    assert len(products) == len(waves.BATCHES) * (2 + 2 * 5)
    assert all(0 < row["efficiency"] <= 1 + 1e-9 for row in products)
    (step,) = (row for row in products if row["part"] == "lm_head" and row["batch"] == 1
               and row["weights"] == "bfloat16")  # fmt: skip
    config = GPTConfig.preset(SHAPE)
    least = 2 * config.vocab_size * config.n_embd / waves.BANDWIDTH
    assert step["seconds"] == pytest.approx(least / step["efficiency"])


@pytest.mark.parametrize("phase", waves.PHASES)
@pytest.mark.parametrize("shape", waves.SHAPES)
def test_the_recorded_result_has_the_launches_of_today(shape: str, phase: str):
    recorded = [row for row in RECORDED if (row["shape"], row["phase"]) == (shape, phase)]
    keys = ("part", "batch", "kernel", "tiles")
    today = [(*(row[key] for key in keys), list(row["grid"])) for row in found(phase, shape)]
    assert [(*(row[key] for key in keys), row["grid"]) for row in recorded] == today


def test_the_recorded_result_has_every_shape_and_long_training_steps_waste_little():
    assert {row["shape"] for row in RECORDED} == set(waves.SHAPES)
    for row in RECORDED:
        if row["phase"] == "training" and row["shape"] != "tiny_starcoder_py":
            assert row["efficiency"] > 0.95


def test_a_program_too_many_shows(monkeypatch: pytest.MonkeyPatch):
    """272 programs on 264 places: the case that the choice of tiles avoids."""
    options = {"ROWS": 1, "BLOCK_N": 16, "SPLIT_K": 8, "BLOCK_K": 128, "STAGES": 3, "K": 4096}
    one = Launch("qkv_kernel", (264,), options, Resources(96, 79_872, 2))
    more = one._replace(grid=(272,))
    assert waves.weight_row(one, 1, False)["efficiency"] > 0.99
    assert waves.weight_row(more, 1, False)["efficiency"] < 0.87
    assert waves.described(more, 4)["waves"] == 2


def test_the_result_says_what_was_simulated(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(waves, "ProcessPoolExecutor", Inline)
    path = tmp_path / "waves.json"
    assert waves.main(["--shape", SHAPE, "--phase", "prefill", "--output", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["settings"]["gpu"]["multiprocessors"] == MULTIPROCESSORS
    assert [row["tokens"] for row in result["figures"] if row["part"] == "forward"] == [1024, 8192]
    assert "prefill 1 x 8192 forward: 128x64 8 warps 3 stages" in capsys.readouterr().out


class Inline:
    """A pool that works in this process."""

    def __init__(self, workers: int | None) -> None: ...

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_: object) -> None: ...

    map = staticmethod(map)
