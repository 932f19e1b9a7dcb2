"""A model is plain, so that faster code may compute it, only where nothing was changed."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mqa_gpt import GPT, generate
from mqa_gpt.attention import reference_attention, sdpa_attention
from mqa_gpt.cache import KVCache
from mqa_gpt.fast.compiled import step_forward
from mqa_gpt.fast.int8 import quantize
from mqa_gpt.fast.plain import is_plain
from mqa_gpt.model import MLP
from tests.helpers import random_prompts, tiny_model


@pytest.fixture
def model() -> GPT:
    return tiny_model()


def test_a_model_is_plain_in_every_dtype_and_with_8_bit_weights(model):
    assert is_plain(model)
    assert is_plain(model.bfloat16())
    quantize(model)
    assert is_plain(model)
    assert not is_plain(model.train())


def add_hook(model: GPT) -> None:
    model.transformer.h[1].mlp.register_forward_hook(lambda *call: None)


def add_pre_hook(model: GPT) -> None:
    model.lm_head.register_forward_pre_hook(lambda *call: None)


def train_a_dropout(model: GPT) -> None:
    model.transformer.drop.train()


def attend_otherwise(model: GPT) -> None:
    model.transformer.h[0].attn.attend = lambda *arguments: sdpa_attention(*arguments)


def replace_forward(model: GPT) -> None:
    mlp = model.transformer.h[1].mlp
    mlp.forward = mlp.forward


def adapt_a_layer(model: GPT) -> None:
    class Adapted(nn.Linear):
        pass

    model.transformer.h[1].mlp.c_fc = Adapted(60, 136).eval()


def put_an_adapter_behind_attention(model: GPT) -> None:
    model.transformer.h[0].attn.resid_dropout = nn.Linear(60, 60).eval()


def normalise_the_embeddings(model: GPT) -> None:
    model.transformer.drop = nn.LayerNorm(60).eval()


def leave_a_norm_out(model: GPT) -> None:
    model.transformer.h[0].ln_1 = nn.Dropout(0.0).eval()


def replace_an_mlp(model: GPT) -> None:
    model.transformer.h[1].mlp = nn.Linear(60, 60).eval()


def replace_a_block(model: GPT) -> None:
    model.transformer.h[1] = nn.LayerNorm(60).eval()


def add_a_module(model: GPT) -> None:
    model.transformer.h[1].mlp.more = nn.Linear(60, 60).eval()


@pytest.mark.parametrize(
    "change",
    [
        *(add_hook, add_pre_hook, train_a_dropout, attend_otherwise),
        *(replace_forward, adapt_a_layer),
        *(put_an_adapter_behind_attention, normalise_the_embeddings, leave_a_norm_out),
        *(replace_an_mlp, add_a_module),
    ],
)
def test_a_model_that_was_changed_is_not_plain(model, change):
    change(model)
    assert not is_plain(model)


def test_what_is_no_block_is_not_plain(model):
    replace_a_block(model)
    assert not is_plain(model)


def test_something_that_looks_like_a_model_is_called_itself(model):
    class Wrapped:
        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def __call__(self, ids: Tensor, cache: KVCache) -> str:
            return "wrapped"

    assert step_forward(Wrapped())(torch.tensor([[1]]), model.new_cache(1, 1)) == "wrapped"


@torch.inference_mode()
def test_a_hook_that_returns_other_ids_leaves_the_cache_alone(model):
    model.register_forward_pre_hook(lambda module, arguments: arguments[0].clamp(max=50))
    prompt = random_prompts(model.config, [9])[0]
    expected = list(prompt)
    for _ in range(12):
        expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
    assert generate(model, [prompt], 12)[0] == expected[len(prompt) :]


def test_hooks_of_all_modules_are_called(model):
    modules = nn.modules.module
    for register in (
        modules.register_module_forward_hook,
        modules.register_module_forward_pre_hook,
    ):
        hook = register(lambda *call: None)
        assert not is_plain(model)
        hook.remove()
        assert is_plain(model)


def test_another_forward_of_a_class_is_called(model, monkeypatch):
    monkeypatch.setattr(MLP, "forward", lambda self, x: x)
    assert not is_plain(model)


@pytest.mark.parametrize("attend", [reference_attention, sdpa_attention])
def test_every_attention_of_our_own_is_plain(model, attend):
    model.transformer.h[1].attn.attend = attend
    assert is_plain(model)
