"""gpu_kernels.py: its checks fail when something is wrong."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not available on this platform")

import gpu_kernels
from gpu_kernels import CASES, TINY, Case, Twins, check_attention, plain_attention, verdict

from mqa_gpt.config import PRESETS, GPTConfig
from mqa_kernels import attention, launch, reference
from tests.scripts.marks import WITHOUT_GPU

CPU = torch.device("cpu")

pytestmark = WITHOUT_GPU


def test_the_reference_is_scaled_dot_product_attention_with_a_mask():
    torch.manual_seed(0)
    q, do = torch.randn(2, 2, 5, 4, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 9, 2, 8, dtype=torch.float64)
    start, lengths, left = (torch.tensor(x) for x in ((0, 4), (5, 4), (2, 0)))
    mask = reference.visible_slots(q, k, start, lengths, left)
    found = plain_attention([q, k, v, do], mask)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    heads_first = [x.transpose(1, 2) for x in leaves]
    out = F.scaled_dot_product_attention(
        *heads_first, attn_mask=mask[:, None], enable_gqa=True
    ).transpose(1, 2)
    sees = mask.any(-1)
    assert sees.tolist() == [[False, False, True, True, True], [True, True, True, True, False]]
    out = out.where(sees[..., None, None], 0.0)
    gradients = torch.autograd.grad(out, leaves, do)
    expected = {"out": out, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x.nan_to_num(0.0))


def test_an_error_above_the_allowed_or_nan_does_not_pass():
    exact, plain = torch.zeros(3, dtype=torch.float64), torch.full((3,), 0.1)
    for answer, factor, passes in ((0.19, "out", True), (0.21, "out", False), (0.29, "dq", True)):
        error = gpu_kernels.judge(factor, torch.full((3,), answer), plain, exact)
        assert error == pytest.approx(answer / ({"out": 0.2, "dq": 0.3}[factor]), rel=1e-3)
        assert verdict({"x": error})["passed"] == passes
    poisoned = torch.tensor([0.0, math.nan, 0.0])
    assert not verdict({"x": gpu_kernels.judge("out", poisoned, plain, exact)})["passed"]


PADDED = Case(5, 12, 3, 1, 16, (4, 4, 4), (5, 4, 5), (2, 6, 12))


def off_by_one_percent(*arguments, **options):
    out, lse = attention(*arguments, **options)
    return out * 1.01, lse


def one_slot_too_far(*arguments, left_padding, **options):
    return attention(*arguments, left_padding=left_padding - 1, **options)


@pytest.mark.parametrize("wrong", [off_by_one_percent, one_slot_too_far])
def test_wrong_attention_fails_its_case(wrong, monkeypatch):
    assert check_attention(CPU, PADDED, torch.float32)["passed"]
    monkeypatch.setattr(gpu_kernels, "attention", wrong)
    row = check_attention(CPU, PADDED, torch.float32)
    assert not row["passed"]
    assert row["errors"]["lse"] <= 1 or wrong is one_slot_too_far


def test_dropping_other_probabilities_than_the_seed_says_fails(monkeypatch):
    def wrong(q, *rest, seed, **options):
        return attention(q, *rest, seed=seed + q.requires_grad, **options)

    assert gpu_kernels.check_dropout(CPU)["passed"]
    monkeypatch.setattr(gpu_kernels, "attention", wrong)
    row = gpu_kernels.check_dropout(CPU)
    assert not row["passed"]
    assert min(row["errors"].values()) > 1


def test_padding_that_transformers_cannot_hide_fails(monkeypatch):
    def wrong(*arguments, left_padding, **options):
        return attention(*arguments, **options)

    monkeypatch.setattr("mqa_kernels.attention", wrong)
    row = gpu_kernels.check_transformers(CPU)
    assert not row["passed"]
    assert row["equal"].keys() == {"dynamic", "static"}


@pytest.fixture(scope="module")
def twins() -> Twins:
    return Twins(TINY, torch.bfloat16, True, CPU)


def test_the_twins_of_an_int8_model_are_its_weights_times_their_scales(twins):
    layer = twins.model.transformer.h[1].mlp.c_fc
    weight = layer.weight.double() * layer.weight_scale.double()[:, None]
    torch.testing.assert_close(twins.exact.transformer.h[1].mlp.c_fc.weight, weight)
    assert torch.equal(twins.plain.transformer.h[1].mlp.c_fc.weight, weight.bfloat16())
    assert twins.exact.lm_head.weight is twins.exact.transformer.wte.weight


@pytest.mark.parametrize("part", ["logits", "argmax", "kv"])
def test_a_wrong_fused_step_fails(twins, part, monkeypatch):
    step = gpu_kernels.fused_step

    def wrong(model, ids, cache):
        logits, chosen, highest = step(model, ids, cache)
        if part == "logits":
            logits = logits * 1.1
        elif part == "argmax":
            chosen = (chosen + 1) % TINY.vocab_size
        else:  # the newest slot of the last row
            cache.kv[:, -1, cache.lengths[-1] - 1] *= 1.1
        return logits, chosen, highest

    assert gpu_kernels.check_step(twins, 3)["passed"]
    monkeypatch.setattr(gpu_kernels, "fused_step", wrong)
    row = gpu_kernels.check_step(twins, 3)
    assert not row["passed"]
    assert row["errors"][part] > 1


def test_a_step_that_depends_on_overlap_fails(twins, monkeypatch):
    step = gpu_kernels.fused_step

    def racing(model, ids, cache):
        logits, *chosen = step(model, ids, cache)
        overlaps = launch.overlap(CPU) is not launch.NO_OVERLAP
        return logits + overlaps, *chosen

    monkeypatch.setattr(launch, "overlap", lambda device: dict(launch.NO_OVERLAP))
    assert gpu_kernels.check_replays(twins.model, 3, 1)["passed"]
    monkeypatch.setattr(gpu_kernels, "fused_step", racing)
    row = gpu_kernels.check_replays(twins.model, 3, 1)
    assert not row["passed"]
    assert row["equal"] == 1  # the cache


def test_no_kernel_that_fills_memory_lies_between_those_that_overlap(twins, monkeypatch):
    step, filled = gpu_kernels.fused_step, []

    def seen(*arguments):
        filled.append(bool(torch.empty(8).isnan().all()))
        return step(*arguments)

    monkeypatch.setattr(gpu_kernels, "fused_step", seen)
    gpu_kernels.poison_allocations()
    assert gpu_kernels.check_replays(twins.model, 3, 1)["passed"]
    assert filled == [False, False]  # with overlap, and without
    assert torch.empty(8).isnan().all()  # the checks that follow


def test_an_action_is_run_once_before_it_is_recorded(cuda):
    count = torch.zeros(1)
    replay = gpu_kernels.recorded(lambda: count.add_(1), torch.device("cuda"))
    assert count.item() == 2  # the stand-in runs what it records
    replay()  # which it counts as the first replay
    replay()
    assert count.item() == 3


def test_the_cases_hold_every_official_shape_and_kind_of_row():
    official = {(GPTConfig.preset(n).n_head, GPTConfig.preset(n).head_dim) for n in PRESETS}
    assert official <= {(case.H, case.D) for case in CASES}
    assert {case.G for case in CASES} >= {1, 2}
    assert any(case.G == case.H > 1 for case in CASES)
    assert {case.T for case in CASES} >= {1, 63, 64, 65, 111, 128, 1000}
    assert any(case.lengths for case in CASES[:4])
    assert any(case.left_padding for case in CASES[:4])
    assert math.prod((len(gpu_kernels.LARGE.start), 2048, 32, 128)) > 2**31


def test_out_of_memory_fails_a_check_but_not_a_measurement():
    def fails(error: Exception):
        def action():
            raise error

        return action

    cases = [({"n": 1}, fails(torch.OutOfMemoryError("full"))), ({"n": 2}, fails(ValueError("no")))]
    for measures in (False, True):
        refused, failed = gpu_kernels.each(cases, may_refuse=measures)
        assert refused["refused"] == "full"
        assert refused.get("passed") is (None if measures else False)
        assert failed["passed"] is False
        assert failed["error"].endswith("ValueError: no\n")
