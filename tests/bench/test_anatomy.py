"""A forward pass taken apart, against a recorded one and against sums by hand."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from mqa_gpt import GPT, GPTConfig, KVCache
from mqa_gpt.bench.anatomy import TENSORS, Anatomy, Heads
from mqa_gpt.bench.counts import decode_bytes, model_bytes, prefill_flops, whole
from mqa_gpt.bench.devices import DEVICES, Device, find_device
from mqa_gpt.cache import cache_bytes
from mqa_gpt.errors import InputError
from mqa_gpt.research import record
from tests.helpers import random_ids, tiny_config

SEVEN_B = GPTConfig.preset("starcoderbase-7b")


@pytest.mark.parametrize("is_prefill", [True, False])
@pytest.mark.parametrize("multi_query", [True, False])
def test_shapes_are_those_of_a_recorded_pass(multi_query: bool, is_prefill: bool) -> None:
    config, B, S = tiny_config(multi_query=multi_query), 4, 20
    model = GPT(config, backend="reference").eval()
    cache = KVCache(config, B, S)
    T = S if is_prefill else 1
    names = [name for name, _ in TENSORS if not name.endswith(".cache")]
    with torch.inference_mode():
        if not is_prefill:
            model(random_ids(config, B, S - 1), cache=cache)
        with record(model, names) as acts:
            last = torch.full((B,), T - 1)
            logits = model(random_ids(config, B, T), cache=cache, logits_at=last)
    shapes = Anatomy(config, B, S, torch.float32).shapes(is_prefill=is_prefill)
    assert shapes.keys() == {*names, "transformer.h.*.cache"}
    assert shapes.pop("transformer.h.*.cache") == cache.kv.shape[1:]
    assert shapes.pop("lm_head") == logits.shape
    for name, shape in shapes.items():
        found = acts[name].shape
        assert (found[1:] if ".*." in name else found) == shape, name


def test_a_roofline_is_that_of_all_work_and_of_the_dtype() -> None:
    found = Anatomy(SEVEN_B, 1, 1024, torch.bfloat16)
    h100 = find_device("H100")
    assert h100 is not None
    roof = found.roof(h100)
    assert roof is not None
    assert roof.prefill == pytest.approx(prefill_flops(SEVEN_B, 1, 1024) / 989e12)
    least = decode_bytes(SEVEN_B, 1, [1024], 2, torch.bfloat16) / 3.35e12
    assert least < roof.decode < 1.01 * least  # activations are moved too
    assert not roof.prefill_is_memory_bound
    assert roof.decode_is_memory_bound
    assert roof.rates.mqa == pytest.approx(1 / roof.decode)
    assert roof.rates.mqa > roof.rates.mha
    t4 = find_device("T4")
    assert t4 is not None
    assert found.roof(t4) is None  # no bfloat16
    half = dataclasses.replace(found, dtype=torch.float16).roof(t4)
    assert half is not None
    assert half.dtype == torch.float16


def test_a_device_measured_in_one_dtype_runs_in_that() -> None:
    found = Anatomy(tiny_config(), 1, 20, torch.bfloat16)
    roof = found.roof(Device("this CPU", 1e9, 1e10, {torch.float32: 1e11}, "", is_measured=True))
    full = Anatomy(tiny_config(), 1, 20, torch.float32)
    assert roof is not None
    assert roof.dtype == torch.float32
    assert roof.decode == pytest.approx(whole(full.decode.values()).bytes / 1e10)


def test_more_rows_raise_the_intensity_of_decoding_only_where_they_share_what_is_read() -> None:
    found = Anatomy(SEVEN_B, 1, 8192, torch.bfloat16)
    (_, one), (_, many) = found.intensities(1), found.intensities(512)
    assert 1 < one.mqa < 2
    assert many.mqa > 15 * many.mha
    # With all heads the cache is soon all there is: 4 operations for 2 numbers of 2 bytes.
    attention_alone = 4 * 4096 * 8192 * 42 / (688_128 * 8192)
    assert attention_alone == 1
    assert attention_alone < many.mha < 5 * attention_alone


@pytest.mark.parametrize("int8", [False, True])
def test_rows_fit_as_long_as_weights_and_cache_do(int8: bool) -> None:
    config = tiny_config()
    found = Anatomy(config, 1, 20, torch.bfloat16)
    cached = torch.int8 if int8 else torch.bfloat16
    for heads, name in ((True, "mqa"), (False, "mha")):
        other = dataclasses.replace(config, multi_query=heads)
        exact = model_bytes(other, torch.bfloat16, int8=int8) + 7 * cache_bytes(
            other, cached, 1, 50
        )
        for memory, rows in ((exact, 7), (exact - 1, 6), (10, 0)):
            fits = found.rows_that_fit(memory, 50, torch.bfloat16, int8=int8)
            assert getattr(fits, name) == rows


def test_everything_is_ready_for_json() -> None:
    report = json.loads(json.dumps(Anatomy(SEVEN_B, 2, 1024, torch.float16).to_dict(DEVICES)))
    assert len(report["tensors"]) == len(TENSORS)
    assert report["dimensions"]["C+2GD"] == 4096 + 256
    assert report["decode"]["flops"] == sum(p["decode"]["flops"] for p in report["parts"].values())
    assert {entry["device"] for entry in report["rooflines"]} == {d.name for d in DEVICES}
    full = [entry for entry in report["rows_that_fit"] if entry["context"] == 8192]
    assert Heads(**full[-1]["16 bits"]).mqa > 30 * full[-1]["16 bits"]["mha"] > 0


@pytest.mark.parametrize(("batch", "context"), [(0, 8), (1, 0), (1, 113), (True, 8)])
def test_sizes_out_of_range_are_refused(batch: int, context: int) -> None:
    with pytest.raises(InputError, match="it must be an integer"):
        Anatomy(tiny_config(), batch, context, torch.float32)
