"""Sampling filters against transformers' on the same logits, and draws against probabilities."""

import math

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mqa_gpt.errors import PromptError
from mqa_gpt.sampling import (
    SamplingParams,
    choose,
    draw,
    filter_logits,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    likeliest,
    log_probabilities,
    penalize_repetition,
    uniforms,
)


def random_logits(seed: int, rows: int = 5, vocabulary: int = 101) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocabulary, generator=generator) * 4


def tokens_in(logits: torch.Tensor, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, logits.shape[1], (len(logits), count), generator=generator)


def seen_mask(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(logits, dtype=torch.bool).scatter(1, tokens, True)


@pytest.mark.parametrize("k", [1, 2, 50, 101, 1000])
def test_top_k_agrees_with_transformers(k):
    logits = random_logits(k)
    torch.testing.assert_close(keep_top_k(logits, k), TopKLogitsWarper(k)(None, logits))


def test_top_k_keeps_ties_as_transformers_does():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 2.0]])
    kept = keep_top_k(logits, 2)
    assert kept.isfinite().tolist() == [[False, True, True, True, False]]
    torch.testing.assert_close(kept, TopKLogitsWarper(2)(None, logits))


@pytest.mark.parametrize("p", [1e-9, 1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_agrees_with_transformers(p):
    logits = random_logits(3)
    torch.testing.assert_close(keep_top_p(logits, p), TopPLogitsWarper(p)(None, logits))


@pytest.mark.parametrize("p", [0.0, 0.01, 0.3, 1.0])
def test_min_p_agrees_with_transformers(p):
    logits = random_logits(4)
    torch.testing.assert_close(keep_min_p(logits, p), MinPLogitsWarper(p)(None, logits))


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_the_repetition_penalty_agrees_with_transformers(penalty):
    logits = random_logits(5)
    tokens = tokens_in(logits, 30)
    torch.testing.assert_close(
        penalize_repetition(logits, seen_mask(logits, tokens), penalty),
        RepetitionPenaltyLogitsProcessor(penalty)(tokens, logits.clone()),
    )


@pytest.mark.parametrize("seed", range(10))
def test_all_filters_together_agree_with_transformers_in_its_order(seed):
    logits = random_logits(seed) + 3
    tokens = tokens_in(logits, 20)
    theirs = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.7),
            TemperatureLogitsWarper(1.4),
            TopKLogitsWarper(40),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.02),
        ]
    )(tokens, logits.clone())
    sampling = SamplingParams(
        temperature=1.4, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.7
    )
    torch.testing.assert_close(filter_logits(logits, sampling, seen_mask(logits, tokens)), theirs)


def test_greedy_changes_no_logits():
    logits = random_logits(1)
    assert torch.equal(filter_logits(logits, SamplingParams()), logits)


def test_filters_leave_their_input_unchanged():
    logits = random_logits(2)
    before = logits.clone()
    seen = seen_mask(logits, tokens_in(logits, 9))
    filter_logits(logits, SamplingParams(1.0, 5, 0.5, 0.1, 2.0), seen)
    assert torch.equal(logits, before)


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[0.0, math.log(2), math.log(4), float("-inf"), math.log(3)]])
    count = 20_000
    u = torch.tensor(uniforms(7, 0, count), dtype=torch.float64)
    drawn = draw(logits.expand(count, -1), u).bincount(minlength=5) / count
    # Six standard deviations of a frequency over 20,000 draws are at most 0.0212.
    expected = torch.tensor([0.1, 0.2, 0.4, 0.0, 0.3])
    assert (drawn - expected).abs().max() < 0.0212
    assert drawn[3] == 0


def test_the_smallest_and_the_largest_uniform_draw_the_first_and_the_last_possible_token():
    logits = torch.tensor([[float("-inf"), 0.0, 1.0, float("-inf")]])
    assert draw(logits, torch.tensor([0.0], dtype=torch.float64)).item() == 1
    assert draw(logits, torch.tensor([1 - 2**-53], dtype=torch.float64)).item() == 2


def test_a_token_of_probability_one_in_a_million_is_drawn_at_its_rate_in_a_large_vocabulary():
    logits = torch.zeros(1, 50_000)
    u = (torch.arange(50_000, dtype=torch.float64) + 0.5) / 50_000
    assert torch.equal(draw(logits.expand(50_000, -1)[:64], u[:64]), torch.arange(64))
    assert draw(logits, u[-1:]).item() == 49_999


def test_choosing_takes_the_likeliest_or_draws_and_notices_what_is_not_finite():
    logits = random_logits(0, rows=4)
    chosen, is_finite = choose(logits, SamplingParams())
    assert chosen.tolist() == logits.argmax(-1).tolist()
    assert is_finite.all()
    sampling, u = SamplingParams(0.9, top_k=5), torch.rand(4, dtype=torch.float64)
    drawn = draw(filter_logits(logits, sampling), u)
    assert choose(logits, sampling, None, u)[0].tolist() == drawn.tolist()
    logits[1, 7], logits[3, 0] = float("nan"), float("inf")
    assert choose(logits, sampling, None, u)[1].tolist() == [True, False, True, False]


def test_of_equal_logits_the_first_is_taken_and_nan_counts_as_highest():
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, math.nan, math.inf], [-math.inf] * 3])
    highest, ids = likeliest(logits)
    assert ids.tolist() == logits.max(-1).indices.tolist() == [1, 1, 0]
    assert highest.isnan().tolist() == [False, True, False]


def test_log_probabilities_are_those_of_the_chosen_and_of_the_likeliest():
    logits, chosen = random_logits(0, rows=3), torch.tensor([5, 0, 100])
    own, ids, values = log_probabilities(logits, chosen, 4)
    expected = logits.double().softmax(-1).log().float()
    torch.testing.assert_close(own, expected[range(3), chosen])
    assert ids.tolist() == logits.argsort(-1, descending=True)[:, :4].tolist()
    torch.testing.assert_close(values, expected.gather(1, ids))


def test_streams_of_uniforms_differ_by_seed_and_by_sample_and_repeat():
    streams = {
        (seed, sample): tuple(uniforms(seed, sample, 4)) for seed in (0, 1, 11) for sample in (0, 1)
    }
    assert len(set(streams.values())) == len(streams)
    assert uniforms(1, 1, 8)[:4] == uniforms(1, 1, 4)
    assert all(0 <= u < 1 for stream in streams.values() for u in stream)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": 1e-30}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p"),
        ({"temperature": 1.0, "top_p": 1.01}, "top_p"),
        ({"temperature": 1.0, "top_p": float("nan")}, "top_p"),
        ({"temperature": 1.0, "top_k": -2}, "top_k"),
        ({"temperature": 2**64}, "temperature"),
        ({"temperature": 1.0, "top_k": 2.5}, "top_k"),
        ({"temperature": 1.0, "top_k": True}, "top_k"),
        ({"temperature": 1.0, "min_p": -0.1}, "min_p"),
        ({"temperature": 1.0, "min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": 1e-60}, "repetition_penalty"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"seed": 1.5}, "seed"),
    ],
)
def test_an_unusable_option_is_named(options, word):
    with pytest.raises(PromptError, match=word):
        SamplingParams(**options)


def test_values_that_change_nothing_elsewhere_change_nothing_here() -> None:
    logits = torch.randn(3, 50)
    plain = SamplingParams(temperature=1.2)
    for options in ({"top_k": 0}, {"top_k": -1}, {"top_p": 1}, {"top_p": 1.0, "min_p": 0}):
        same = SamplingParams(temperature=1.2, **options)
        assert torch.equal(filter_logits(logits, same), filter_logits(logits, plain))
    greedy = SamplingParams(top_k=2, top_p=0.5, min_p=0.2)
    assert greedy.greedy
    assert torch.equal(filter_logits(logits, greedy), logits)


def test_rare_tokens_are_drawn_exactly_since_sums_are_in_double_precision() -> None:
    V = 49152
    tokens = torch.arange(0, V, 97)
    u = (tokens.double() + 0.001) / V  # just inside each token's share, by less than float32 sees
    assert draw(torch.zeros(len(u), V), u).tolist() == tokens.tolist()
