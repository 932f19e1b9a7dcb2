"""Packed weights give the plain model's results, and give its memory back."""

import copy
import gc

import pytest
import torch
from torch import nn

from mqa_gpt import GPT, generate
from mqa_gpt.packing import PackedLinear, can_pack, pack
from tests.helpers import (
    our_model,
    random_ids,
    random_prompts,
    reference_greedy,
    reference_model,
    relative_error,
    tiny_config,
)

pytestmark = pytest.mark.skipif(
    not can_pack(nn.Linear(1, 1)), reason="this torch has no packed oneDNN products"
)


def packed_model(**changes: object) -> tuple[GPT, GPT]:
    config = tiny_config(**changes)
    plain = our_model(reference_model(config), config)
    packed = copy.deepcopy(plain)
    pack(packed)
    return plain, packed


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 17, 64, 300])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_computes_what_the_plain_one_does_for_any_number_of_rows(rows, bias):
    plain = nn.Linear(71, 45, bias=bias)
    x = torch.randn(rows, 71)
    with torch.inference_mode():
        expected = plain(x)
        assert relative_error(PackedLinear(plain)(x), expected) < 2e-6
        assert PackedLinear(plain)(x[:, None]).shape == (rows, 1, 45)


@pytest.mark.parametrize("changes", [{}, {"multi_query": False}, {"tie_word_embeddings": False}])
def test_a_packed_model_gives_transformers_tokens_and_logits(changes):
    plain, packed = packed_model(**changes)
    prompts = random_prompts(plain.config, [9, 30, 1])
    expected, _ = reference_greedy(reference_model(plain.config), prompts, 64)
    assert generate(packed, prompts, 64) == expected.tolist()
    ids = random_ids(plain.config, 3, 20)
    with torch.inference_mode():
        assert relative_error(packed(ids), plain(ids)) < 2e-5


def test_every_linear_layer_is_packed_and_its_weight_can_still_be_read():
    plain, packed = packed_model()
    layers = {n: m for n, m in packed.named_modules() if isinstance(m, PackedLinear)}
    assert layers.keys() == {n for n, m in plain.named_modules() if isinstance(m, nn.Linear)}
    for name, layer in layers.items():
        assert torch.equal(layer.weight, plain.get_submodule(name).weight)


def test_the_embedding_of_a_tied_head_stays_plain():
    plain, packed = packed_model()
    assert torch.equal(packed.transformer.wte.weight, plain.transformer.wte.weight)


def test_the_plain_weights_are_given_up():
    linear = nn.Sequential(nn.Linear(8, 8))
    pack(linear)
    gc.collect()
    assert not list(linear.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_only_float32_is_packed(dtype):
    model = nn.Linear(4, 4).to(dtype)
    assert not can_pack(model)
    with pytest.raises(ValueError, match="float32"):
        pack(model)


def test_a_packed_model_is_not_saved(tmp_path):
    _, packed = packed_model()
    with pytest.raises(ValueError, match="packed"):
        packed.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
