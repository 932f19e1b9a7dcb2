"""Counts of operations and bytes, against what torch counts and what the model holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mqa_gpt import GPT, KVCache
from mqa_gpt.bench.counts import (
    decode_bytes,
    model_bytes,
    prefill_flops,
    weight_bytes,
    whole,
    work_by_part,
)
from mqa_gpt.fast.int8 import quantize
from mqa_gpt.research import record
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
    least = decode_bytes(config, batch, range(context, context + 1), itemsize, torch.float32)
    C, L = config.n_embd, config.n_layer
    kv = 2 * config.n_kv_head * config.head_dim
    # Numbers of a row and layer: in and out of the four linear layers, of attention (q and its
    # output), GELU, two norms, two sums, and the new slot of the cache (counted twice, as it comes
    # from c_attn); then those of the embeddings and the head.
    layer = (2 * C + kv) + 2 * C + 2 * (C + 136) + 2 * C + 2 * 136 + 4 * C + 6 * C + 2 * kv
    ends = (4 + 3 + 2 + 1) * C + 2 * 97
    norms, biases = (4 * L + 2) * C, L * (3 * C + kv + 136)
    never_8_bits = (4 - itemsize) * (norms + biases)
    assert whole(parts.values()).bytes == least + never_8_bits + batch * 4 * (L * layer + ends)
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


@pytest.mark.parametrize("is_prefill", [True, False])
@pytest.mark.parametrize("multi_query", [True, False])
def test_operations_of_each_part_are_those_that_torch_counts_in_its_module(multi_query, is_prefill):
    config, B, S = tiny_config(multi_query=multi_query), 3, 20
    model = GPT(config, backend="reference").eval()
    cache = KVCache(config, B, S)
    with torch.inference_mode():
        if not is_prefill:
            model(random_ids(config, B, S - 1), cache=cache)
        T = S if is_prefill else 1
        last = torch.full((B,), T - 1)
        with FlopCounterMode(display=False) as counter:
            model(random_ids(config, B, T), cache=cache, logits_at=last)
    counted: dict[str, int] = {}
    for module, operations in counter.get_flop_counts().items():
        name = ".".join(module.split(".")[4 if ".h." in module else 1 :])
        counted[name] = counted.get(name, 0) + sum(operations.values())
    counted["attention"] = counted["attn"] - counted["attn.c_attn"] - counted["attn.c_proj"]
    # The reference computes all T x S scores; causality needs fewer.
    hidden = T * S - (T * (S - T) + T * (T + 1) // 2)
    counted["attention"] -= B * 4 * config.n_layer * config.n_embd * hidden
    parts = work_by_part(config, B, S, torch.float32, itemsize=4, is_prefill=is_prefill)
    for name in ("attn.c_attn", "attention", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "lm_head"):
        assert parts[name].flops == counted[name] > 0, name
    found = whole(parts.values()).flops
    assert found == counter.get_total_flops() - B * 4 * config.n_layer * config.n_embd * hidden


@pytest.mark.parametrize("is_prefill", [True, False])
@pytest.mark.parametrize("multi_query", [True, False])
def test_bytes_of_each_part_are_those_of_the_tensors_of_a_recorded_pass(multi_query, is_prefill):
    config, B, S = tiny_config(multi_query=multi_query), 3, 20
    model = GPT(config, backend="reference").eval()
    cache = KVCache(config, B, S)
    T = S if is_prefill else 1
    moved: dict[str, int] = {}

    def add(name: str, *tensors: torch.Tensor) -> None:
        moved[name] = moved.get(name, 0) + sum(tensor.nbytes for tensor in tensors)

    def watch(name: str, module: nn.Module) -> None:
        weights = list(module.parameters())
        module.register_forward_hook(lambda _, given, y: add(name, given[0], y, *weights))

    groups = {"ln_1": "ln_1, ln_2", "ln_2": "ln_1, ln_2"}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            short = ".".join(name.split(".")[3 if ".h." in name else -1 :])
            watch(groups.get(short, short), module)
    names = ("mlp.c_fc", "mlp.post", "attn.q", "attn.z", "attn.k", "attn.v", "resid_pre")
    with torch.inference_mode():
        if not is_prefill:
            model(random_ids(config, B, S - 1), cache=cache)
            moved.clear()
        with record(model, [f"transformer.h.*.{name}" for name in names]) as acts:
            logits = model(random_ids(config, B, T), cache=cache, logits_at=torch.full((B,), T - 1))

    def recorded(name: str) -> torch.Tensor:
        return acts[f"transformer.h.*.{name}"]

    add("GELU", recorded("mlp.c_fc"), recorded("mlp.post"))
    add("attention", recorded("attn.q"), recorded("attn.z"), cache.kv)
    add("cache", *[recorded("attn.k"), recorded("attn.v")] * 2)
    stream = recorded("resid_pre")[0]  # (B, T, C)
    add("wte, wpe", *[stream] * 4)  # each row of the tables is read and written
    add("rest", *[stream] * 3, *[recorded("resid_pre")] * 6, logits)  # sums of two; argmax
    parts = work_by_part(config, B, S, torch.float32, itemsize=4, is_prefill=is_prefill)
    assert {name: part.bytes for name, part in parts.items() if part.bytes} == moved


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("multi_query", [True, False])
def test_the_parts_hold_all_parameters_and_memory_is_what_a_model_takes(multi_query, tied):
    config = tiny_config(multi_query=multi_query, tie_word_embeddings=tied)
    parts = work_by_part(config, 1, 1, torch.float32, itemsize=4, is_prefill=False)
    assert whole(parts.values()).parameters == config.parameters
    model = GPT(config).bfloat16()

    def memory() -> int:
        tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
        return sum(tensor.nbytes for tensor in tensors.values())

    assert model_bytes(config, torch.bfloat16) == memory()
    quantize(model)
    assert model_bytes(config, torch.bfloat16, int8=True) == memory()
