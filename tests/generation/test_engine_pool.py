"""Engines that are used again: the same graphs, and only where they compute the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mqa_gpt import GPT, KVCache, PromptError, PromptLookup
from mqa_gpt.fast.int8_cache import Int8KVCache
from mqa_gpt.generation import batching, replay
from mqa_gpt.generation.batching import Engine, EnginePool, Token
from mqa_gpt.generation.request import Request, make_requests
from mqa_gpt.sampling import SamplingParams
from tests.helpers import by_row, engine_tokens, random_prompts, tiny_config, tiny_model

CONFIG = tiny_config()
PROMPTS = random_prompts(CONFIG, [17, 3, 40, 1], seed=1)


def run(engine: Engine, requests: list[Request]) -> Iterator[Token]:
    (first, *_), *_ = [engine.add(request) for request in requests]
    while engine.is_busy:
        for token in engine.step():
            yield token._replace(row=token.row - first)


def test_a_kept_engine_replays_its_graphs_in_further_generations(
    graphs: list[Any], replayed: None
) -> None:
    model, engines, rows = tiny_model(), EnginePool(), []
    for seed in range(3):
        sampling = SamplingParams(temperature=1.0, seed=seed)
        requests = make_requests(CONFIG, PROMPTS, 12, sampling)
        engine = engines.take(model, requests)
        rows.append(by_row(run(engine, requests)))
        engines.give_back(engine)
    assert len(graphs) == 1  # whatever the seed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "can_replay", lambda model: False)
        for seed, found in enumerate(rows):
            sampling = SamplingParams(temperature=1.0, seed=seed)
            assert by_row(engine_tokens(model, PROMPTS, 12, sampling)) == found


@pytest.fixture
def model() -> GPT:
    return tiny_model()


def test_an_engine_is_not_used_again_where_it_would_compute_something_else(
    model: GPT, replayed: None
) -> None:
    requests = make_requests(CONFIG, PROMPTS[:2], 4)
    engine = EnginePool().take(model, requests)

    def is_reused(requests: list[Request] = requests) -> bool:
        engines = EnginePool()
        engines.give_back(engine)
        return engines.take(model, requests) is engine

    attn, ln = model.transformer.h[0].attn, model.transformer.ln_f
    mlp, weight = model.transformer.h[1].mlp, model.lm_head.weight
    for change, back in (
        (lambda: model.set_backend("reference"), lambda: model.set_backend("auto")),
        (lambda: setattr(attn, "scale", 0.1), lambda: setattr(attn, "scale", 20**-0.5)),
        (lambda: setattr(ln, "eps", 0.1), lambda: setattr(ln, "eps", 1e-5)),
        (
            lambda: setattr(mlp, "activation", "relu"),
            lambda: setattr(mlp, "activation", "gelu_pytorch_tanh"),
        ),
        (
            lambda: setattr(model, "cache_class", Int8KVCache),
            lambda: setattr(model, "cache_class", KVCache),
        ),
        (
            lambda: setattr(model.lm_head, "weight", torch.nn.Parameter(weight.clone())),
            lambda: setattr(model.lm_head, "weight", weight),
        ),
    ):
        assert is_reused()
        change()
        assert not is_reused()
        back()
    hook = mlp.register_forward_hook(lambda *call: None)
    assert not is_reused()
    hook.remove()
    assert is_reused(make_requests(CONFIG, PROMPTS[:1], 9))  # fewer rows, and about as long
    assert not is_reused(make_requests(CONFIG, PROMPTS[:3], 4))
    assert not is_reused(make_requests(CONFIG, PROMPTS[:2], 4, drafter=PromptLookup()))


def test_a_kept_engine_needs_no_more_room_and_one_that_does_not_fit_gives_its_own_up(
    model: GPT, replayed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines, requests = EnginePool(), make_requests(CONFIG, PROMPTS[:2], 4)
    engines.give_back(engines.take(model, requests))
    monkeypatch.setattr(batching, "available_memory", lambda device: 0)
    engines.give_back(engines.take(model, requests))
    with pytest.raises(PromptError, match=r"3 completions of .* tokens need"):
        engines.take(model, make_requests(CONFIG, PROMPTS[:3], 4))
    with pytest.raises(PromptError, match=r"2 completions of .* tokens need"):
        engines.take(model, requests)  # it was given up


def test_an_engine_is_never_larger_than_asked_for(model: GPT, replayed: None) -> None:
    requests = make_requests(CONFIG, PROMPTS * 10, 4)
    assert EnginePool().take(model, requests, slots=20).slots == 20
    assert EnginePool().take(model, requests).slots == 40


def test_an_engine_that_only_calls_the_model_is_not_kept(model: GPT) -> None:
    engines, requests = EnginePool(), make_requests(CONFIG, PROMPTS[:2], 4)
    engine = engines.take(model, requests)
    engines.give_back(engine)
    assert engines.take(model, requests) is not engine
    assert not replay.can_replay(model)
