from __future__ import annotations

import pytest
import torch

from mqa_gpt import GPT, LLM, GPTConfig, KVCache, generate
from mqa_gpt.cache import StaticCache, cache_bytes, dequantize_kv, quantize_kv
from mqa_gpt.errors import InputError
from mqa_gpt.generation.batching import stream_batched
from mqa_gpt.model import MultiQueryAttention
from mqa_gpt.sampling import SamplingParams
from tests.helpers import (
    our_model,
    random_ids,
    random_prompts,
    reference_model,
    relative_error,
    tiny_config,
)

CONFIG = GPTConfig(vocab_size=11, n_positions=20, n_embd=12, n_layer=2, n_head=3)


def fill(cache: KVCache, T: int, value: float) -> None:
    """Append T positions to every row and layer: value + 100 * row + 10 * layer + t."""
    L, B, _, G, width = cache.kv.shape
    for layer in range(L):
        kv = torch.full((B, T, G, width), value + 10 * layer)
        kv += 100 * torch.arange(B)[:, None, None, None] + torch.arange(T)[:, None, None]
        cache.append(layer, kv)
    cache.advance(T)


def slots(cache: KVCache, layer: int, row: int) -> list[float]:
    return cache.kv[layer, row, :, 0, 0].tolist()


def test_a_new_cache_is_empty_and_has_room_for_its_length() -> None:
    cache = KVCache(CONFIG, 3, 7, dtype=torch.bfloat16)
    assert cache.kv.shape == (2, 3, 7, 1, 8)  # L, B, slots, G, 2D
    assert cache.kv.dtype == torch.bfloat16
    assert (cache.batch_size, cache.max_length, cache.start, cache.end) == (3, 7, 0, 0)
    cache.require_room(7)
    with pytest.raises(ValueError, match="0 of 7 positions: 8 more do not fit"):
        cache.require_room(8)


def test_multi_head_caches_hold_every_head() -> None:
    config = GPTConfig(n_embd=12, n_head=3, n_layer=1, multi_query=False)
    assert KVCache(config, 1, 2).kv.shape == (1, 1, 2, 3, 8)


@pytest.mark.parametrize(
    ("batch_size", "max_length", "message"),
    [
        (0, 5, "batch_size is 0"),
        (1, 0, "max_length is 0.*context of 20"),
        (1, 21, "max_length is 21.*context of 20"),
    ],
)
def test_impossible_sizes_are_errors(batch_size: int, max_length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVCache(CONFIG, batch_size, max_length)


def test_appended_positions_follow_those_before() -> None:
    cache = KVCache(CONFIG, 2, 6)
    fill(cache, 2, 1.0)
    fill(cache, 3, 5.0)
    assert slots(cache, 0, 0) == [1, 2, 5, 6, 7, 0]
    assert slots(cache, 1, 1) == [111, 112, 115, 116, 117, 0]
    assert (cache.start, cache.end, cache.lengths.tolist()) == (5, 5, [5, 5])
    with pytest.raises(ValueError, match="holds 5 of 6 positions: 2 more"):
        cache.require_room(2)


def test_append_returns_a_view_of_everything_up_to_the_new_end() -> None:
    cache = KVCache(CONFIG, 2, 6)
    fill(cache, 2, 1.0)
    seen = cache.append(1, torch.full((2, 3, 1, 8), 9.0))
    assert seen.shape == (2, 5, 1, 8)
    assert seen.data_ptr() == cache.kv[1].data_ptr()
    assert seen[0, :, 0, 0].tolist() == [11, 12, 9, 9, 9]


def test_rows_of_different_lengths_are_written_each_behind_its_own_end() -> None:
    cache = KVCache(CONFIG, 3, 8)
    fill(cache, 4, 1.0)
    cache.set_lengths([1, 4, 0])
    assert cache.start.tolist() == [1, 4, 0]
    assert cache.end == 4
    fill(cache, 2, 51.0)
    assert slots(cache, 0, 0) == [1, 51, 52, 4, 0, 0, 0, 0]  # the 4 is old padding, hidden
    assert slots(cache, 0, 1) == [101, 102, 103, 104, 151, 152, 0, 0]
    assert slots(cache, 1, 2) == [261, 262, 213, 214, 0, 0, 0, 0]
    assert cache.lengths.tolist() == [3, 6, 2]
    assert cache.end == 6


def test_padding_that_was_announced_is_stored_as_zeros() -> None:
    cache = KVCache(CONFIG, 3, 8)
    cache.limit([1, 5, 3])
    fill(cache, 2, 1.0)
    fill(cache, 3, 51.0)
    assert slots(cache, 0, 0) == [1, 0, 0, 0, 0, 0, 0, 0]
    assert slots(cache, 0, 1) == [101, 102, 151, 152, 153, 0, 0, 0]
    assert slots(cache, 1, 2) == [211, 212, 261, 0, 0, 0, 0, 0]
    cache.set_lengths([1, 5, 3])
    fill(cache, 1, 71.0)
    assert slots(cache, 0, 0) == [1, 71, 0, 0, 0, 0, 0, 0]
    assert slots(cache, 0, 1)[5] == 171


def test_equal_lengths_are_one_number_again() -> None:
    cache = KVCache(CONFIG, 2, 8)
    fill(cache, 5, 1.0)
    cache.set_lengths([3, 2])
    assert torch.is_tensor(cache.start)
    cache.set_lengths([2, 2])
    assert cache.start == 2


@pytest.mark.parametrize("lengths", [[1], [1, 2, 3], [4, 0], [-1, 2]])
def test_lengths_that_were_never_written_are_errors(lengths: list[int]) -> None:
    cache = KVCache(CONFIG, 2, 8)
    fill(cache, 3, 1.0)
    with pytest.raises(ValueError, match="needs 2 numbers from 0 to 3"):
        cache.set_lengths(lengths)


def test_select_copies_rows_in_the_order_asked_for() -> None:
    cache = KVCache(CONFIG, 3, 6)
    fill(cache, 4, 1.0)
    cache.set_lengths([2, 4, 3])
    other = cache.select([2, 0, 2])
    assert other.lengths.tolist() == [3, 2, 3]
    assert slots(other, 1, 0)[:3] == [211, 212, 213]
    fill(other, 1, 51.0)
    assert slots(other, 0, 1)[:3] == [1, 2, 151]
    assert slots(cache, 0, 2)[:4] == [201, 202, 203, 204]  # the original is untouched
    assert cache.lengths.tolist() == [2, 4, 3]


def test_a_row_is_copied_with_zeros_where_the_other_cache_has_no_slots() -> None:
    cache, other = KVCache(CONFIG, 3, 6), KVCache(CONFIG, 2, 4)
    cache.kv.fill_(torch.nan)
    fill(other, 4, 1.0)
    cache.copy_row(1, other, 1)
    assert slots(cache, 0, 1) == [101, 102, 103, 104, 0, 0]
    assert slots(cache, 1, 1) == [111, 112, 113, 114, 0, 0]
    assert cache.kv[:, [0, 2]].isnan().all()  # the other rows are as they were
    cache.copy_row(0, cache, 1)
    assert slots(cache, 1, 0) == [111, 112, 113, 114, 0, 0]


def test_a_view_is_the_first_rows_on_the_same_memory() -> None:
    cache = KVCache(CONFIG, 3, 6)
    fill(cache, 4, 1.0)
    view = cache.view([2, 3])
    assert (view.batch_size, view.end, view.start.tolist()) == (2, 3, [2, 3])
    fill(view, 1, 51.0)
    assert slots(cache, 0, 0) == [1, 2, 51, 4, 0, 0]
    assert slots(cache, 1, 1) == [111, 112, 113, 161, 0, 0]
    assert slots(cache, 0, 2) == [201, 202, 203, 204, 0, 0]
    assert cache.view([4, 4]).start == 4


def test_rows_that_agree_once_others_are_left_out_share_one_start_again() -> None:
    cache = KVCache(CONFIG, 3, 6)
    fill(cache, 4, 1.0)
    cache.set_lengths([2, 4, 2])
    assert cache.select([0, 2]).start == 2
    assert cache.select([0, 2]).end == 2
    assert cache.select([1]).start == 4


def test_a_rewound_cache_continues_as_if_the_dropped_tokens_had_not_been() -> None:
    config = tiny_config()
    model = our_model(reference_model(config), config)
    ids = random_ids(config, 2, 9)
    with torch.no_grad():
        expected = model(ids)[:, 5:]
        cache = KVCache(config, 2, 12)
        model(torch.cat([ids[:, :5], random_ids(config, 2, 6, seed=1)], 1), cache=cache)
        cache.set_lengths([5, 5])
        torch.testing.assert_close(model(ids[:, 5:], cache=cache), expected, atol=1e-4, rtol=0)


def test_a_model_that_does_not_fit_the_cache_is_told_so() -> None:
    config = tiny_config()
    model = GPT(config).eval()
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match=r"for inference: .*torch.no_grad"):
        model(ids, cache=KVCache(config, 1, 8))
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"1 rows of torch.float32 .* 2 of torch.float32"):
            model(ids, cache=KVCache(config, 2, 8))
        with pytest.raises(ValueError, match=r"1 of torch.bfloat16"):
            model(ids, cache=KVCache(config, 1, 8, dtype=torch.bfloat16))


def test_a_cache_of_no_rows_cannot_be_selected() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        KVCache(tiny_config(), 2, 8).select([])


def test_a_full_cache_refuses_tokens_before_anything_is_written() -> None:
    config = tiny_config()
    model = our_model(reference_model(config), config)
    cache = KVCache(config, 1, 4)
    with torch.no_grad():
        model(random_ids(config, 1, 3), cache=cache)
        before = cache.kv.clone()
        with pytest.raises(ValueError, match="holds 3 of 4 positions: 2 more"):
            model(random_ids(config, 1, 2), cache=cache)
    assert torch.equal(cache.kv, before)
    assert cache.end == 3


def test_a_static_cache_writes_at_each_row_s_length_and_shows_all_slots() -> None:
    cache = KVCache(CONFIG, 2, 6)
    fill(cache, 3, 1.0)
    cache.set_lengths([3, 1])
    static = StaticCache(cache)
    for value in (7.0, 8.0):
        fill(static, 1, value)
    assert slots(static, 0, 0) == [1, 2, 3, 7, 8, 0]
    assert slots(static, 1, 1) == [111, 117, 118, 0, 0, 0]
    assert static.start.tolist() == static.lengths.tolist() == [5, 3]
    seen_slots = static.append(1, torch.zeros(2, 1, 1, 8))
    assert seen_slots.shape == (2, 6, 1, 8)
    assert static.kv.data_ptr() == cache.kv.data_ptr()  # it took the memory over


def test_a_static_cache_selects_rows_and_takes_one_token_at_a_time() -> None:
    cache = KVCache(CONFIG, 3, 6)
    fill(cache, 2, 1.0)
    static = StaticCache(cache)
    fill(static, 1, 9.0)
    static = StaticCache(static.select([2, 0]))
    fill(static, 1, 5.0)
    assert slots(static, 0, 0) == [201, 202, 209, 5, 0, 0]
    assert slots(static, 0, 1) == [1, 2, 9, 105, 0, 0]
    with pytest.raises(ValueError, match="2 tokens per row"):
        static.require_room(2)


def test_a_static_cache_does_not_take_over_an_int8_one() -> None:
    with pytest.raises(ValueError, match="the cache is int8"):
        StaticCache(KVCache(CONFIG, 2, 6, dtype=torch.int8))


# ------------------------------------------------------------------------------------------- int8


def int8_model(**changes: object) -> GPT:
    config = tiny_config(**changes)
    model = our_model(reference_model(config), config)
    model.cache_dtype = torch.int8
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
    many = sorted(
        (token.row, token.id)
        for token in stream_batched(
            model,
            prompts,
            12,
            2,
            SamplingParams(**{k: v for k, v in options.items() if k != "n"}),
            n=n,
        )
    )
    assert many == sorted((row, id_) for row, ids in enumerate(together) for id_ in ids)


def test_an_int8_cache_takes_half_of_bfloat16_and_what_is_counted():
    config = tiny_config(n_embd=512, n_head=4)
    small = KVCache(config, 3, 16, dtype=torch.int8)
    assert small.kv.nbytes + small.scales.nbytes == cache_bytes(config, torch.int8, 3, 16)
    assert cache_bytes(config, torch.int8) < 0.55 * cache_bytes(config, torch.bfloat16)


def test_an_unknown_cache_dtype_is_refused():
    with pytest.raises(InputError, match="cache_dtype is 'int4': accepted is int8"):
        LLM.load(cache_dtype="int4")
    assert LLM.load(cache_dtype="int8").model.cache_dtype == torch.int8
