"""Keys and values as 8-bit integers: how far they are from what they were made of."""

import pytest
import torch

from mqa_gpt import GPT, LLM, InputError, generate
from mqa_gpt.cache import cache_bytes
from mqa_gpt.fast.int8_cache import Int8KVCache, dequantize_kv, quantize_kv
from mqa_gpt.model import MultiQueryAttention
from mqa_gpt.sampling import SamplingParams
from tests.helpers import (
    engine_tokens,
    our_model,
    random_ids,
    random_prompts,
    reference_model,
    relative_error,
    tiny_config,
)


def int8_model(**changes: object) -> GPT:
    config = tiny_config(**changes)
    model = our_model(reference_model(config), config)
    model.cache_class = Int8KVCache
    return model


def test_an_int8_cache_keeps_each_key_and_value_to_half_a_step_of_its_scale():
    kv = torch.randn(2, 3, 2, 10) * torch.logspace(-4, 4, 3)[:, None, None]
    kv[0, 1] = 0
    integers, scales = quantize_kv(kv)
    assert (integers.dtype, integers.shape, scales.shape) == (torch.int8, kv.shape, (2, 3, 2, 2))
    back = dequantize_kv(integers, scales, kv.dtype)
    steps = kv.view(2, 3, 2, 2, 5).abs().amax(-1) / 127  # of K and of V
    error = (back - kv).view(2, 3, 2, 2, 5).abs().amax(-1)
    assert (error <= 0.5001 * steps).all()
    assert not back[0, 1].any()


@pytest.mark.parametrize("changes", [{}, {"multi_query": False}])
def test_with_an_int8_cache_attention_sees_what_is_kept(changes):
    """The model on rounded keys and values, computed without the cache's own code."""
    model = int8_model(**changes)
    ids = random_ids(model.config, 2, 9)

    original = MultiQueryAttention.split

    def split(self, qkv):
        q, kv = original(self, qkv)
        return q, dequantize_kv(*quantize_kv(kv), kv.dtype)

    with torch.inference_mode():
        cache = model.new_cache(2, 9)
        got = torch.cat([model(ids[:, :5], cache=cache), model(ids[:, 5:], cache=cache)], 1)
        MultiQueryAttention.split = split
        try:
            expected = model(ids)
        finally:
            MultiQueryAttention.split = original
        assert relative_error(got, expected) < 1e-5
        assert relative_error(got, model(ids)) > 1e-4  # it does round


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3, "n": 2}])
def test_rows_of_an_int8_cache_are_those_of_solo_runs(options):
    model = int8_model()
    prompts = random_prompts(model.config, [9, 30, 1])
    n = options.get("n", 1)
    together = generate(model, prompts, 12, **options)
    alone = [row for prompt in prompts for row in generate(model, [prompt], 12, **options)]
    assert together == alone
    sampling = SamplingParams(**{k: v for k, v in options.items() if k != "n"})
    many = sorted(
        (token.row, token.id) for token in engine_tokens(model, prompts, 12, sampling, n=n, slots=2)
    )
    assert many == sorted((row, id_) for row, ids in enumerate(together) for id_ in ids)


def test_an_int8_cache_takes_half_of_bfloat16_and_what_is_counted():
    config = tiny_config(n_embd=512, n_head=4)
    small = Int8KVCache(config, 3, 16)
    assert small.kv.nbytes + small.scales.nbytes == cache_bytes(config, torch.int8, 3, 16)
    assert cache_bytes(config, torch.int8) < 0.55 * cache_bytes(config, torch.bfloat16)


def test_an_unknown_cache_dtype_is_refused():
    with pytest.raises(InputError, match="cache_dtype is 'int4': expected int8"):
        LLM.load(cache_dtype="int4")
    assert LLM.load(cache_dtype="int8").model.cache_class is Int8KVCache
