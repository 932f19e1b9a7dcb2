"""The induction circuit, before any training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mqa_gpt import GPT, GPTConfig
from mqa_gpt.research.heads import attention_patterns, induction_scores
from mqa_gpt.training.induction import start_from_induction
from tests.helpers import random_ids

SIZES = {
    "vocab_size": 200,
    "n_positions": 256,
    "n_embd": 128,
    "n_layer": 3,
    "n_head": 4,
    "initializer_range": 0.05,
}
CONFIG = GPTConfig(**SIZES)


def new_model(config: GPTConfig = CONFIG) -> GPT:
    torch.manual_seed(0)
    return GPT(config).eval()


def started_model() -> GPT:
    model = new_model()
    start_from_induction(model)
    return model


@torch.no_grad()
def hits(model: GPT) -> tuple[float, float]:
    """Accuracy on a random sequence, and on its repetition."""
    ids = random_ids(CONFIG, 4, 128).repeat(1, 2)
    right = (model(ids[:, :-1]).argmax(-1) == ids[:, 1:]).float()  # (B, T)
    return right[:, :127].mean().item(), right[:, 128:].mean().item()


def first_attention(model: GPT) -> Tensor:
    """Attention probabilities (T, S) of layer 0's head 0 on random tokens."""
    return attention_patterns(model, random_ids(CONFIG, 1, 256)[0].tolist())[0, 0]


def test_a_repeated_sequence_is_predicted() -> None:
    once, again = hits(started_model())
    assert once < 0.05
    assert again > 0.4


def test_without_the_circuit_repetition_does_not_help() -> None:
    assert max(hits(new_model())) < 0.05


def test_the_head_of_the_first_layer_attends_to_the_previous_token() -> None:
    weights = first_attention(started_model())
    assert torch.equal(weights[1:].argmax(-1), torch.arange(255))
    assert weights.diagonal(-1).min() > 0.5


def test_the_head_of_the_second_layer_attends_to_what_followed_before() -> None:
    scores = induction_scores(started_model(), length=100)  # (L, H)
    assert scores[1, 0] > 0.2
    assert scores[1, 0] == scores.max()
    assert induction_scores(new_model(), length=100).max() < 0.02


def test_without_the_circuit_its_attention_is_spread_out() -> None:
    assert first_attention(new_model()).diagonal(-1).median() < 0.1


def test_the_initial_weights_depend_on_the_seed_alone() -> None:
    one, other = started_model().state_dict(), started_model().state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_nothing_but_the_circuit_writes_to_the_residual_stream() -> None:
    for layer, block in enumerate(started_model().transformer.h):
        attention, D = block.attn.c_proj.weight, CONFIG.head_dim
        assert attention[:, :D].any() == (layer < 2)
        assert not attention[:, D:].any()
        assert not block.mlp.c_proj.weight.any()


@pytest.mark.parametrize(
    "change",
    [
        {"multi_query": False},
        {"n_layer": 1},
        {"n_head": 2},
        {"n_embd": 36},
        {"n_embd": 30, "n_head": 5},
    ],
    ids=["multi-head", "one layer", "C = 2D", "D odd", "C not a multiple of 4"],
)
def test_a_model_without_room_for_the_circuit_is_refused_unchanged(
    change: dict[str, int],
) -> None:
    config = GPTConfig(**SIZES | change)
    model = new_model(config)
    with pytest.raises(ValueError, match="is true, which needs multi_query, two layers"):
        start_from_induction(model)
    assert torch.equal(model.transformer.wpe.weight, new_model(config).transformer.wpe.weight)
