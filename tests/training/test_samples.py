from __future__ import annotations

import random
from collections import Counter
from functools import cache
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mqa_gpt.errors import ConfigError, InputError
from mqa_gpt.tokenizer import Tokenizer
from mqa_gpt.training.infilling import InfillingConfig
from mqa_gpt.training.loss import IGNORED
from mqa_gpt.training.packing import CONTEXT, LEFT_TO_RIGHT, MASKED, MIDDLE
from mqa_gpt.training.samples import Batch, DataConfig, Samples
from mqa_gpt.training.shards import Corpus, TokenizedDocument, corpus_in_memory
from tests.helpers import SPECIALS, byte_tokenizer
from tests.training.texts import CODE

TOKENIZER = Tokenizer(byte_tokenizer(*SPECIALS))
END = 0
LEFT = InfillingConfig(rate=0.0)
HALF = InfillingConfig(lines=1.0)


@cache
def corpus() -> Corpus:
    """41 documents of 1 to 1500 tokens, each of a letter of its own and its number."""
    rng = random.Random(0)
    lengths = [1, 2, 1500, *(int(10 * 30 ** rng.random()) for _ in range(38))]
    texts = [f"{i} {chr(65 + i) * n}" for i, n in enumerate(lengths)]
    return corpus_in_memory(
        TokenizedDocument(TOKENIZER.encode(text, special_tokens=False)) for text in texts
    )


def samples(infilling: InfillingConfig = LEFT, seed: int = 0, **data: object) -> Samples:
    config = DataConfig(**{"length": 48, "shuffle_tokens": 600, **data}, infilling=infilling)  # type: ignore[arg-type]
    return Samples(corpus(), TOKENIZER, config, seed=seed)


def assert_same(batch: Batch, other: Batch) -> None:
    for name, tensor in batch._asdict().items():
        assert tensor is None or torch.equal(tensor, getattr(other, name)), name


def test_an_epoch_is_every_document_once_left_to_right() -> None:
    data = samples()
    total = corpus().tokens + len(corpus())
    assert len(data) == total // 48
    batch = data.rows(range(len(data)))
    assert batch.ids.shape == batch.labels.shape == (len(data), 48)
    assert batch.ids.dtype == batch.labels.dtype == torch.int64
    expected = Counter(END for _ in range(len(corpus())))
    for i in range(len(corpus())):
        expected.update(corpus().ids(i))
    missing = expected - Counter(batch.ids.flatten().tolist())
    assert missing.total() == total % 48  # what is left over at the epoch's end
    assert (batch.kinds[batch.labels != IGNORED] == LEFT_TO_RIGHT).all()


def test_blocks_fit_together_without_a_gap() -> None:
    data = samples(shuffle_tokens=1)  # a window each, so that they stay in order
    batch = data.rows(range(len(data)))
    assert torch.equal(batch.labels[:-1, -1], batch.ids[1:, 0])
    stream = bytes(batch.ids.flatten().tolist())
    *whole, _ = stream.removeprefix(bytes([END])).split(bytes([END]))
    documents = {bytes(corpus().ids(i)) for i in range(len(corpus()))}
    assert len(whole) >= len(documents) - 2
    assert documents.issuperset(whole)
    assert len(set(whole)) == len(whole)


def test_windows_are_shuffled_in_their_block() -> None:
    data = samples(shuffle_tokens=10**9)
    ids = data.rows(range(len(data))).ids
    (letter,) = TOKENIZER.encode("C")  # of the document of 1500 tokens
    places = (ids == letter).all(1).nonzero().flatten().tolist()
    assert len(places) > 25
    assert places[-1] - places[0] > 2 * len(places)


def test_each_epoch_has_an_order_and_holes_of_its_own() -> None:
    data, other = samples(HALF), samples(HALF, seed=1)
    n = len(data)
    epochs = [data.rows(range(i * n, (i + 1) * n)) for i in range(2)]
    assert not torch.equal(epochs[0].ids, epochs[1].ids)
    assert not torch.equal(epochs[0].ids, other.rows(range(n)).ids)
    assert_same(epochs[0], samples(HALF).rows(range(n)))


def test_documents_have_other_neighbours_in_each_epoch_and_with_each_seed() -> None:
    def neighbours(data: Samples, epoch: int) -> set[tuple[int, ...]]:
        ids = data.rows(range(epoch * len(data), (epoch + 1) * len(data))).ids
        found = (ids[:, 1:-2] == END).nonzero().tolist()
        return {tuple(ids[row, i : i + 4].tolist()) for row, i in found}

    data, other = samples(), samples(seed=1)
    each = [neighbours(data, 0), neighbours(data, 1), neighbours(other, 0)]
    assert min(map(len, each)) > 30
    for one, another in combinations(each, 2):
        assert len(one & another) < 10


def test_a_document_is_infilled_anew_in_each_epoch() -> None:
    one = corpus_in_memory([TokenizedDocument(TOKENIZER.encode(9 * CODE, special_tokens=False))])
    data = Samples(one, TOKENIZER, DataConfig(length=500, infilling=InfillingConfig(rate=1.0)))
    n = len(data)
    epochs = [sorted(data.rows(range(i * n, i * n + n)).ids.tolist()) for i in range(2)]
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_reads_the_same_samples_in_the_same_order(ranks: int) -> None:
    alone = samples(HALF)
    each = [samples(HALF) for _ in range(ranks)]
    for step in range(20):
        first = step * 8
        whole = alone.rows(range(first, first + 8))
        parts = [data.rows(range(first + r, first + 8, ranks)) for r, data in enumerate(each)]
        interleaved = torch.stack([part.labels for part in parts], 1).flatten(0, 1)
        assert torch.equal(whole.labels, interleaved)


@settings(deadline=None)
@given(start=st.integers(0, 1000), count=st.integers(1, 40))
def test_reading_may_begin_anywhere(start: int, count: int) -> None:
    assert_same(samples(HALF).rows(range(start, start + count)), everything(start, count))


@cache
def _thousand() -> Batch:
    return samples(HALF).rows(range(1100))


def everything(start: int, count: int) -> Batch:
    ids, labels, kinds, _ = _thousand()
    return Batch(*(t[start : start + count] for t in (ids, labels, kinds)))


def test_numbers_may_be_read_in_any_order() -> None:
    numbers = random.Random(0).sample(range(1000), 30)
    batch, all_ = samples(HALF).rows(numbers), _thousand()
    assert torch.equal(batch.ids, all_.ids[numbers])


def test_making_samples_draws_nothing_from_the_global_generators() -> None:
    states = torch.get_rng_state(), random.getstate()
    samples(HALF).rows(range(30))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()


def test_labels_are_the_next_tokens_and_have_their_kinds() -> None:
    batch = samples(InfillingConfig(rate=1.0)).rows(range(40))
    counted = batch.labels[:, :-1] != IGNORED
    assert torch.equal(batch.labels[:, :-1][counted], batch.ids[:, 1:][counted])
    assert torch.equal(batch.labels == IGNORED, batch.kinds == MASKED)
    assert set(batch.kinds.unique().tolist()) == {LEFT_TO_RIGHT, CONTEXT, MIDDLE, MASKED}


def test_examples_with_prompts_are_whole_and_their_prompts_have_no_labels() -> None:
    lengths = [10 + i % 30 for i in range(90)]
    documents = [
        TokenizedDocument([100 + i] * 4 + [10 + i] * (n - 4), 4) for i, n in enumerate(lengths)
    ]
    config = DataConfig(length=48, shuffle_tokens=500)
    data = Samples(corpus_in_memory(documents), TOKENIZER, config)
    batch = data.rows(range(len(data)))
    answers = Counter(batch.labels[batch.labels >= 10].tolist())
    whole = {10 + i: n - 4 for i, n in enumerate(lengths)}
    assert all(whole[answer] == count for answer, count in answers.items())
    assert len(answers) > 70  # padding displaces the last ones of each block
    assert set(batch.labels[batch.labels < 10].tolist()) == {IGNORED, END}


def test_no_example_is_read_twice_in_an_epoch() -> None:
    examples = [TokenizedDocument([1000 + i] * 6, 2) for i in range(600)]
    data = Samples(corpus_in_memory(examples), TOKENIZER, DataConfig(length=48, shuffle_tokens=480))
    labels = data.rows(range(len(data))).labels
    counts = Counter(labels[labels >= 1000].tolist())
    assert set(counts.values()) == {4}
    assert len(counts) > 540


def test_documents_are_numbered_where_they_do_not_see_each_other() -> None:
    assert samples().rows([0]).documents is None
    batch = samples(within_documents=True).rows(range(len(samples())))
    assert batch.documents is not None
    changes = batch.documents[:, 1:] != batch.documents[:, :-1]
    assert torch.equal(changes, batch.ids[:, 1:] == END)
    moved = batch.to(torch.device("cpu"))
    assert_same(batch, moved)


def test_the_rate_may_rise_with_the_epochs() -> None:
    data = samples(InfillingConfig(rate=0.0, late_rate=1.0, late_epoch=1))

    def share(epoch: int) -> float:
        kinds = data.rows(range(epoch * len(data), (epoch + 1) * len(data))).kinds
        return float(((kinds == CONTEXT) | (kinds == MIDDLE)).float().mean())

    assert share(0) == 0.0
    assert share(1) > 0.5
    assert share(2) > 0.5


def test_what_infilling_adds_displaces_little() -> None:
    text = TOKENIZER.encode(30 * CODE, special_tokens=False)
    one = corpus_in_memory([TokenizedDocument(text) for _ in range(10)])
    config = DataConfig(length=512, infilling=InfillingConfig(rate=1.0))
    data = Samples(one, TOKENIZER, config)
    ids = data.rows(range(len(data))).ids
    assert (ids > 4).sum() > 0.97 * one.tokens


def test_a_corpus_shorter_than_a_sequence_is_refused() -> None:
    short = corpus_in_memory([TokenizedDocument([9, 9, 9])])
    with pytest.raises(InputError, match="have 4 tokens, fewer than one sequence of 5"):
        Samples(short, TOKENIZER, DataConfig(length=5, infilling=LEFT))
    assert len(Samples(short, TOKENIZER, DataConfig(length=4, infilling=LEFT))) == 1


def test_infilling_needs_its_control_tokens() -> None:
    without = Tokenizer(byte_tokenizer(SPECIALS[0]))
    with pytest.raises(ConfigError, match="no fill-in-the-middle tokens"):
        Samples(corpus(), without, DataConfig())
    Samples(corpus(), without, DataConfig(length=48, infilling=LEFT))


@pytest.mark.parametrize(
    "infilling", [InfillingConfig(), InfillingConfig(rate=0.0, late_rate=0.1)], ids=["rate", "late"]
)
def test_windows_too_small_for_a_piece_are_refused_where_holes_are_cut(
    infilling: InfillingConfig,
) -> None:
    with pytest.raises(ConfigError, match=r"data.length is 15: infilling needs at least 16"):
        DataConfig(length=15, infilling=infilling)
    DataConfig(length=1, infilling=LEFT)


@pytest.mark.parametrize("text", ["🙂🙃" * 60, "aé🙂 " * 60, "x\n" * 90])
def test_the_smallest_windows_with_infilling_are_filled(text: str) -> None:
    one = corpus_in_memory([TokenizedDocument(TOKENIZER.encode(text)) for _ in range(3)])
    data = Samples(one, TOKENIZER, DataConfig(length=16, infilling=InfillingConfig(rate=1.0)))
    kinds = data.rows(range(len(data))).kinds
    assert (kinds == MIDDLE).any()


@pytest.mark.parametrize("key", ["length", "shuffle_tokens"])
def test_unusable_settings_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"data.{key} is 0"):
        DataConfig(**{key: 0})  # type: ignore[arg-type]
