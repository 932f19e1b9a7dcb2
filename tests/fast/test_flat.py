"""The flat forward pass is the model's, bit for bit, and is used only where nothing was changed."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mqa_gpt import GPT, generate
from mqa_gpt.attention import reference_attention, sdpa_attention
from mqa_gpt.cache import KVCache
from mqa_gpt.fast.flat import flat_forward, is_plain
from mqa_gpt.fast.int8 import Int8Linear, quantize
from mqa_gpt.fast.int8_cache import Int8KVCache
from mqa_gpt.fast.packing import can_pack, pack
from mqa_gpt.generation.speculative import DraftModel, PromptLookup
from mqa_gpt.model import MLP
from tests.helpers import our_model, random_ids, random_prompts, reference_model, tiny_config

needs_packed = pytest.mark.skipif(
    not (can_pack(nn.Linear(1, 1)) and can_pack(Int8Linear(nn.Linear(1, 1)))),
    reason="this torch has no packed products",
)


def tiny_model(**changes: object) -> GPT:
    config = tiny_config(**changes)
    return our_model(reference_model(config), config)


@pytest.fixture
def model() -> GPT:
    return tiny_model()


def is_flat(model: GPT) -> bool:
    """Whether the function that `flat_forward` makes leaves the model's own `__call__` out."""
    with counted_calls() as calls, torch.inference_mode():
        flat_forward(model)(torch.tensor([[1]]), model.new_cache(1, 1))
    return not calls


@contextmanager
def counted_calls() -> Iterator[list[GPT]]:
    """The models that are called inside, in order."""
    calls: list[GPT] = []

    def counting(self: GPT, *arguments: Any, **options: Any) -> Tensor:
        calls.append(self)
        return nn.Module.__call__(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPT, "__call__", counting)
        yield calls


def as_is(model: GPT) -> None:
    pass


def quantize_and_pack(model: GPT) -> None:
    quantize(model)
    pack(model)


CHANGES = [
    {},
    {"multi_query": False},
    {"tie_word_embeddings": False},
    {"scale_attn_weights": False},
    {"activation_function": "relu"},
    {"activation_function": "gelu"},
    {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
]
FORMS = [
    as_is,
    GPT.bfloat16,
    quantize,
    pytest.param(pack, marks=needs_packed),
    pytest.param(quantize_and_pack, marks=needs_packed),
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_it_gives_the_models_bits(changes: dict[str, object], form: Callable[[GPT], object]):
    model = tiny_model(**changes)
    form(model)
    assert_same(model)


@pytest.mark.parametrize("cache_class", [KVCache, Int8KVCache])
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_it_has_the_models_cache_and_backend(model, cache_class, backend):
    model.cache_class = cache_class
    model.set_backend(backend)
    assert_same(model)


@torch.inference_mode()
def assert_same(model: GPT) -> None:
    """Of one and of several tokens, after rows of equal and of different lengths."""
    assert is_flat(model)
    forward = flat_forward(model)
    for lengths in ([9, 9, 9], [9, 4, 1]):
        cache, other = (model.new_cache(3, 20) for _ in range(2))
        ids = random_ids(model.config, 3, 9)
        assert torch.equal(model(ids, cache=cache), forward(ids, other))
        for T in (1, 3, 1):
            for each in (cache, other):
                each.set_lengths(lengths)
            ids = random_ids(model.config, 3, T, seed=T)
            assert torch.equal(model(ids, cache=cache), forward(ids, other))
            assert torch.equal(cache.kv, other.kv)
            assert torch.equal(cache.lengths, other.lengths)
            assert cache.end == other.end


def test_it_refuses_what_the_model_refuses(model):
    forward, cache = flat_forward(model), model.new_cache(1, 4)
    with pytest.raises(ValueError, match="5 more do not fit"):
        forward(random_ids(model.config, 1, 5), cache)
    with pytest.raises(IndexError):
        forward(torch.tensor([[97]]), cache)
    with pytest.raises(ValueError, match="inference_mode"):
        forward(torch.tensor([[1]]), cache)


def test_it_calls_no_module(model, monkeypatch):
    forward, cache = flat_forward(model), model.new_cache(1, 4)
    monkeypatch.setattr(nn.Module, "__call__", None)
    with torch.inference_mode():
        assert forward(torch.tensor([[1, 2]]), cache).shape == (1, 2, 97)


def test_changed_and_replaced_weights_are_read(model):
    other = our_model(reference_model(model.config, seed=1), model.config)
    forward, ids = flat_forward(model), torch.tensor([[1, 2]])
    with torch.inference_mode():
        before = forward(ids, model.new_cache(1, 2))
        model.transformer.h[0].mlp.c_fc.weight.mul_(2)
        changed = forward(ids, model.new_cache(1, 2))
        assert not torch.equal(before, changed)
        assert torch.equal(changed, model(ids))
        model.load_state_dict(other.state_dict(), assign=True)
        assert torch.equal(forward(ids, model.new_cache(1, 2)), other(ids))


def test_layers_may_be_left_out_and_change_places(model):
    blocks = model.transformer.h
    blocks[0], blocks[1] = blocks[1], blocks[0]
    assert_same(model)
    del blocks[0]
    assert_same(model)


# --------------------------------------------------------------------------- what is not flat


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


def compile_the_model(model: GPT) -> None:
    model.compile(backend="eager")


def compile_a_block(model: GPT) -> None:
    model.transformer.h[1].compile(backend="eager")


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
        *(replace_forward, adapt_a_layer, compile_the_model, compile_a_block),
        *(put_an_adapter_behind_attention, normalise_the_embeddings, leave_a_norm_out),
        *(replace_an_mlp, add_a_module),
    ],
)
def test_a_model_that_was_changed_is_called_itself(model, change):
    change(model)
    assert not is_flat(model)


def test_what_is_no_block_is_not_plain(model):
    replace_a_block(model)
    assert not is_plain(model)


def test_a_model_of_another_class_is_called_itself(model):
    class Other(GPT):
        pass

    other = Other(model.config).eval()
    assert not is_flat(other)


def test_something_that_looks_like_a_model_is_called_itself(model):
    class Wrapped:
        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def __call__(self, ids: Tensor, cache: KVCache) -> str:
            return "wrapped"

    assert flat_forward(Wrapped())(torch.tensor([[1]]), model.new_cache(1, 1)) == "wrapped"


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
        assert not is_flat(model)
        hook.remove()
        assert is_flat(model)


def test_another_forward_of_a_class_is_called(model, monkeypatch):
    monkeypatch.setattr(MLP, "forward", lambda self, x: x)
    assert not is_plain(model)
    assert not is_flat(model)


@needs_packed
def test_a_packed_model_is_as_plain_as_it_was(model):
    assert is_plain(model)
    pack(model)
    assert is_plain(model)
    other = tiny_model().train()
    pack(other)
    assert not is_plain(other)
    assert is_plain(other.eval())


@pytest.mark.parametrize("attend", [reference_attention, sdpa_attention])
def test_every_attention_of_our_own_is_plain(model, attend):
    model.transformer.h[1].attn.attend = attend
    assert is_plain(model)


# ------------------------------------------------------------------------------------- who uses it


def drafted(model: GPT, prompts: list[list[int]], count: int) -> list[list[int]]:
    return generate(model, prompts, count, draft=PromptLookup())


def drafted_by_a_model(model: GPT, prompts: list[list[int]], count: int) -> list[list[int]]:
    return generate(model, prompts, count, draft=DraftModel(copy.deepcopy(model)))


@pytest.mark.parametrize("loop", [generate, drafted, drafted_by_a_model])
def test_a_loops_steps_are_flat_and_those_of_a_hooked_model_are_not(model, loop):
    prompts = random_prompts(model.config, [5, 9])
    with counted_calls() as calls:
        tokens = loop(model, prompts, 12)
    assert sum(call is model for call in calls) == 1  # the prefill
    block, seen = model.transformer.h[1], []  # a copy of the model has the hook too
    block.register_forward_hook(lambda module, *_: seen.append(module is block))
    with counted_calls() as calls:
        assert loop(model, prompts, 12) == tokens
    assert sum(seen) == sum(call is model for call in calls) > 2


def test_a_draft_models_guesses_are_flat():
    draft = DraftModel(tiny_model()).start(1)
    with counted_calls() as calls:
        assert len(draft.propose([0], [[1, 2, 3]], 5)[0]) == 5
    assert len(calls) == 1
