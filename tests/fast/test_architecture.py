"""What flattens or fuses the model agrees with model.py, its definition, for every config key."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not available on this platform")

from mqa_gpt import GPT, GPTConfig, KVCache
from mqa_gpt.config import ACTIVATIONS
from mqa_gpt.fast.compiled import compiled_forward, step_forward
from mqa_gpt.fast.decode_step import StaticCache
from mqa_gpt.fast.fused_step import fused_hidden, fused_logits
from tests.helpers import our_model, random_ids, reference_model, relative_error, tiny_config

# NumPy says so where exp is infinite, as it should be: the sigmoid of that is 0.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:overflow encountered in exp")]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 2e-5  # float32, of the largest value
LENGTHS = [9, 1, 5]  # tokens in each row's cache

# What each key of a config is changed to. The keys of a group are changed together.
VALUES: dict[str | tuple[str, ...], list[object]] = {
    "vocab_size": [1, 130],
    "n_positions": [max(LENGTHS) + 1],
    ("n_embd", "n_head"): [(51, 3), (5, 1), (66, 2), (128, 1), (6, 6)],  # D 17, 5, 33, 128, 1
    "n_layer": [1, 3],
    "n_inner": [None, 1, 77],
    "activation_function": list(ACTIVATIONS),
    "layer_norm_epsilon": [1e-12, 1e-6, 0.3],
    "scale_attn_weights": [False, True],
    "multi_query": [False, True],
    "tie_word_embeddings": [False, True],
    ("resid_pdrop", "embd_pdrop", "attn_pdrop"): [(0.5, 0.5, 0.5)],  # off in evaluation mode
}
# These are not part of the computation.
UNUSED = {"initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "extra"}


def _changes() -> Iterator[dict[str, object]]:
    """All values of `VALUES`; those of attention also with one key/value head per query head."""
    for keys, values in VALUES.items():
        for value in values:
            names, each = (keys, value) if isinstance(keys, tuple) else ((keys,), (value,))
            change = dict(zip(names, each, strict=True))
            yield change
            if "n_head" in change or "scale_attn_weights" in change:
                yield {"multi_query": False} | change


CHANGES = list(_changes())


def model_of(change: dict[str, object]) -> GPT:
    config = tiny_config(**{"n_layer": 1} | change)  # the kernels' interpreter is slow
    return our_model(reference_model(config), config).to(DEVICE)


@torch.inference_mode()
def step_by(
    model: GPT,
    forward: Callable[[Tensor, KVCache], Tensor],
    wrap: Callable[[KVCache], KVCache] = lambda cache: cache,
) -> tuple[Tensor, Tensor]:
    """The logits (B, V) of a step after prompts of different lengths, and the cache's contents."""
    ids = random_ids(model.config, len(LENGTHS), max(LENGTHS) + 1).to(DEVICE)
    cache = model.new_cache(len(LENGTHS), max(LENGTHS) + 1)
    model(ids[:, :-1], cache=cache)
    cache.set_lengths(LENGTHS)
    return forward(ids[:, -1:], wrap(cache)), cache.kv


def by_modules(model: GPT) -> Callable[[Tensor, KVCache], Tensor]:
    return lambda ids, cache: model(ids, cache=cache)[:, 0]


def static(cache: KVCache) -> StaticCache:
    return StaticCache(cache, cache.lengths, torch.ones_like(cache.lengths))


def test_every_key_of_the_config_is_compared_with_every_value_it_can_switch_to():
    keys = {key for keys in VALUES for key in (keys if isinstance(keys, tuple) else (keys,))}
    fields = {field.name: field for field in dataclasses.fields(GPTConfig)}
    assert keys | UNUSED == fields.keys()
    assert not keys & UNUSED
    switches = {name for name, field in fields.items() if field.type == "bool"}
    assert switches == {"scale_attn_weights", "multi_query", "tie_word_embeddings"}
    assert all(set(VALUES[name]) == {False, True} for name in switches)


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.skipif(DEVICE != "cpu", reason="on a CPU")
def test_the_compiled_step_is_the_models_within_rounding(change: dict[str, object]):
    model = model_of(change)
    forward = compiled_forward(model)
    assert forward is not None
    found = step_by(model, lambda ids, cache: forward(ids, cache)[:, 0])
    for ours, expected in zip(found, step_by(model, by_modules(model)), strict=True):
        assert relative_error(ours, expected) <= TOLERANCE


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_the_fused_step_is_the_models_within_rounding(change: dict[str, object]):
    model = model_of(change)

    def fused(ids: Tensor, cache: KVCache) -> Tensor:
        return fused_logits(model, fused_hidden(model, ids, cache))

    found = step_by(model, fused, static)
    for ours, expected in zip(found, step_by(model, by_modules(model), static), strict=True):
        assert relative_error(ours, expected) <= TOLERANCE


@pytest.mark.parametrize("way", ["modules", "compiled", "fused"])
def test_an_activation_that_the_model_does_not_know_is_an_error_in_every_way(way: str):
    model = model_of({})
    forwards = {
        "modules": by_modules(model),
        "compiled": lambda ids, cache: step_forward(model)(ids, cache),
        "fused": lambda ids, cache: fused_hidden(model, ids, cache),
    }

    def forward(ids: Tensor, cache: KVCache) -> Tensor:
        model.transformer.h[0].mlp.activation = "swish"  # after the prefill by modules
        return forwards[way](ids, cache)

    with pytest.raises(KeyError, match="swish"):
        step_by(model, forward, static if way == "fused" else lambda cache: cache)


@pytest.mark.parametrize(
    "change",
    [
        *({"activation_function": name} for name in ("gelu", "relu")),
        {"layer_norm_epsilon": 0.3},
        {"scale_attn_weights": False},
    ],
    ids=str,
)
def test_a_switch_that_is_ignored_would_show(change: dict[str, object]):
    """With the same weights the logits differ by more than the tolerance."""
    plain, changed = (
        step_by(model, by_modules(model)) for model in (model_of({}), model_of(change))
    )
    assert relative_error(changed[0], plain[0]) > 2 * TOLERANCE
