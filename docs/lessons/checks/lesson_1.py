"""Checks of lesson 1's exercises, against the library's layer and its reference attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from checks import checker
from mqa_gpt import GPTConfig
from mqa_gpt.attention import reference_attention
from mqa_gpt.model import MultiQueryAttention

SIZES = ((48, 3), (80, 5), (256, 4))  # C, H


def _layer(C: int, H: int, multi_query: bool) -> MultiQueryAttention:
    """A layer whose weights and biases are random."""
    config = GPTConfig(n_embd=C, n_head=H, multi_query=multi_query, vocab_size=8, n_layer=1)
    layer = MultiQueryAttention(config, 0).eval().requires_grad_(False)
    for parameter in layer.parameters():
        parameter.normal_(std=C**-0.5)
    return layer


def _c_attn_parameters(f: Callable[..., Any]) -> str | None:
    for C, H in SIZES:
        for multi_query in (False, True):
            layer = _layer(C, H, multi_query)
            G = layer.n_kv_head
            right = sum(parameter.numel() for parameter in layer.c_attn.parameters())
            got = f(C, H, G)
            if got == right:
                continue
            if got == layer.c_attn.weight.numel():
                return "almost: the weights are right, but each output also has a bias"
            if multi_query and got == 3 * C * (C + 1):
                return "right for MHA, but not for G = 1: use G for the keys and values"
            return f"for C = {C}, H = {H}, G = {G} it gives {got}; the layer has {right}"
    return None


def _grouped_attention(f: Callable[..., Any]) -> str | None:
    generator = torch.Generator().manual_seed(0)
    B, T, H, D = 2, 5, 6, 3
    for G in (1, H, 2, 3):
        q = torch.randn(B, T, H, D, generator=generator)
        k, v = torch.randn(2, B, T, G, D, generator=generator)
        scale = D**-0.5
        got, right = f(q, k, v), reference_attention(q, k, v, 0, scale)
        where = f"for H = {H} and G = {G}"
        if got.shape != right.shape:
            return f"{where} the shape is {tuple(got.shape)}; expected {tuple(right.shape)}"
        if torch.allclose(got, right, atol=1e-5):
            continue
        if torch.allclose(got, reference_attention(q, k, v, 0, 1.0), atol=1e-5):
            return "the scores are not multiplied by D^-0.5"
        if torch.allclose(got, reference_attention(q, k, v, T - 1, scale), atol=1e-5):
            return "the queries see later tokens: hide the keys after each query"
        if torch.isnan(got).any():
            return f"{where} there are NaNs: a query must see its own key, so no row is all hidden"
        order = torch.arange(H).view(H // G, G).T.flatten()  # heads with the same h % G together
        if torch.allclose(got[:, :, order], reference_attention(q[:, :, order], k, v, 0, scale)):
            return f"{where} neighbours must share: head h uses head h // (H/G), not h % G"
        return f"{where} the numbers differ from the library's reference_attention"
    return None


def _to_multi_head(f: Callable[..., Any]) -> str | None:
    for C, H in SIZES:
        mqa, mha = _layer(C, H, multi_query=True), _layer(C, H, multi_query=False)
        mha.c_proj.load_state_dict(mqa.c_proj.state_dict())
        weight, bias = f(mqa.c_attn.weight, mqa.c_attn.bias, H)
        if weight.shape != (3 * C, C) or bias.shape != (3 * C,):
            shapes = f"{tuple(weight.shape)} and {tuple(bias.shape)}"
            return f"for C = {C} the shapes are {shapes}; expected {(3 * C, C)} and {(3 * C,)}"
        x = torch.randn(2, 7, C)
        right = mqa(x, 0, None)  # (B, T, C)

        def output(
            weight: torch.Tensor,
            bias: torch.Tensor,
            mha: MultiQueryAttention = mha,
            x: torch.Tensor = x,
        ) -> torch.Tensor:
            mha.c_attn.load_state_dict({"weight": weight, "bias": bias})
            return mha(x, 0, None)  # (B, T, C)

        if torch.allclose(output(weight, bias), right, atol=1e-5):
            continue
        D = C // H
        # from all queries, all keys, all values to head by head
        by_head = torch.arange(3 * C).view(3, H, D).transpose(0, 1).flatten()
        if torch.allclose(output(weight[by_head], bias[by_head]), right, atol=1e-5):
            return "the rows are right, but their order is not: go head by head"
        return f"for C = {C}, H = {H} the MHA layer with your weights gives another output"
    return None


check = checker(
    c_attn_parameters=(
        _c_attn_parameters,
        "With G = 1 the keys and values take 2 D outputs, whatever the number of heads.",
    ),
    grouped_attention=(
        _grouped_attention,
        "One function covers MHA (G = H), MQA (G = 1) and everything between.",
    ),
    to_multi_head=(
        _to_multi_head,
        "Every MQA layer is an MHA layer. The way back loses something: lesson 7.",
    ),
)
