"""The argmax over the vocabulary, against the argmax of the logits."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not available on this platform")

from mqa_kernels import norm_argmax, norm_lm_head, reference
from tests.kernels.error_rule import DEVICE
from tests.kernels.fused_inputs import EPS, MARKS, cases, norm_inputs

pytestmark = MARKS


@cases([(1, 48, 70), (3, 80, 33), (16, 48, 130)], [(17, 80, 33), (64, 48, 130)])
def test_equals_the_argmax_of_the_logits(shape, dtype):
    (*norm, weight, _), _ = norm_inputs(dtype, *shape)
    ids, values = norm_argmax(*norm, weight)
    logits = norm_lm_head(*norm, weight)
    assert torch.equal(ids, logits.argmax(-1))
    assert torch.equal(values, logits.amax(-1).float())


def pick(values):
    """norm_argmax of one row with these logits; its norm gives 1 in channel 0, else 0."""
    logits = torch.tensor(values, device=DEVICE)
    weight = torch.zeros(len(values), 16, device=DEVICE)
    weight[:, 0] = logits
    norm_bias = torch.zeros(16, device=DEVICE)
    norm_bias[0] = 1
    x = torch.arange(16.0, device=DEVICE)[None]
    ids, value = norm_argmax(x, torch.zeros_like(norm_bias), norm_bias, EPS, weight)
    expected = reference.norm_argmax(x, torch.zeros_like(norm_bias), norm_bias, EPS, weight)
    assert torch.equal(ids, expected[0])
    assert torch.equal(value.nan_to_num(7e7), expected[1].nan_to_num(7e7))
    return ids.item(), value.item()


def test_ties_go_to_the_lowest_index():
    values = [-3.0] * 50
    values[21] = values[5] = values[40] = 2.0
    assert pick(values) == (5, 2.0)
    assert pick([-1.5] * 50) == (0, -1.5)


def test_minus_zero_ties_with_zero():
    weight = torch.full((20, 16), -4.0, device=DEVICE, dtype=torch.float16)
    weight[1], weight[2] = -6e-8, 0  # times 0.01, -6e-10 rounds to -0 in float16
    norm_bias = torch.zeros(16, device=DEVICE, dtype=torch.float16)
    norm_bias[0] = 0.01
    norm = torch.zeros_like(norm_bias), norm_bias, EPS
    x = torch.randn(1, 16).to(DEVICE, torch.float16)
    assert norm_lm_head(x, *norm, weight).signbit()[0, :3].tolist() == [True, True, False]
    ids, values = norm_argmax(x, *norm, weight)
    assert (ids.item(), values.item()) == (1, 0.0)


def test_negative_logits_are_ordered():
    assert pick([-5.0, -1e-30, -2.0, -1e30] * 10) == (1, pytest.approx(-1e-30))


def test_infinities_are_ordered():
    inf = float("inf")
    assert pick([-inf, 3e38, inf, 2.0, inf] * 5) == (2, inf)
    assert pick([-inf] * 20) == (0, -inf)
    assert pick([-inf, -3e38] * 9) == (1, pytest.approx(-3e38))


def test_nan_is_the_largest_and_is_returned():
    values = [1e30] * 40
    values[33] = values[35] = float("nan")
    index, value = pick(values)
    assert index == 33
    assert value != value


def test_logits_that_round_to_the_same_value_tie():
    weight = torch.zeros(20, 16, device=DEVICE, dtype=torch.bfloat16)
    weight[3, 0] = weight[9, 0] = 256
    weight[9, 1] = 1  # 257 rounds to 256 in bfloat16
    norm_bias = torch.ones(16, device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(2, 16).to(DEVICE, torch.bfloat16)
    ids, values = norm_argmax(x, torch.zeros_like(norm_bias), norm_bias, EPS, weight)
    assert ids.tolist() == [3, 3]
    assert values.tolist() == [256.0, 256.0]


def test_candidates_may_exceed_one_block(monkeypatch):
    monkeypatch.setattr("mqa_kernels.fused_ops.choose_block", lambda parts: 2)
    (*norm, weight, _), _ = norm_inputs(torch.float32, 3, 48, 150)
    ids, _ = norm_argmax(*norm, weight)
    assert torch.equal(ids, norm_lm_head(*norm, weight).argmax(-1))
