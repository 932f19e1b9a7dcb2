"""Many prompts through few places: the tokens of solo runs, whoever had a place before."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch

from mqa_gpt import GPT, KVCache
from mqa_gpt.generation import batching
from mqa_gpt.generation.batching import slots_beside, stream_batched
from mqa_gpt.generation.decode import Token
from mqa_gpt.generation.decode_graph import Decoder, DecodeState
from mqa_gpt.generation.request import stream_tokens
from mqa_gpt.sampling import SamplingParams
from tests.fake_cuda import TapedGraph
from tests.helpers import our_model, random_prompts, reference_model, tiny_config

CONFIG = tiny_config()
PROMPTS = random_prompts(CONFIG, [17, 3, 40, 1, 9, 9, 28, 2, 5, 33, 1], seed=1)
NEW_TOKENS = 20


@pytest.fixture(scope="module")
def model() -> GPT:
    return our_model(reference_model(CONFIG), CONFIG)


def ends(token: Token) -> bool:
    """Rows end at different times, some at their first token and some never."""
    return token.id % 9 == 0


def rows_of(tokens: Any) -> dict[int, list[tuple[int, str | None]]]:
    rows: dict[int, list[tuple[int, str | None]]] = {}
    for token in tokens:
        rows.setdefault(token.row, []).append((token.id, token.finished))
    return rows


def solo_runs(model: GPT, sampling: SamplingParams, n: int = 1) -> dict[int, Any]:
    rows = {}
    for i, prompt in enumerate(PROMPTS):
        alone = stream_tokens(model, [prompt], NEW_TOKENS, sampling, n=n, should_stop=ends)
        rows |= {i * n + row: tokens for row, tokens in rows_of(alone).items()}
    return rows


def shapes_fed(model: GPT, tokens: Any) -> list[tuple[int, ...]]:
    """The shapes of the ids that the model is called with."""
    shapes = []
    hook = model.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    try:
        for _ in tokens:
            pass
    finally:
        hook.remove()
    return shapes


def replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let steps be recorded and replayed, as on a CUDA device."""
    monkeypatch.setattr(batching, "can_replay", lambda model: True)


SAMPLINGS = pytest.mark.parametrize(
    ("options", "n"),
    [
        ({}, 1),
        ({"repetition_penalty": 1.3}, 1),
        ({"temperature": 1.1, "seed": 3}, 3),
        ({"temperature": 1.3, "seed": 4, "top_k": 40, "repetition_penalty": 1.2}, 2),
    ],
    ids=["greedy", "penalty", "sampled", "sampled-penalty"],
)


@SAMPLINGS
@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_every_row_has_the_tokens_and_the_end_of_its_solo_run(
    model: GPT, batch_size: int, options: dict[str, Any], n: int
) -> None:
    sampling = SamplingParams(**options)
    expected = solo_runs(model, sampling, n)
    assert len({len(row) for row in expected.values()}) > 3
    stream = stream_batched(model, PROMPTS, NEW_TOKENS, batch_size, sampling, n=n, should_stop=ends)
    assert rows_of(stream) == expected


@SAMPLINGS
@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_steps_that_are_replayed_give_the_tokens_and_ends_of_solo_runs(
    model: GPT,
    graphs: list[TapedGraph],
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
    options: dict[str, Any],
    n: int,
) -> None:
    replayed(monkeypatch)
    sampling = SamplingParams(**options)
    stream = stream_batched(model, PROMPTS, NEW_TOKENS, batch_size, sampling, n=n, should_stop=ends)
    assert rows_of(stream) == solo_runs(model, sampling, n)
    assert len(graphs) == (2 if batch_size == 100 and n > 1 else 1)


def test_one_recording_lasts_until_half_of_the_places_are_empty_and_no_prompt_waits(
    model: GPT, graphs: list[TapedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed(monkeypatch)
    monkeypatch.setattr(batching, "FEW_ROWS", 2)
    expected = solo_runs(model, SamplingParams())
    sizes = []
    init = Decoder.__init__

    def record(self: Decoder, model: GPT, state: DecodeState, sampling: SamplingParams) -> None:
        sizes.append(state.cache.batch_size)
        init(self, model, state, sampling)

    monkeypatch.setattr(Decoder, "__init__", record)
    assert rows_of(stream_batched(model, PROMPTS, NEW_TOKENS, 8, should_stop=ends)) == expected
    assert sizes[0] == 8
    assert all(b <= a // 2 for a, b in pairwise(sizes))


def test_an_empty_place_begins_anew_before_its_slots_are_full(
    model: GPT, graphs: list[TapedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second row's place is empty from the first step to the last, twice as long as it is."""
    replayed(monkeypatch)
    lengths = [23, 1, *[24] * 15]
    prompts = [[7 + i] for i in range(len(lengths))]

    def is_done(token: Token) -> bool:
        counts[token.row] += 1
        return counts[token.row] == lengths[token.row]

    counts = [0] * len(lengths)
    expected = rows_of(stream_tokens(model, prompts, 24, should_stop=is_done))
    counts = [0] * len(lengths)
    assert rows_of(stream_batched(model, prompts, 24, 16, should_stop=is_done)) == expected


def test_what_an_empty_place_computes_is_no_error(
    graphs: list[TapedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed(monkeypatch)
    model = our_model(reference_model(CONFIG), CONFIG)
    with torch.no_grad():
        model.transformer.wpe.weight[12] = torch.nan  # where the second row would go on
    lengths, counts = [8, 1], [0, 0]

    def is_done(token: Token) -> bool:
        counts[token.row] += 1
        return counts[token.row] == lengths[token.row]

    tokens = rows_of(stream_batched(model, [[5], [3] * 12], 20, 2, should_stop=is_done))
    assert [len(tokens[row]) for row in (0, 1)] == lengths


def test_places_stay_while_prompts_wait_for_them(
    model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed(monkeypatch)
    monkeypatch.setattr(batching, "FEW_ROWS", 2)
    monkeypatch.setattr(batching, "SHARE_TO_FILL", 0.9)  # most places are empty before
    begun: set[int] = set()
    when_shrunk = []
    shrink = Decoder.shrink

    def record(self: Decoder, kept: Sequence[int]) -> tuple[Decoder, list[int]]:
        when_shrunk.append(len(begun))
        return shrink(self, kept)

    def is_done(token: Token) -> bool:
        begun.add(token.row)
        counts[token.row] += 1
        return counts[token.row] == 2 + token.row % 8

    monkeypatch.setattr(Decoder, "shrink", record)
    prompts = [[7 + i] for i in range(16)]
    counts = [0] * 16
    expected = rows_of(stream_tokens(model, prompts, 20, should_stop=is_done))
    begun.clear()
    counts = [0] * 16
    assert rows_of(stream_batched(model, prompts, 20, 8, should_stop=is_done)) == expected
    assert when_shrunk
    assert set(when_shrunk) == {16}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
@SAMPLINGS
def test_a_cuda_graph_gives_the_tokens_of_solo_runs(options: dict[str, Any], n: int) -> None:
    model = our_model(reference_model(CONFIG), CONFIG).cuda()
    sampling = SamplingParams(**options)
    for batch_size in (2, 5, 100):
        stream = stream_batched(
            model, PROMPTS, NEW_TOKENS, batch_size, sampling, n=n, should_stop=ends
        )
        assert rows_of(stream) == solo_runs(model, sampling, n)


def test_the_longest_row_may_fill_the_context_and_end_before_others(
    model: GPT, graphs: list[TapedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed(monkeypatch)
    monkeypatch.setattr(batching, "SHARE_TO_FILL", 0.1)
    counts = {1: 0}

    def is_done(token: Token) -> bool:  # the third prompt begins while the first is under way
        counts[1] += token.row == 1
        return token.row == 1 and counts[1] == 3

    prompts = [*random_prompts(CONFIG, [CONFIG.n_positions - 20]), [1], [2]]
    expected = rows_of(stream_tokens(model, prompts, 20, should_stop=is_done))
    counts[1] = 0
    assert rows_of(stream_batched(model, prompts, 20, 2, should_stop=is_done)) == expected


def test_a_replayed_step_is_started_before_its_tokens_are_looked_at(
    model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed(monkeypatch)
    events = []
    run = Decoder.run

    def recorded(self: Decoder) -> None:
        events.append("run")
        run(self)

    monkeypatch.setattr(Decoder, "run", recorded)
    for token in stream_batched(model, [[1, 2], [3]], 3, 2):
        events.append(token.row)
    assert events == ["run", 0, 1, "run", 0, 1, 0, 1]


def test_multi_head_caches_are_shared_out_too() -> None:
    config = tiny_config(multi_query=False)
    model = our_model(reference_model(config), config)
    found = rows_of(stream_batched(model, PROMPTS, NEW_TOKENS, 3, should_stop=ends))
    assert found == solo_runs(model, SamplingParams())


def test_prompts_are_read_together_as_far_as_one_pass_holds_them(
    model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "PREFILL_POSITIONS", 40)
    sizes = []

    def of(model: GPT, rows: int, slots: int) -> KVCache:
        sizes.append((rows, slots))
        return make(model, rows, slots)

    make = KVCache.of
    monkeypatch.setattr(KVCache, "of", of)
    # Lengths 17, 3, 40, 1, 9, 9, 28, 2, 5, 33, 1, for six places.
    found = rows_of(stream_batched(model, PROMPTS, NEW_TOKENS, 6, should_stop=ends))
    places, *beside = sizes
    assert places == (6, 40 + NEW_TOKENS - 1)
    assert beside[:4] == [(2, 17), (1, 40), (3, 9), (1, 28)]
    assert all(rows * slots <= slots_beside(6, 40) == 40 for rows, slots in beside)
    monkeypatch.undo()
    assert found == solo_runs(model, SamplingParams())


def test_the_order_of_the_prompts_does_not_matter(model: GPT) -> None:
    sampling = SamplingParams(temperature=1.0, seed=8)
    last = len(PROMPTS) - 1
    forwards, backwards = (
        rows_of(stream_batched(model, prompts, NEW_TOKENS, 4, sampling, should_stop=ends))
        for prompts in (PROMPTS, PROMPTS[::-1])
    )
    assert {last - row: tokens for row, tokens in backwards.items()} == forwards


@pytest.mark.parametrize("is_replayed", [False, True])
def test_log_probabilities_are_those_of_the_plain_loop(
    model: GPT, monkeypatch: pytest.MonkeyPatch, is_replayed: bool
) -> None:
    monkeypatch.setattr(batching, "can_replay", lambda model: is_replayed)
    plain, batched = (
        {(t.row, i): t for i, t in enumerate(sorted(tokens, key=lambda token: token.row))}
        for tokens in (
            stream_tokens(model, PROMPTS, 5, logprobs=2),
            stream_batched(model, PROMPTS, 5, 3, logprobs=2),
        )
    )
    assert plain.keys() == batched.keys()
    for key, token in plain.items():
        assert batched[key].id == token.id
        assert batched[key].logprob == pytest.approx(token.logprob, abs=1e-4)
        assert [id_ for id_, _ in batched[key].top] == [id_ for id_, _ in token.top]


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_nothing_of_a_place_s_former_owner_reaches_the_next(
    model: GPT, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Poisoned(KVCache):
        """A NaN wherever nothing was written."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.kv.fill_(torch.nan)

    class PoisonedPlaces(batching._Places):
        """A NaN in every slot of a place that is given up."""

        def remove(self, finished: list[int], *, are_more: bool) -> None:
            super().remove(finished, are_more=are_more)
            self._cache.kv[:, len(self.rows) :] = torch.nan

    model = our_model(reference_model(CONFIG), CONFIG, backend)
    expected = solo_runs(model, SamplingParams())
    monkeypatch.setattr(batching, "KVCache", Poisoned)
    monkeypatch.setattr(batching, "_Places", PoisonedPlaces)
    assert rows_of(stream_batched(model, PROMPTS, NEW_TOKENS, 3, should_stop=ends)) == expected


def test_the_samples_of_a_prompt_share_one_prefill_even_if_they_do_not_fit_together(
    model: GPT,
) -> None:
    sampling = SamplingParams(temperature=1.0, seed=0)
    shapes = shapes_fed(model, stream_batched(model, [[5] * 9, [6] * 4], 3, 2, sampling, n=3))
    prefills = [shape for shape in shapes if shape[1] > 1]
    assert prefills == [(1, 9), (1, 4)]
    together = shapes_fed(model, stream_batched(model, [[5] * 9, [6] * 4], 3, 6, sampling, n=3))
    assert together == [(2, 9), (6, 1), (6, 1)]


def test_finished_rows_make_room_for_waiting_prompts(model: GPT) -> None:
    lengths = [12, 3, 3, 3, 3, 3, 3, 3, 3]  # new tokens of each row
    counts = [0] * len(lengths)

    def is_done(token: Token) -> bool:
        counts[token.row] += 1
        return counts[token.row] == lengths[token.row]

    prompts = [[7, 8]] * len(lengths)
    shapes = shapes_fed(model, stream_batched(model, prompts, 30, 3, should_stop=is_done))
    steps = [rows for rows, width in shapes if width == 1]
    # Two places take the eight short rows one after the other while the long one lasts.
    assert steps == [3] * 8 + [1] * 3
    assert counts == lengths


def test_a_few_free_places_wait_for_more_so_that_prompts_are_read_together(model: GPT) -> None:
    counts = [0] * 40

    def is_done(token: Token) -> bool:  # with every step one row more of the first 32
        counts[token.row] += 1
        return counts[token.row] == token.row + 1 <= 32

    stream = stream_batched(model, [[7, 8]] * 40, 40, 32, should_stop=is_done)
    prefills = [rows for rows, width in shapes_fed(model, stream) if width == 2]
    assert prefills == [32, 4, 4]


def test_a_place_is_as_long_as_the_longest_row_needs(
    model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []

    class Recorded(KVCache):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            shapes.append((self.batch_size, self.max_length))

    monkeypatch.setattr(batching, "KVCache", Recorded)
    room = CONFIG.n_positions - 40
    rows = rows_of(stream_batched(model, PROMPTS, room, 4))
    assert {len(row) for row in rows.values()} == {room}
    assert shapes[0] == (4, CONFIG.n_positions - 1)  # the last token is never fed
    assert shapes[1] == (4, 40)
    assert all(rows <= 4 for rows, _ in shapes)
    shapes.clear()
    list(stream_batched(model, [[1], [2, 3]], 4, 10**9))
    assert shapes == [(2, 5), (2, 2)]


def test_prompts_that_wait_are_not_read_before_their_turn(model: GPT) -> None:
    stream = stream_batched(model, PROMPTS, 4, 2)
    assert shapes_fed(model, [next(stream)]) == []  # the hook came after the first token
    begun = {next(stream).row for _ in range(6)}
    assert begun == {0, 1}


def test_nothing_asked_for_gives_nothing(model: GPT) -> None:
    assert list(stream_batched(model, [], 5, 2)) == []
    assert list(stream_batched(model, [[1]], 0, 2)) == []


def test_logits_that_are_not_numbers_are_an_error(model: GPT) -> None:
    broken = our_model(reference_model(CONFIG), CONFIG)
    with torch.no_grad():
        broken.transformer.ln_f.bias[3] = torch.nan
    with pytest.raises(FloatingPointError, match=r"^prompt 0: .* not finite"):
        list(stream_batched(broken, [[1, 2]], 4, 2))


@pytest.mark.parametrize("is_replayed", [False, True])
def test_the_prompt_whose_logits_are_not_numbers_is_named(
    model: GPT, monkeypatch: pytest.MonkeyPatch, is_replayed: bool
) -> None:
    monkeypatch.setattr(batching, "can_replay", lambda model: is_replayed)
    broken = our_model(reference_model(CONFIG), CONFIG)
    with torch.no_grad():
        broken.transformer.wte.weight[7] = torch.nan
        broken.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    prompts, rows = [[1, 2], [3], [4, 7, 5], [6]], []
    tokens = stream_batched(broken, prompts, 2, 2, names=["a", "b", "third", "d"])
    with pytest.raises(FloatingPointError, match=r"^third: .* not finite"):
        rows.extend(token.row for token in tokens)
    assert sorted(rows) == [0, 0, 1, 1]  # what was before is not lost


@pytest.mark.parametrize("n", [1, 2])
def test_the_cache_that_prompts_are_read_into_is_freed_before_the_places_are_decoded(
    model: GPT, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    made: list[weakref.ref[KVCache]] = []

    class Recorded(KVCache):
        @classmethod
        def of(cls, *args: Any) -> KVCache:
            cache = super().of(*args)
            made.append(weakref.ref(cache))
            return cache

    alive = []

    def count(module: GPT, args: tuple[torch.Tensor]) -> None:
        if args[0].shape[1] == 1:
            alive.append(sum(cache() is not None for cache in made))

    monkeypatch.setattr(batching, "KVCache", Recorded)
    hook = model.register_forward_pre_hook(count)
    try:
        sampling = SamplingParams(temperature=1.0, seed=0)
        list(stream_batched(model, [[5] * 9, [6] * 4, [7] * 3], 4, 2, sampling, n=n))
    finally:
        hook.remove()
    assert len(made) == (3 if n == 1 else 4)
    assert set(alive) == {1}


def test_the_consumer_is_not_in_inference_mode(model: GPT) -> None:
    for _ in stream_batched(model, PROMPTS[:3], 3, 2):
        assert not torch.is_inference_mode_enabled()
