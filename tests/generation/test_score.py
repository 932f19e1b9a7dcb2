"""Scores of given text: transformers' log-probabilities, on the same windows."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from mqa_gpt import LLM, PromptError, Tokenizer
from mqa_gpt.generation import score as module
from mqa_gpt.generation.score import score_ids, windows
from mqa_gpt.research import patch, record, zero
from tests.helpers import (
    SPECIALS,
    byte_tokenizer,
    our_model,
    random_prompts,
    reference_model,
    shapes_fed,
    tiny_config,
    tiny_model,
)

TOKENIZER = byte_tokenizer(*SPECIALS)
CONFIG = tiny_config(vocab_size=TOKENIZER.get_vocab_size() + 3, n_positions=40)


@pytest.fixture(scope="module")
def reference():
    return reference_model(CONFIG)


@pytest.fixture(scope="module")
def llm(reference) -> LLM:
    return LLM(our_model(reference, CONFIG), Tokenizer(TOKENIZER))


@torch.no_grad()
def reference_scores(reference, ids: list[int], first: int, window: int, stride: int):
    """transformers over the same windows, each in one forward pass."""
    found: list[tuple[float, bool]] = []
    for begin, start, end in windows(first, len(ids), window, stride):
        text = torch.tensor([ids[begin:end]])
        logits = reference(text[:, :-1]).logits[0, start - begin - 1 :]
        targets = text[0, start - begin :]
        own = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        found += zip(own.tolist(), (logits.argmax(-1) == targets).tolist(), strict=True)
    return found


@pytest.mark.parametrize(("window", "stride"), [(None, None), (24, 7), (40, 40), (1, 1), (5, 4)])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_they_are_those_of_transformers(reference, llm, window, stride, batch_size, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_LOGITS", 1)
    monkeypatch.setattr(module, "MIN_CHUNK", 6)
    texts = random_prompts(CONFIG, [90, 3, 41, 17, 2])
    cuts = [1, 2, 30, 9, 1]
    pairs = [(text[:cut], text[cut:]) for text, cut in zip(texts, cuts, strict=True)]
    found = score_ids(llm.model, pairs, window=window, stride=stride, batch_size=batch_size)
    for ours, text, cut in zip(found, texts, cuts, strict=True):
        size = window or CONFIG.n_positions
        theirs = reference_scores(reference, text, cut, size, stride or size // 2)
        assert [flag for _, flag in ours] == [flag for _, flag in theirs]
        assert [x for x, _ in ours] == pytest.approx([x for x, _ in theirs], abs=1e-4)


@given(st.integers(1, 60), st.integers(0, 150), st.integers(1, 50), st.data())
def test_windows_score_each_token_once_with_its_context(first, count, window, data):
    stride = data.draw(st.integers(1, window))
    length = first + count
    found = windows(first, length, window, stride)
    scored = [i for part in found for i in range(part.first, part.end)]
    assert scored == list(range(first, length))
    for begin, start, end in found:
        assert 0 <= begin < start
        assert end - 1 - begin <= window
        assert start - begin >= min(start, max(window - stride, 1))
    if found:  # the last window is full, or reads the text from its beginning
        assert found[-1].begin == 0 or found[-1].end - 1 - found[-1].begin == window


def test_a_text_is_scored_after_end_of_text(reference, llm) -> None:
    score = llm.score("a b, é!")
    ids = llm.tokenizer.encode("a b, é!")
    assert score.token_ids == ids
    full = torch.tensor([[llm.tokenizer.end_of_text_id, *ids]])
    with torch.no_grad():
        loss = F.cross_entropy(reference(full[:, :-1]).logits[0], full[0, 1:])
    assert score.loss == pytest.approx(loss.item(), abs=1e-5)
    assert score.perplexity == pytest.approx(math.exp(loss.item()), rel=1e-4)
    assert score.bytes == 8
    assert score.bits_per_byte == pytest.approx(loss.item() * len(ids) / math.log(2) / 8, rel=1e-4)


def test_a_pair_is_scored_as_generation_would_choose_it(llm) -> None:
    completion = llm.generate("ab", 5, logprobs=0, ignore_eos=True)
    scores = score_ids(llm.model, [(llm.tokenizer.encode("ab"), completion.token_ids)])[0]
    assert all(is_greedy for _, is_greedy in scores)
    assert [x for x, _ in scores] == pytest.approx(completion.logprobs, abs=1e-4)
    pair = llm.score([("ab", "cd"), ("", "cd"), "cd"])
    assert pair[1] == pair[2]
    assert pair[0].token_ids == pair[1].token_ids
    assert pair[0].logprob != pytest.approx(pair[1].logprob, abs=1e-3)


def test_without_an_end_of_text_token_the_first_token_has_no_score() -> None:
    bare = byte_tokenizer()
    config = tiny_config(vocab_size=bare.get_vocab_size(), bos_token_id=None, eos_token_id=None)
    model = our_model(reference_model(config), config)
    score = LLM(model, Tokenizer(bare)).score("abc")
    assert score.logprobs[0] is None
    assert score.logprobs[1:] == [
        x for x, _ in score_ids(model, [(score.token_ids[:1], score.token_ids[1:])])[0]
    ]
    assert LLM(model, Tokenizer(bare)).score("a").logprobs == [None]


def test_control_tokens_in_a_text_count_as_such_or_not(llm) -> None:
    assert len(llm.score("<fim_prefix>").token_ids) == 1
    assert len(llm.score("<fim_prefix>", special_tokens=False).token_ids) == 12


def test_logits_are_computed_in_chunks_and_not_for_a_context(llm, monkeypatch) -> None:
    monkeypatch.setattr(module, "CHUNK_LOGITS", 1)
    monkeypatch.setattr(module, "MIN_CHUNK", 8)
    (text,) = random_prompts(CONFIG, [31])
    with shapes_fed(llm.model.lm_head) as shapes:
        score_ids(llm.model, [(text[:20], text[20:])])
    assert [shape[:2] for shape in shapes] == [(0, CONFIG.n_embd)] * 2 + [(1, 8), (1, 6)]


def test_it_can_be_recorded_and_patched(llm) -> None:
    plain = llm.score(["abcdef", "xy"])
    with record(llm.model, "transformer.h.1") as acts:
        assert llm.score(["abcdef", "xy"]) == plain
    assert [len(row) for row in acts["transformer.h.1"]] == [6, 2]
    with patch(llm.model, {"transformer.h.0.mlp": zero(rows=0)}):
        patched = llm.score(["abcdef", "xy"])
    assert patched[0] != plain[0]
    assert patched[1].logprobs == pytest.approx(plain[1].logprobs, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 41}, "window is 41"),
        ({"window": 10, "stride": 11}, "stride is 11"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_unusable_options_are_errors(llm, options, message) -> None:
    with pytest.raises(PromptError, match=message):
        llm.score("abc", **options)


@pytest.mark.parametrize("text", ["", ("a", ""), 3, ("a", "b", "c"), ["a", None]])
def test_unusable_texts_are_errors(llm, text) -> None:
    with pytest.raises(PromptError, match=r"text \d is"):
        llm.score(text)


def test_unusable_ids_are_errors() -> None:
    model = tiny_model()
    with pytest.raises(PromptError, match="a context is empty"):
        score_ids(model, [([], [1])])
    with pytest.raises(PromptError, match="holds token 97"):
        score_ids(model, [([1], [97])])
