"""The contenders of benchmarks/gpu and the judge, in small on a CPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not available on this platform")

from benchmarks.clock import Clock
from benchmarks.gpu import contenders
from benchmarks.gpu.contenders import FLEX, OURS, PLAIN, Problem, make_inputs
from benchmarks.gpu.judge import exact_attention, find_truth, plain_attention
from mqa_gpt.bench.counts import attention_flops

CPU = torch.device("cpu")
TRAINING, DECODING = Problem(2, 9, 9, 3, 16), Problem(2, 1, 12, 3, 16)


@pytest.fixture(autouse=True)
def _few_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "CACHES", 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("measure", "problem", "figures"),
    [
        (contenders.measure_forward, TRAINING, {"forward", "tflops"}),
        (contenders.measure_backward, TRAINING, {"backward_seconds", "tflops", "peak_bytes"}),
        (contenders.measure_decode, DECODING, {"microseconds", "gb_per_s", "caches"}),
    ],
)
def test_every_contender_is_timed_or_says_why_not(measure, problem, figures):
    found = {row["contender"]: row for row in measure(problem, Clock(CPU), 1)}
    assert {OURS, PLAIN, FLEX} <= found.keys()
    assert len(found) == 3 + 4 * 3  # three forms of each SDPA backend
    for row in found.values():
        assert row.get("refused") or figures <= row.keys()
    assert found[OURS]["right"]
    assert found["math, heads expanded"]["right"]
    assert "refused" in found["cudnn, heads expanded"]  # on a CPU


def test_a_wrong_answer_is_judged_to_be_wrong(monkeypatch):
    monkeypatch.setattr(contenders, "attention", lambda q, k, v, start: torch.zeros_like(q))
    ours = contenders.measure_forward(TRAINING, Clock(CPU), 1)[0]
    assert (ours["contender"], ours["right"]) == (OURS, False)


def test_what_would_fill_the_memory_is_left_out(monkeypatch):
    monkeypatch.setattr(contenders, "MOST_SCORES", 10)
    monkeypatch.setattr(contenders, "MOST_COPIED", 10)
    found = {c.name: c for c in contenders.contenders(TRAINING, CPU)}
    assert not any("copied" in name for name in found)
    for name in ("math", PLAIN):
        with pytest.raises(NotImplementedError, match="fill the memory"):
            found[name].attend(*make_inputs(TRAINING, CPU))


@pytest.mark.parametrize("T", [1, 5, 300])  # of one piece, and of two
def test_the_truth_is_attention_of_the_last_row_in_float64(T):
    q, k, v = make_inputs(Problem(3, T, 310, 4, 16), CPU)
    do = torch.randn_like(q)
    truth = find_truth(q, k, v, 310 - T, do)
    leaves = [x[-1:].double().requires_grad_() for x in (q, k, v)]
    out = exact_attention(*leaves, 310 - T)
    expected = [out, *torch.autograd.grad(out, leaves, do[-1:].double())]
    for name, exact in zip(("out", "dq", "dk", "dv"), expected, strict=True):
        torch.testing.assert_close(truth.exact[name], exact)
    plain = plain_attention(q, k, v, 310 - T)
    assert truth.judge({"out": plain})["out"].passed
    assert truth.judge({"dq": truth.plain["dq"]})["dq"].passed
    for wrong in (plain + 0.1, plain.roll(1, 0), plain * float("nan")):
        assert not truth.judge({"out": wrong})["out"].passed


def test_operations_and_bytes_are_counted_as_by_hand():
    assert Problem(2, 3, 5, 4, 8).flops() == 2 * 2 * 2 * 4 * 8 * (3 + 4 + 5)
    assert attention_flops(1, 1, 7, 1, 1) == 4 * 7
    assert Problem(2, 3, 5, 4, 8).kv_bytes() == 2 * (2 * 5 * 8) * 2
