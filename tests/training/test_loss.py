"""`mqa_gpt.training.loss` against torch's and transformers' losses of all logits."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from mqa_gpt.training import loss
from mqa_gpt.training.loss import IGNORED, next_token_loss
from tests.helpers import (
    error,
    random_ids,
    reference_model,
    relative_error,
    tiny_config,
    tiny_model,
)


@pytest.fixture(autouse=True)
def chunks_of_16_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest, so that few tokens make several chunks and an incomplete one."""
    monkeypatch.setattr(loss, "CPU_CHUNK_BYTES", 1)


def example(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden (3, 15, 20), weight (61, 20), labels (3, 15), of which some are ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 15, 20, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(61, 20, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(61, (3, 15), generator=generator)
    labels[0, 3:7] = labels[2, -1] = IGNORED
    return hidden, weight, labels


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=str
)
def test_loss_and_gradients_are_those_of_cross_entropy(
    dtype: torch.dtype, tolerance: float
) -> None:
    hidden, weight, labels = example(dtype)
    expected = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten())
    expected_grads = torch.autograd.grad(expected, (hidden, weight))
    ours = next_token_loss(hidden, weight, labels).sum / (labels != IGNORED).sum()
    assert ours.dtype == dtype
    assert relative_error(ours, expected) < tolerance
    for mine, its in zip(torch.autograd.grad(ours, (hidden, weight)), expected_grads, strict=True):
        assert mine.dtype == dtype
        assert relative_error(mine, its) < tolerance


def test_each_token_has_its_own_loss_and_an_ignored_one_has_none() -> None:
    hidden, weight, labels = example()
    expected = F.cross_entropy((hidden @ weight.T).mT, labels, reduction="none")
    total, per_token = next_token_loss(hidden, weight, labels)
    assert per_token.shape == labels.shape
    assert not per_token.requires_grad
    assert error(per_token, expected) < 1e-5
    assert torch.all(per_token[labels == IGNORED] == 0)
    assert torch.equal(per_token.sum(), total)


def test_an_excluded_token_is_no_choice() -> None:
    hidden, weight, labels = example()
    is_excluded = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    assert (is_excluded & (labels == IGNORED)).any()
    # In the second row the label itself is named, which is a choice all the same.
    excluded = ((labels + torch.tensor([7, 0, 7])[:, None]) % 61).masked_fill(~is_excluded, IGNORED)
    tokens = torch.arange(61)
    away = (tokens == excluded[..., None]) & (tokens != labels[..., None])  # (3, 15, 61)
    logits = (hidden @ weight.T).masked_fill(away, -torch.inf)
    expected = F.cross_entropy(logits.mT, labels, reduction="none")
    expected_grads = torch.autograd.grad(expected.sum(), (hidden, weight))
    total, per_token = next_token_loss(hidden, weight, labels, excluded)
    assert error(per_token, expected) < 1e-5
    assert error(per_token, next_token_loss(hidden, weight, labels).per_token) > 1e-3
    for mine, its in zip(torch.autograd.grad(total, (hidden, weight)), expected_grads, strict=True):
        assert relative_error(mine, its) < 1e-6


def test_a_batch_without_labels_has_no_loss_and_no_gradient() -> None:
    hidden, weight, labels = example()
    total, _ = next_token_loss(hidden, weight, torch.full_like(labels, IGNORED))
    total.backward()  # type: ignore[no-untyped-call]
    assert total == 0
    assert torch.all(hidden.grad == 0)
    assert torch.all(weight.grad == 0)


def test_large_logits_neither_overflow_nor_lose_the_loss() -> None:
    hidden, weight, labels = example()
    expected = F.cross_entropy((1000 * hidden @ weight.T).mT, labels, reduction="sum")
    assert relative_error(next_token_loss(1000 * hidden, weight, labels).sum, expected) < 1e-6


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    hidden, weight, labels = example()
    if frozen != "weight":
        hidden = hidden.detach()
    if frozen != "hidden":
        weight = weight.detach()
    total, _ = next_token_loss(hidden, weight, labels)
    assert total.requires_grad == (frozen != "both")
    if frozen != "both":
        total.backward()  # type: ignore[no-untyped-call]
    assert (hidden.grad is None) == (frozen != "weight")
    assert (weight.grad is None) == (frozen != "hidden")


def test_under_autocast_the_products_are_bfloat16_and_the_loss_is_float32() -> None:
    hidden, weight, labels = example()
    reference = next_token_loss(*(t.detach().double() for t in (hidden, weight)), labels).sum
    with torch.autocast("cpu", torch.bfloat16):
        ours = next_token_loss(hidden, weight, labels).sum
    rounded = next_token_loss(hidden.bfloat16(), weight.bfloat16(), labels).sum
    assert ours.dtype == torch.float32
    assert torch.equal(ours, rounded)
    assert 0 < relative_error(ours, reference) < 2**-8
    ours.backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_the_gradient_can_be_used_once() -> None:
    hidden, weight, labels = example()
    total, _ = next_token_loss(hidden, weight, labels)
    total.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="compute the loss again"):
        total.backward()  # type: ignore[no-untyped-call]


@pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="linear_cross_entropy is new in torch 2.13"
)
def test_loss_and_gradients_are_those_of_torchs_linear_cross_entropy() -> None:
    hidden, weight, labels = example()
    expected = F.linear_cross_entropy(
        hidden.flatten(0, 1), weight, labels.flatten(), reduction="sum",
        options=torch.nn.LinearCrossEntropyOptions(),
    )  # fmt: skip
    expected_grads = torch.autograd.grad(expected, (hidden, weight))
    ours = next_token_loss(hidden, weight, labels).sum
    assert relative_error(ours, expected) < 1e-6
    for mine, its in zip(torch.autograd.grad(ours, (hidden, weight)), expected_grads, strict=True):
        assert relative_error(mine, its) < 1e-6


def test_loss_and_gradients_of_the_model_are_those_of_transformers() -> None:
    config = tiny_config()
    reference, model = reference_model(config), tiny_model()
    ids = random_ids(config, 3, 19)
    labels = ids.clone()
    labels[1, :9] = IGNORED  # a prompt
    expected = reference(ids, labels=labels).loss
    expected.backward()

    hidden = model.transformer(ids[:, :-1])
    counted = (labels[:, 1:] != IGNORED).sum()
    ours = next_token_loss(hidden, model.lm_head.weight, labels[:, 1:]).sum / counted
    ours.backward()  # type: ignore[no-untyped-call]
    assert relative_error(ours, expected) < 1e-6
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():  # the tied embedding gets both its gradients
        assert parameter.grad is not None
        assert relative_error(parameter.grad, theirs[name].grad) < 2e-5, name


MEMORY = """
import sys, torch
import torch.nn.functional as F
from mqa_gpt.machine import peak_memory
from mqa_gpt.training.loss import next_token_loss
torch.set_num_threads(1)
hidden = torch.randn(2048, 64, requires_grad=True)
weight = torch.randn(49152, 64, requires_grad=True)
labels = torch.randint(49152, (2048,))
before = peak_memory()
if sys.argv[1] == "ours":
    next_token_loss(hidden, weight, labels).sum.backward()
else:
    F.cross_entropy(hidden @ weight.T, labels, reduction="sum").backward()
print((peak_memory() - before) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is this process's own on Linux only")
def test_at_the_vocabulary_of_starcoder_it_takes_a_fifth_of_the_memory() -> None:
    megabytes = {
        which: float(
            subprocess.run(
                [sys.executable, "-c", MEMORY, which], check=True, capture_output=True, text=True
            ).stdout
        )
        for which in ("ours", "plain")
    }
    assert megabytes["plain"] > 2 * 2048 * 49152 * 4 / 2**20  # logits and their gradient
    assert megabytes["ours"] < 0.2 * megabytes["plain"]
