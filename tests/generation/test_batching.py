"""The engine: the tokens of solo runs, however rows share slots and whatever was there before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mqa_gpt import GPT, KVCache, PromptError, PromptLookup
from mqa_gpt.generation import batching
from mqa_gpt.generation.batching import Engine, Token
from mqa_gpt.generation.request import Request, RequestOptions, make_requests
from mqa_gpt.generation.steps import ModelStepper
from mqa_gpt.sampling import GREEDY, SamplingParams
from tests.helpers import by_row, engine_tokens, random_prompts, shapes_fed, tiny_config, tiny_model

CONFIG = tiny_config()
PROMPTS = random_prompts(CONFIG, [17, 3, 40, 1, 9, 9, 28, 2, 5, 33, 1], seed=1)
NEW_TOKENS = 20
ENDS = range(0, CONFIG.vocab_size, 9)  # rows end at different times, some never
STEPPERS = pytest.mark.parametrize("stepper", ["called", "replayed"], indirect=True)


@pytest.fixture(scope="module")
def model() -> GPT:
    return tiny_model()


@pytest.fixture
def stepper(request: pytest.FixtureRequest) -> Any:
    """How the engine runs steps; "replayed" yields the graphs that it records."""
    return request.getfixturevalue("graphs") if request.param == "replayed" else []


def solo_runs(
    model: GPT, sampling: SamplingParams, n: int = 1, **options: Any
) -> dict[int, list[tuple[int, str | None]]]:
    rows = {}
    for i, prompt in enumerate(PROMPTS):
        alone = engine_tokens(model, [prompt], NEW_TOKENS, sampling, n=n, end_ids=ENDS, **options)
        rows |= {i * n + row: tokens for row, tokens in by_row(alone).items()}
    return rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "n"),
    [
        ({}, 1),
        ({"repetition_penalty": 1.3}, 1),
        ({"temperature": 1.1, "seed": 3}, 3),
        ({"temperature": 1.3, "seed": 4, "top_k": 40, "repetition_penalty": 1.2}, 2),
    ],
    ids=["greedy", "penalty", "sampled", "sampled-penalty"],
)
@STEPPERS
def test_every_row_has_the_tokens_and_the_end_of_its_solo_run(
    model: GPT, stepper: Any, options: dict[str, Any], n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = SamplingParams(**options)
    with monkeypatch.context() as patch:
        patch.setattr(batching, "can_replay", lambda model: False)
        expected = solo_runs(model, sampling, n)
    assert len({len(row) for row in expected.values()}) > 3
    for slots in (1, 2, 5, 100):
        tokens = engine_tokens(model, PROMPTS, NEW_TOKENS, sampling, n=n, end_ids=ENDS, slots=slots)
        assert by_row(tokens) == expected


def mixed_requests() -> list[Request]:
    """Requests that differ in everything a row can have of its own."""
    options: list[dict[str, Any]] = [
        {"max_new_tokens": 9},
        {"sampling": SamplingParams(temperature=1.1, seed=3), "n": 3},
        {"sampling": SamplingParams(repetition_penalty=1.5), "max_new_tokens": 3},
        {"logprobs": 2, "min_new_tokens": 7, "end_ids": range(0, 97, 2)},
        {"sampling": SamplingParams(0.9, 30, 0.9, 0.01, 1.2, seed=5), "logprobs": 0},
        {"end_ids": ENDS, "min_new_tokens": 12},
        {"max_new_tokens": 0},
        {"sampling": SamplingParams(temperature=1.0, seed=2), "logprobs": 2, "end_ids": ENDS},
    ]
    requests = []
    for i, (prompt, own) in enumerate(zip(PROMPTS, options, strict=False)):
        asked: dict[str, Any] = {"max_new_tokens": 20} | own
        requests.append(RequestOptions(CONFIG, **asked).request(prompt, f"prompt {i}"))
    return requests


@pytest.mark.slow
@pytest.mark.parametrize("slots", [2, 4, 16])
@STEPPERS
def test_each_row_has_parameters_of_its_own(
    model: GPT, stepper: Any, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = mixed_requests()
    engine = Engine(model, slots, 70)
    numbers = [engine.add(request) for request in requests]
    found: dict[int, list[Token]] = {}
    while engine.is_busy:
        for token in engine.step():
            found.setdefault(token.row, []).append(token)
    assert [len(rows) for rows in numbers] == [request.n for request in requests]
    monkeypatch.setattr(batching, "can_replay", lambda model: False)
    for request, rows in zip(requests, numbers, strict=True):
        alone = Engine.for_requests(model, [request])
        alone.add(request)
        expected: dict[int, list[Token]] = {}
        while alone.is_busy:
            for token in alone.step():
                expected.setdefault(token.row, []).append(token)
        for sample, row in enumerate(rows):
            same_tokens(found.get(row, []), expected.get(sample, []))


def same_tokens(found: list[Token], expected: list[Token]) -> None:
    assert [(t.id, t.finished) for t in found] == [(t.id, t.finished) for t in expected]
    for token, other in zip(found, expected, strict=True):
        assert token.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [id_ for id_, _ in token.top] == [id_ for id_, _ in other.top]
        assert [v for _, v in token.top] == pytest.approx([v for _, v in other.top], abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}], ids=["greedy", "penalty"])
@STEPPERS
def test_requests_may_be_added_and_cancelled_while_others_run(
    model: GPT, stepper: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = SamplingParams(**options)
    requests = make_requests(CONFIG, PROMPTS, NEW_TOKENS, sampling, logprobs=1)
    with monkeypatch.context() as patch:
        patch.setattr(batching, "can_replay", lambda model: False)
        expected = by_row(engine_tokens(model, PROMPTS, NEW_TOKENS, sampling))
    engine, found = Engine(model, 3, 60), []
    for i, request in enumerate(requests):
        engine.add(request)
        found += engine.step()
        if i == 4:
            engine.cancel(1)  # it runs
            engine.cancel(3)  # it waits
            engine.cancel(3)
    while engine.is_busy:
        found += engine.step()
    rows = by_row(found)
    assert 0 < len(rows[1]) < NEW_TOKENS
    assert rows[1] == expected[1][: len(rows[1])]
    assert 3 not in rows
    assert {row: rows[row] for row in rows if row != 1} == {
        row: tokens for row, tokens in expected.items() if row not in (1, 3)
    }


def test_a_request_that_the_engine_cannot_run_is_refused(model: GPT) -> None:
    engine = Engine(model, 2, 30)
    with pytest.raises(PromptError, match=r"prompt 0 has 20 tokens and 11 .* 30 positions"):
        engine.add(make_requests(CONFIG, [[1] * 20], 11)[0])
    with pytest.raises(PromptError, match="drafts=True"):
        engine.add(make_requests(CONFIG, [[1]], 11, drafter=PromptLookup())[0])
    assert not engine.is_busy
    assert engine.step() == []


def test_the_engine_runs_multi_head_models_too() -> None:
    model = tiny_model(multi_query=False)
    found = by_row(engine_tokens(model, PROMPTS, NEW_TOKENS, end_ids=ENDS, slots=3))
    assert found == solo_runs(model, GREEDY)


def test_the_order_of_the_prompts_does_not_matter(model: GPT) -> None:
    sampling = SamplingParams(temperature=1.0, seed=8)
    last = len(PROMPTS) - 1
    forwards, backwards = (
        by_row(engine_tokens(model, prompts, NEW_TOKENS, sampling, end_ids=ENDS, slots=4))
        for prompts in (PROMPTS, PROMPTS[::-1])
    )
    assert {last - row: tokens for row, tokens in backwards.items()} == forwards


@STEPPERS
def test_log_probabilities_are_those_of_solo_runs(model: GPT, stepper: Any) -> None:
    found: dict[int, list[Token]] = {}
    for token in engine_tokens(model, PROMPTS, 5, logprobs=2, slots=3):
        found.setdefault(token.row, []).append(token)
    for i, prompt in enumerate(PROMPTS):
        same_tokens(
            [token._replace(row=0) for token in found[i]],
            list(engine_tokens(model, [prompt], 5, logprobs=2)),
        )


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_nothing_of_a_slot_s_former_row_reaches_the_next(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PoisonedStepper(ModelStepper):
        """Leaves NaN in every slot whose row has left."""

        def remove(self, slot: int, last: int) -> None:
            super().remove(slot, last)
            self.cache.kv[:, last] = torch.nan

    model = tiny_model(backend)
    expected = solo_runs(model, GREEDY)
    monkeypatch.setattr(batching, "ModelStepper", PoisonedStepper)
    assert by_row(engine_tokens(model, PROMPTS, NEW_TOKENS, end_ids=ENDS, slots=3)) == expected


def test_the_samples_of_a_prompt_share_one_prefill_even_if_they_do_not_fit_together(
    model: GPT,
) -> None:
    sampling = SamplingParams(temperature=1.0, seed=0)
    with shapes_fed(model) as shapes:
        rows = by_row(engine_tokens(model, [[5] * 9, [6] * 4], [3, 4], sampling, n=3, slots=2))
    # The first two end together, and with them the only copies of their prompt.
    assert [shape for shape in shapes if shape[1] > 1] == [(1, 9), (2, 9)]
    with shapes_fed(model) as shapes:
        shared = by_row(engine_tokens(model, [[5] * 9], 20, sampling, n=9, end_ids=ENDS, slots=4))
    assert [shape for shape in shapes if shape[1] > 1] == [(1, 9)]
    alone = by_row(engine_tokens(model, [[5] * 9], 20, sampling, n=9, end_ids=ENDS))
    assert shared == alone
    with shapes_fed(model) as shapes:
        together = by_row(engine_tokens(model, [[5] * 9, [6] * 4], 3, sampling, n=3))
    assert shapes == [(2, 9), (6, 1), (6, 1)]
    assert {row: rows[row][:3] for row in (0, 1, 2)} == {row: together[row] for row in (0, 1, 2)}


def test_finished_rows_make_room_for_waiting_prompts(model: GPT) -> None:
    counts = [12, 3, 3, 3, 3, 3, 3, 3, 3]
    with shapes_fed(model) as shapes:
        rows = by_row(engine_tokens(model, [[7, 8]] * len(counts), counts, slots=3))
    steps = [rows for rows, width in shapes if width == 1]
    # Two slots take the eight short rows one after the other while the long one lasts.
    assert steps == [3] * 8 + [1] * 3
    assert [len(rows[row]) for row in range(len(counts))] == counts


def test_a_few_free_slots_wait_for_more_so_that_prompts_are_read_together(model: GPT) -> None:
    counts = [min(row + 1, 40) if row < 32 else 40 for row in range(40)]
    with shapes_fed(model) as shapes:
        list(engine_tokens(model, [[7, 8]] * 40, counts, slots=32))
    assert [rows for rows, width in shapes if width == 2] == [32, 4, 4]


def test_waiting_prompts_are_read_longest_first_and_others_in_their_order(model: GPT) -> None:
    with shapes_fed(model) as shapes:
        list(
            engine_tokens(model, random_prompts(CONFIG, [2, 8, 5, 3]), 1, slots=3, prefill_chunk=3)
        )
    # 8, 5 and 2 tokens, of which some end in each chunk; the one that waited comes last.
    assert shapes == [(3, 3), (2, 3), (1, 2), (1, 3)]
    with shapes_fed(model) as shapes:
        list(engine_tokens(model, random_prompts(CONFIG, [2, 8, 5]), 1, prefill_chunk=3))
    assert shapes == [(3, 3), (3, 3), (2, 2)]


def test_a_slot_is_as_long_as_the_longest_row_needs(
    model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Recorded(KVCache):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            sizes.append((self.batch_size, self.max_length))

    sizes: list[tuple[int, int]] = []
    monkeypatch.setattr(model, "cache_class", Recorded)
    room = CONFIG.n_positions - 40
    rows = by_row(engine_tokens(model, PROMPTS, room, slots=4))
    assert {len(row) for row in rows.values()} == {room}
    list(engine_tokens(model, [[1], [2, 3]], 4, slots=10**9))
    assert sizes == [(4, CONFIG.n_positions), (2, 6)]  # one cache for prompts and decoding


def test_prompts_that_wait_are_not_read_before_their_turn(model: GPT) -> None:
    tokens = engine_tokens(model, PROMPTS, 4, slots=2)
    assert {next(tokens).row for _ in range(7)} == {0, 1}


def test_nothing_asked_for_gives_nothing(model: GPT) -> None:
    assert list(engine_tokens(model, [], 5, slots=2)) == []
    assert list(engine_tokens(model, [[1]], 0, slots=2)) == []


@STEPPERS
def test_the_prompt_whose_logits_are_not_finite_is_named(model: GPT, stepper: Any) -> None:
    broken = tiny_model(tie_word_embeddings=False)
    with torch.no_grad():
        broken.transformer.wte.weight[7] = torch.nan
        broken.transformer.wte.weight[:7] = model.transformer.wte.weight[:7]
    prompts, rows = [[1, 2], [3], [4, 7, 5], [6]], []
    with pytest.raises(FloatingPointError, match=r"^prompt 2: .* not finite"):
        rows.extend(token.row for token in engine_tokens(broken, prompts, 2, slots=1))
    assert sorted(rows) == [0, 0, 1, 1]  # what was before is not lost


def test_the_consumer_is_not_in_inference_mode(model: GPT) -> None:
    for _ in engine_tokens(model, PROMPTS[:3], 3, slots=2):
        assert not torch.is_inference_mode_enabled()


@STEPPERS
def test_an_engine_whose_step_raised_does_not_go_on(model: GPT, stepper: Any) -> None:
    broken = tiny_model()
    with torch.no_grad():
        broken.transformer.wpe.weight[12] = torch.nan
    engine = Engine(broken, 2, 30)
    for request in make_requests(CONFIG, [[1] * 10, [2]], 9):
        engine.add(request)
    engine.step()
    engine.step()
    with pytest.raises(FloatingPointError, match=r"^prompt 0"):
        list(iter(engine.step, []))
    with pytest.raises(RuntimeError, match="make a new engine"):
        engine.step()
    assert not engine.is_reusable
