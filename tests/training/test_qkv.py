"""`mqa_gpt.training.qkv` against the split that attention itself makes."""

from __future__ import annotations

import pytest
import torch

from mqa_gpt.training.qkv import join_qkv, split_qkv
from tests.helpers import error, tiny_model


@pytest.mark.parametrize("multi_query", [True, False])
def test_the_parts_make_the_queries_keys_and_values_of_attention(multi_query: bool) -> None:
    model = tiny_model(multi_query=multi_query)
    attention = model.transformer.h[0].attn
    x = torch.randn(2, 5, model.config.n_embd)
    weights = split_qkv(attention.c_attn.weight, model.config)
    biases = split_qkv(attention.c_attn.bias, model.config)
    q, kv = attention.split(attention.c_attn(x))
    expected = (q, *kv.chunk(2, dim=-1))
    for weight, bias, part in zip(weights, biases, expected, strict=True):
        assert error(x @ weight.T + bias, part.flatten(2)) < 1e-5


@pytest.mark.parametrize("multi_query", [True, False])
def test_joining_undoes_splitting(multi_query: bool) -> None:
    model = tiny_model(multi_query=multi_query)
    for tensor in model.transformer.h[0].attn.c_attn.parameters():
        assert torch.equal(join_qkv(*split_qkv(tensor, model.config), model.config), tensor)
