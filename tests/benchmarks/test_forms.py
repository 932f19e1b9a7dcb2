"""benchmarks/forward_forms.py: every form of the forward loop is right, or says why it is not."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not available on this platform")

import forward_forms
from clock import Clock
from contenders import Problem, make_inputs
from forward_forms import Form, attend, described_attention, race
from judge import find_truth

from mqa_kernels.tuning import Tiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("B", "T", "H", "D"), [(1, 1, 1, 16), (3, 23, 3, 32), (2, 40, 12, 64), (1, 70, 48, 16)]
)
def test_descriptors_give_what_is_as_exact_as_plain_pytorch(B, T, H, D, dtype):
    q, k, v = make_inputs(Problem(B, T, T, H, D, dtype), DEVICE)
    out = described_attention(q, k, v, Tiles(32, 16, 4, 2), specialized=False)
    for row in range(B):
        verdicts = find_truth(q, k, v, 0, row=row).judge({"out": out})
        assert verdicts["out"].passed, verdicts


def test_every_form_is_timed_and_judged_and_a_form_that_fails_says_why(monkeypatch):
    problem = Problem(2, 24, 24, 4, 16)
    described = Form("descriptors", Tiles(16, 16, 4, 2))
    broken = Form("specialized", Tiles(16, 16, 4, 2))

    def fail_if_specialized(form, *arguments):
        if form.kind == "specialized":
            raise RuntimeError("cannot specialize")
        return attend(form, *arguments)

    monkeypatch.setattr(forward_forms, "attend", fail_if_specialized)
    forms = (Form(), Form("pointers", Tiles(16, 32, 4, 1)), described, broken)
    shipped, pointers, descriptors, failed = race(problem, Clock(DEVICE), forms, 1)
    assert shipped["contender"] == "shipped"
    assert pointers["contender"] == "pointers, 16x32, 4 warps, 1 stages"
    assert descriptors["contender"] == "descriptors, 16x16, 4 warps, 2 stages"
    for row in (shipped, pointers, descriptors):
        assert row["right"]
        assert row["tflops"] == pytest.approx(problem.flops() / row["whole"]["median"] / 1e12)
    assert "cannot specialize" in failed["refused"]


def test_names_tell_the_forms_apart():
    names = [form.name for form in forward_forms.FORMS]
    assert len(set(names)) == len(names)
