"""The loss that is minimised, its gradient in parts, and the held-out losses, next to cross-entropy
of the model's own logits.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mqa_gpt import GPT
from mqa_gpt.training.loss import IGNORED
from mqa_gpt.training.objective import Objective, add_gradients, mean_losses
from mqa_gpt.training.packing import CONTEXT, LEFT_TO_RIGHT, MASKED, MIDDLE
from mqa_gpt.training.parallel import World
from mqa_gpt.training.samples import Batch
from tests.helpers import random_ids, relative_error, tiny_config, tiny_model

ALONE = World(0, 1, torch.device("cpu"))


def batch_of(model: GPT, rows: int, seed: int = 0) -> Batch:
    """Random tokens of all kinds, some of which do not count."""
    ids = random_ids(model.config, rows, 15, seed=seed)
    kinds = torch.randint(4, (rows, 14), generator=torch.Generator().manual_seed(seed))
    labels = ids[:, 1:].masked_fill(kinds == MASKED, IGNORED)
    return Batch(ids[:, :-1], labels, kinds.to(torch.uint8))


def each_loss(model: GPT, batch: Batch) -> Tensor:
    """Of PyTorch's own cross-entropy, (B, T), 0 where a label does not count."""
    logits = model(batch.ids).transpose(1, 2)
    return F.cross_entropy(logits, batch.labels, reduction="none", ignore_index=IGNORED)


def test_gradients_of_micro_batches_add_up_to_that_of_the_mean_over_all() -> None:
    model, other = tiny_model().train(), tiny_model().train()
    batches = [batch_of(model, 2, seed) for seed in (1, 2, 3)]
    counts = [(batch.labels != IGNORED).sum().item() for batch in batches]
    assert len(set(counts)) > 1  # else a mean of means would do
    loss, tokens = add_gradients(Objective(model, "float32", False), batches, [0, 1, 2], ALONE)
    expected = sum(each_loss(other, batch).sum() for batch in batches) / sum(counts)
    assert isinstance(expected, Tensor)
    expected.backward()
    assert tokens == sum(counts)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for (name, mine), its in zip(model.named_parameters(), other.parameters(), strict=True):
        assert relative_error(mine.grad, its.grad) < 1e-4, name


def test_dropout_depends_on_the_seed_alone() -> None:
    model = tiny_model(resid_pdrop=0.5).train()
    objective, batch = Objective(model, "float32", False), batch_of(model, 2)
    losses = [add_gradients(objective, [batch], [seed], ALONE)[0] for seed in (7, 8, 7)]
    assert losses[0] == losses[2] != losses[1]


def test_held_out_losses_are_told_apart_by_the_kind_of_label() -> None:
    model = tiny_model()
    batches = [batch_of(model, 2, seed) for seed in (1, 2)]
    found = mean_losses(Objective(model, "float32", False), batches, ALONE)
    each = torch.cat([each_loss(model, batch) for batch in batches])
    kinds = torch.cat([batch.kinds for batch in batches])
    for name, chosen in (
        ("loss", kinds != MASKED),
        ("left_to_right", kinds == LEFT_TO_RIGHT),
        ("infilling", kinds == MIDDLE),
    ):
        assert found[name] == pytest.approx(each[chosen].mean().item(), rel=1e-5), name
    only = batches[0]._replace(kinds=torch.full_like(batches[0].kinds, CONTEXT))
    assert mean_losses(Objective(model, "float32", False), [only], ALONE)["infilling"] is None


def test_the_end_may_be_no_choice_in_prefix_and_suffix() -> None:
    model, end = tiny_model(), 0
    batch = batch_of(model, 8)
    is_context = batch.kinds == CONTEXT
    batch = batch._replace(labels=batch.labels.masked_fill(is_context & (batch.labels == end), 1))
    assert (batch.labels[batch.kinds == MIDDLE] == end).any()
    found = Objective(model, "float32", False, no_end=end)(batch).per_token
    logits = model(batch.ids)  # (B, T, V)
    logits[..., end].masked_fill_(is_context, -torch.inf)
    expected = F.cross_entropy(logits.mT, batch.labels, reduction="none", ignore_index=IGNORED)
    assert relative_error(found, expected) < 1e-5
    every = Objective(model, "float32", False)(batch).per_token
    assert torch.equal(found == every, ~is_context)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_the_first_loss_of_a_new_model_is_that_of_guessing(backend: str) -> None:
    torch.manual_seed(0)
    model = GPT(tiny_config(initializer_range=0.02), backend)
    loss = mean_losses(Objective(model, "float32", False), [batch_of(model, 4)], ALONE)["loss"]
    assert loss == pytest.approx(math.log(97), abs=0.1)


def test_bfloat16_rounds_products_and_keeps_weights() -> None:
    model = tiny_model().train()
    batch = batch_of(model, 2)
    exact = Objective(model, "float32", False)(batch)
    rounded = Objective(model, "bfloat16", False)(batch)
    assert rounded.sum.dtype == model.dtype == torch.float32
    assert 0 < relative_error(rounded.per_token, exact.per_token) < 0.05
