from __future__ import annotations

import pytest
import torch

from mqa_gpt import GPT, GPTConfig, KVCache
from tests.helpers import (
    our_model,
    random_ids,
    reference_model,
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


def test_a_row_is_copied_to_another_in_the_same_memory() -> None:
    cache = KVCache(CONFIG, 3, 6)
    fill(cache, 4, 1.0)
    cache.copy_row(0, 1)
    assert slots(cache, 0, 0) == [101, 102, 103, 104, 0, 0]
    assert slots(cache, 1, 0) == [111, 112, 113, 114, 0, 0]
    assert slots(cache, 1, 2) == [211, 212, 213, 214, 0, 0]  # the others are as they were


def test_rows_are_cleared_for_the_next() -> None:
    cache = KVCache(CONFIG, 4, 6)
    cache.kv.fill_(torch.nan)
    cache.clear(1, 3)
    assert not cache.kv[:, 1:3].any()
    assert cache.kv[:, [0, 3]].isnan().all()
    cache.clear(3, 2)  # none


def test_some_rows_are_a_cache_of_their_own_on_the_same_memory() -> None:
    cache = KVCache(CONFIG, 4, 6)
    fill(cache, 4, 1.0)
    some = cache.rows(1, [2, 3])
    assert (some.batch_size, some.end, some.start.tolist()) == (2, 3, [2, 3])
    fill(some, 1, 51.0)
    assert slots(cache, 0, 1) == [101, 102, 51, 104, 0, 0]
    assert slots(cache, 1, 2) == [211, 212, 213, 161, 0, 0]
    assert slots(cache, 0, 0) == [1, 2, 3, 4, 0, 0]
    assert (cache.end, cache.lengths.tolist()) == (4, [4, 4, 4, 4])
    assert cache.rows(0, [4, 4]).start == 4
    assert cache.rows(2, [2]).start == 2


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
