"""The forward loop in Gluon: its arithmetic, and that it waits for what it reads."""

from __future__ import annotations

import threading

import pytest
import torch

from tests import gluon_stand_in

pytest.importorskip("triton.experimental.gluon", reason="Gluon is not available")

import gluon_form

from mqa_gpt.attention import reference_attention
from mqa_kernels.reference import log_sum_exp

KERNELS = ("load_tiles", "softmax_step", "see_block", "attend")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch):
    """`gluon_kernel`, run by the stand-in."""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, N: int, stages: int, slow=None):
        B, T, H, D = q.shape
        out = torch.full_like(q, float("nan"))
        lse = torch.full((B, T, H), float("nan"))
        blocks, keys, values = (
            gluon_stand_in.Descriptor(x.reshape(-1, D), [rows, D], 0.2 if name == slow else 0.001)
            for name, x, rows in (("q", q, 64), ("k", k, N), ("v", v, N))
        )
        tiles = -(-T * H // 128)
        for b in range(B):
            for tile in range(tiles):
                monkeypatch.setattr(gluon_form, "gl", gluon_stand_in.language(tile, b, tiles))
                gluon_form.gluon_kernel.fn(
                    blocks, keys, values,
                    gluon_stand_in.Pointer(out), gluon_stand_in.Pointer(lse),
                    T, D**-0.5 * 1.4426950408889634, H, D, N, stages,
                )  # fmt: skip
        return out, lse

    for name in KERNELS:
        monkeypatch.setattr(gluon_form, name, getattr(gluon_form, name).fn)
    for name in ("mbarrier", "tma", "warpgroup_mma", "warpgroup_mma_wait"):
        monkeypatch.setattr(gluon_form, name, getattr(gluon_stand_in, name))
    for name in ("sums_layout", "rows_layout", "left_layout", "stored_layout"):
        monkeypatch.setattr(gluon_form, name, lambda columns: None)
    for name in ("HALF", "LOG2E", "REGISTERS"):
        monkeypatch.setattr(gluon_form, name, getattr(gluon_form, name).value)
    monkeypatch.setattr(gluon_form, "fence_async_shared", lambda: None)
    return run


@pytest.mark.parametrize(
    ("B", "T", "H", "D", "N", "stages"),
    [
        (2, 70, 4, 64, 64, 2),  # three tiles, the last not full; two blocks of keys
        (1, 300, 2, 64, 64, 2),  # more blocks than slots, so that these are used again
        (1, 300, 2, 128, 128, 2),
        (1, 200, 3, 64, 64, 1),  # heads that divide no tile; one slot
        (1, 40, 32, 128, 64, 3),
        (1, 65, 65, 64, 64, 2),  # a tile whose last key is the first of a block
        (1, 130, 33, 64, 64, 2),  # one whose second block not all rows see whole, by one key
        (1, 1, 1, 64, 64, 2),  # a single row
    ],
)
def test_a_tile_is_what_attention_is_and_nothing_is_read_too_early(kernel, B, T, H, D, N, stages):
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, T, heads, D) for heads in (H, 1, 1))
    out, lse = kernel(q, k, v, N, stages)
    expected = reference_attention(q, k, v, 0, D**-0.5)
    assert (out - expected).abs().max() < 1e-5
    assert (lse - log_sum_exp(q, k, 0, D**-0.5)).abs().max() < 1e-5


@pytest.mark.parametrize(("number", "awaited"), list(enumerate("qkkvv")))
def test_a_missing_wait_shows(kernel, monkeypatch, number, awaited):
    """That the stand-in finds what it is there for: each wait of a half, left out once."""
    half = threading.local()
    wait = gluon_form.mbarrier.wait

    def wait_but_once(barrier, parity):
        half.waits = getattr(half, "waits", -1) + 1
        if barrier.count == 2 or half.waits != number:  # those for room count to 2
            wait(barrier, parity)

    monkeypatch.setattr(gluon_form.mbarrier, "wait", wait_but_once)
    monkeypatch.setattr(gluon_stand_in, "PATIENCE", 1.0)
    with pytest.raises(AssertionError, match="not there yet"):
        kernel(*(torch.randn(1, 64, heads, 64) for heads in (2, 1, 1)), 32, 1, slow=awaited)


@pytest.mark.parametrize("factor", [0.5, 2])
def test_bytes_that_are_not_those_that_come_show(kernel, monkeypatch, factor):
    monkeypatch.setattr(gluon_stand_in, "PATIENCE", 0.2)
    monkeypatch.setattr(
        gluon_form.mbarrier,
        "expect",
        lambda barrier, nbytes: gluon_stand_in.Barrier.arrive(barrier, int(nbytes * factor)),
    )
    with pytest.raises(AssertionError):
        kernel(*(torch.randn(1, 64, heads, 64) for heads in (2, 1, 1)), 64, 2)


def test_other_gpus_and_head_dims_are_refused(monkeypatch):
    q, k = torch.empty(1, 4, 2, 80), torch.empty(1, 4, 1, 80)
    with pytest.raises(ValueError, match="the head dim is 80: this is for 64 and 128"):
        gluon_form.gluon_attention(q, k, k, 64, 2)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(gluon_form.launch, "architecture", lambda device: 80)
    with pytest.raises(ValueError, match="is sm_80: this is for sm_90"):
        gluon_form.gluon_attention(q, k, k, 64, 2)
