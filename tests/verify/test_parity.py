"""The matrix: random tiny checkpoints of every kind, against transformers itself."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import GPTBigCodeForCausalLM

from mqa_gpt import GPT, GPTConfig, KVCache, generate
from mqa_gpt.config import ACTIVATIONS
from mqa_gpt.generation import batching
from mqa_gpt.generation.batching import Token
from mqa_gpt.generation.speculative import PromptLookup
from tests.helpers import (
    engine_tokens,
    error,
    left_padded,
    our_greedy,
    our_model,
    random_prompts,
    reference_greedy,
    reference_model,
    relative_error,
    tiny_config,
)

pytestmark = pytest.mark.slow

BACKENDS = ("reference", "sdpa")
HEAD_DIMS = (16, 17, 21, 24, 32, 45, 48, 64, 72, 80, 96, 111, 128)
NEW_TOKENS = 64
LENGTHS = (11, 9, 14)
TOLERANCE = 2e-5  # float32, of the largest logit
ATTEMPTS = 20  # at finding prompts without near ties


def matrix() -> list[GPTConfig]:
    """The checkpoints: what is listed cycles at different periods, other sizes are drawn."""
    rng = random.Random(0)
    configs = []
    for i in range(65):
        head_dim = HEAD_DIMS[i % 13]
        n_head = 1 if i == 8 else rng.randint(2, max(2, min(7, 200 // head_dim)))
        n_embd = n_head * head_dim
        scaled = i % 7 not in (2, 5)
        configs.append(
            tiny_config(
                vocab_size=rng.randint(40, 260),
                n_positions=max(LENGTHS) + NEW_TOKENS + rng.randint(0, 9),
                n_embd=n_embd,
                n_layer=rng.choice((1, 2, 2, 3)),
                n_head=n_head,
                n_inner=None if i % 6 == 0 else rng.randint(20, 3 * n_embd),
                activation_function=list(ACTIVATIONS)[i % 5],
                layer_norm_epsilon=(1e-5, 1e-6, 1e-2)[i % 3],
                # Unscaled scores are D^0.5 times larger: these weights make them no larger.
                initializer_range=2.5 * n_embd**-0.5 * (1 if scaled else head_dim**-0.25),
                scale_attn_weights=scaled,
                multi_query=i % 3 != 1,
                tie_word_embeddings=i % 4 < 2,
            )
        )
    return configs


def label(config: GPTConfig) -> str:
    parts = [
        "mqa" if config.multi_query else "mha",
        config.activation_function,
        f"H{config.n_head}xD{config.head_dim}",
        f"L{config.n_layer}",
        f"F{config.inner_size}",
        f"V{config.vocab_size}",
        "tied" if config.tie_word_embeddings else "untied",
        "scaled" if config.scale_attn_weights else "unscaled",
    ]
    return "-".join(parts)


class Checkpoint(NamedTuple):
    config: GPTConfig
    reference: GPTBigCodeForCausalLM
    seed: int


@pytest.fixture(scope="module", params=list(enumerate(matrix())), ids=lambda p: label(p[1]))
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    seed, config = request.param
    return Checkpoint(config, reference_model(config, seed), seed)


def test_the_matrix_has_at_least_60_distinct_checkpoints_and_every_kind() -> None:
    configs = matrix()
    assert len({config.to_json() for config in configs}) >= 60
    switches = {(c.multi_query, c.tie_word_embeddings, c.scale_attn_weights) for c in configs}
    assert switches == set(itertools.product((True, False), repeat=3))
    kinds = {(c.multi_query, c.activation_function) for c in configs}
    assert kinds == set(itertools.product((True, False), ACTIVATIONS))
    assert {c.head_dim for c in configs} == set(HEAD_DIMS)
    mlps = {(c.n_inner is None, c.activation_function) for c in configs}
    assert mlps == set(itertools.product((True, False), ACTIVATIONS))
    assert {c.layer_norm_epsilon for c in configs} == {1e-5, 1e-6, 1e-2}
    assert any(c.n_head == 1 for c in configs)


@torch.no_grad()
def reference_rows(reference: GPTBigCodeForCausalLM, prompts: list[list[int]]) -> Tensor:
    """The logits of every real token, (sum of lengths, V), from one left-padded batch."""
    batch = left_padded(prompts)
    return reference(**batch).logits[batch["attention_mask"].bool()]


@torch.no_grad()
def our_rows(model: GPT, prompts: list[list[int]]) -> Iterator[tuple[str, Tensor]]:
    """The same from our model in the ways there are to feed it tokens, each with its name."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    longest = int(lengths.max())
    ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
    real = torch.arange(longest) < lengths[:, None]  # (B, T)
    yield "uncached", model(ids)[real]

    # Rows of one length: a token, two chunks, then the rest one by one.
    cache = KVCache(model.config, len(prompts), longest, dtype=model.dtype)
    chunks = ids.split([1, 5, 3, *[1] * (longest - 9)], dim=1)
    yield "cached", torch.cat([model(chunk, cache=cache) for chunk in chunks], 1)[real]

    # Rows of different lengths: a right-padded prefill, then a chunk, then single tokens.
    cache = KVCache(model.config, len(prompts), longest, dtype=model.dtype)
    first = lengths - 6
    logits = torch.zeros(*ids.shape, model.config.vocab_size, dtype=model.dtype)
    logits[:, : first.max()] = model(ids[:, : first.max()], cache=cache)
    cache.set_lengths(first.tolist())
    for T in (3, 1, 2):
        slots = cache.lengths[:, None] + torch.arange(T)  # (B, T)
        logits[torch.arange(len(ids))[:, None], slots] = model(ids.gather(1, slots), cache=cache)
    yield "ragged", logits[real]


def test_float32_logits_are_those_of_transformers(checkpoint: Checkpoint) -> None:
    config, reference, seed = checkpoint
    prompts = random_prompts(config, LENGTHS, seed)
    expected = reference_rows(reference, prompts)
    if not config.scale_attn_weights:
        exact = reference_rows(float64_twin(reference), prompts)
        limit = 2 * error(expected, exact)
    for backend in BACKENDS:
        for way, logits in our_rows(our_model(reference, config, backend), prompts):
            if config.scale_attn_weights:
                assert relative_error(logits, expected) <= TOLERANCE, (backend, way)
            else:
                assert error(logits, exact) <= limit, (backend, way)


def test_float32_greedy_tokens_of_a_ragged_batch_are_those_of_transformers(
    checkpoint: Checkpoint,
) -> None:
    config, reference, seed = checkpoint
    for attempt in range(ATTEMPTS):
        prompts = random_prompts(config, LENGTHS, seed + 1000 * attempt)
        expected_ids, expected = reference_greedy(reference, prompts, NEW_TOKENS)
        first, second = expected.topk(2).values.unbind(-1)
        # Where two logits are closer than twice the tolerance, rounding may swap them.
        if (first - second).min() > 2 * TOLERANCE * expected.abs().max():
            break
    else:
        pytest.fail(f"{ATTEMPTS} random batches all have a near tie that rounding may decide")
    backends = (*BACKENDS, "auto")
    for backend in backends:
        model = our_model(reference, config, backend)
        ids, logits = our_greedy(model, prompts, NEW_TOKENS)
        assert ids.tolist() == expected_ids.tolist()
        assert relative_error(logits, expected) <= TOLERANCE
        # The ways of the engine take most of the time. Each backend meets every kind in turn.
        if backend == backends[seed // 3 % 3]:
            for way, rows in loops(model, prompts).items():
                assert rows == expected_ids.tolist(), way


def loops(model: GPT, prompts: list[list[int]]) -> dict[str, list[list[int]]]:
    """The new tokens in each way that the engine has, besides the plain loop of `our_greedy`."""

    def rows_of(tokens: Iterator[Token]) -> list[list[int]]:
        rows: list[list[int]] = [[] for _ in prompts]
        for token in tokens:
            rows[token.row].append(token.id)
        return rows

    found = {
        "without modules": generate(model, prompts, NEW_TOKENS),
        "with a draft": generate(model, prompts, NEW_TOKENS, draft=PromptLookup()),
        "in two slots": rows_of(engine_tokens(model, prompts, NEW_TOKENS, slots=2)),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "can_replay", lambda model: True)
        found["by steps that can be recorded"] = generate(model, prompts, NEW_TOKENS)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_low_precision_is_as_close_to_float32_as_transformers_is(
    checkpoint: Checkpoint, dtype: torch.dtype
) -> None:
    # The rule is that the largest error is at most twice transformers' own. By itself it says more
    # about luck than about the computation: at a few tokens rounding decides between two nearly
    # equal keys. Over 325 checkpoints like these, ours was 0.3 to 1.9 times transformers' (median
    # 1.0 for "reference", which rounds where eager attention does, 0.9 for "sdpa", which rounds
    # less often), and transformers' own two backends were as far apart. So the average of the
    # tokens' errors, 0.8 to 1.14 times theirs, is held to 1.25: that notices a layer norm, a
    # residual stream or logits in lower precision, which the largest error mostly did not.
    prompts = random_prompts(checkpoint.config, LENGTHS * 4, checkpoint.seed)
    reference16 = copy.deepcopy(checkpoint.reference).to(dtype)
    expected = reference_rows(copy.deepcopy(reference16).float(), prompts)
    theirs = reference_rows(reference16, prompts)
    limit, mean_limit = 2 * error(theirs, expected), 1.25 * mean_error(theirs, expected)
    models = {name: our_model(reference16, checkpoint.config, name) for name in BACKENDS}
    for name, model in models.items():
        for way, logits in our_rows(model, prompts):
            assert logits.dtype == dtype
            assert error(logits, expected) <= limit, (name, way)
            assert mean_error(logits, expected) <= mean_limit, (name, way)


def mean_error(ours: Tensor, reference: Tensor) -> float:
    """Each token's largest error over the vocabulary, averaged over the tokens; float64."""
    return (ours.double() - reference.double()).abs().amax(-1).mean().item()


def float64_twin(reference: GPTBigCodeForCausalLM) -> GPTBigCodeForCausalLM:
    """The same weights computed in float64; not by eager attention, whose softmax is float32."""
    twin = copy.deepcopy(reference).double()
    twin.set_attn_implementation("sdpa")
    return twin
