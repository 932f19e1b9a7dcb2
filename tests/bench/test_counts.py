"""Counts of operations and bytes, against what torch counts and what the model holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mqa_gpt import GPT, KVCache
from mqa_gpt.bench.counts import decode_bytes, prefill_flops, weight_bytes, work_by_part
from tests.helpers import random_ids, tiny_config


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("multi_query", [True, False])
def test_the_weights_read_are_those_of_the_linear_layers_and_norms(tied, multi_query):
    config = tiny_config(tie_word_embeddings=tied, multi_query=multi_query)
    read = {
        id(parameter): parameter.numel()
        for module in GPT(config).modules()
        if isinstance(module, (nn.Linear, nn.LayerNorm))
        for parameter in module.parameters()
    }
    assert weight_bytes(config, 4) == 4 * sum(read.values())


@pytest.mark.parametrize("multi_query", [True, False])
def test_a_decode_step_reads_the_weights_once_and_the_cache_of_every_row(multi_query):
    config = tiny_config(multi_query=multi_query)
    caches = [KVCache(config, 5, S, dtype=torch.bfloat16).kv.nbytes for S in (7, 8, 9)]
    found = decode_bytes(config, 5, range(7, 10), 1, torch.bfloat16)
    assert found == sum(caches) + 3 * weight_bytes(config, 1)


@pytest.mark.parametrize("multi_query", [True, False])
def test_operations_of_a_prefill_are_those_counted_by_torch_less_what_causality_hides(multi_query):
    config, B, T = tiny_config(multi_query=multi_query), 3, 11
    model = GPT(config, backend="reference").eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(random_ids(config, B, T), logits_at=torch.full((B,), T - 1))
    # The reference computes all T x T scores, of which T (T + 1) / 2 are needed.
    hidden = 4 * config.n_layer * config.n_embd * (T * T - T * (T + 1) // 2)
    assert prefill_flops(config, B, T) == counter.get_total_flops() - B * hidden


@pytest.mark.parametrize("itemsize", [4, 1])
@pytest.mark.parametrize("multi_query", [True, False])
def test_the_work_of_the_parts_is_that_of_a_decode_step(multi_query, itemsize):
    config, batch, context = tiny_config(multi_query=multi_query), 3, 20
    parts = work_by_part(config, batch, context, torch.float32, itemsize=itemsize, is_prefill=False)
    whole = sum(part.bytes for part in parts.values())
    least = decode_bytes(config, batch, range(context, context + 1), itemsize, torch.float32)
    C, L = config.n_embd, config.n_layer
    kv = 2 * config.n_kv_head * config.head_dim
    # Numbers of a row and layer: in and out of the four linear layers, of attention (q and its
    # output), GELU, two norms, two sums, and the new slot of the cache (counted twice, as it comes
    # from c_attn); then those of the embeddings and the head.
    layer = (2 * C + kv) + 2 * C + 2 * (C + 136) + 2 * C + 2 * 136 + 4 * C + 6 * C + 2 * kv
    ends = (4 + 3 + 2 + 1) * C + 2 * 97
    scale_of_biases_and_norms = whole - least - batch * 4 * (L * layer + ends)
    assert abs(scale_of_biases_and_norms) <= 4 * (L * (7 * C + kv + 136) + 2 * C)
    empty = work_by_part(config, 0, context, torch.float32, itemsize=itemsize, is_prefill=False)
    norms = (4 * config.n_layer + 2) * config.n_embd
    biases = config.n_layer * (3 * config.n_embd + kv + config.inner_size)
    expected = weight_bytes(config, itemsize) - itemsize * (norms + biases) + 4 * biases
    assert sum(part.bytes for part in empty.values()) == expected
    # Products of a token: two operations per weight of a matrix, and the attention's.
    weights = 2 * (60 * (60 + kv) + 60 * 60 + 2 * 60 * 136) + 97 * 60
    attention = 2 * 2 * (2 * 60 * context)
    assert sum(part.flops for part in parts.values()) == batch * (2 * weights + attention)


@pytest.mark.parametrize("multi_query", [True, False])
def test_the_work_of_the_parts_is_that_of_a_prefill(multi_query):
    config, batch, context = tiny_config(multi_query=multi_query), 3, 20
    parts = work_by_part(config, batch, context, torch.float32, itemsize=4, is_prefill=True)
    assert sum(part.flops for part in parts.values()) == prefill_flops(config, batch, context)
    assert parts["mlp.c_fc"].bytes == 2 * 4 * (61 * 136 + 3 * 20 * (60 + 136))
    assert parts["lm_head"].bytes == 4 * (60 * 97 + 3 * (60 + 97))


def test_only_linear_layers_have_8_bit_weights():
    work = work_by_part(tiny_config(), 1, 20, torch.float32, itemsize=1, is_prefill=False)
    assert {name for name, part in work.items() if part.itemsize == 1} == {
        *("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "lm_head")
    }
