from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mqa_gpt.errors import InputError
from mqa_gpt.tokenizer import Tokenizer
from mqa_gpt.training.infilling import InfillingConfig
from mqa_gpt.training.packing import (
    CONTEXT,
    LEFT_TO_RIGHT,
    MASKED,
    MIDDLE,
    SLACK,
    Packer,
    Part,
    middle_left,
)
from tests.helpers import SPECIALS, byte_tokenizer
from tests.training.texts import CODE, DEMO, TOKENIZER, original

END = 0
ALL = (1.0,)
words = st.sampled_from(["a", "é", "𝒳", "\n", "    ", "return x\n", "()", "名", "word "])
documents = st.lists(st.lists(words, min_size=1, max_size=300).map("".join), min_size=1, max_size=5)


def parts(
    texts: list[str], tokenizer: Tokenizer = TOKENIZER, rate: float = 1.0, seed: int = 0
) -> list[Part]:
    rng = random.Random(seed)
    return [
        Part(
            tokenizer.encode(text, special_tokens=False),
            holes=random.Random(f"{seed} {i}") if rng.random() < rate else None,
        )
        for i, text in enumerate(texts)
    ]


def pack(packer: Packer, of: list[Part], windows: int) -> tuple[list[int], list[int]]:
    ids, kinds = packer.pack(of, windows)
    assert ids.dtype == torch.int32
    assert len(ids) == len(kinds) == windows * packer.length + 1
    return ids.tolist(), kinds.tolist()


def pieces(ids: list[int]) -> list[list[int]]:
    """What stands between ends of text; the last one may be cut off."""
    found: list[list[int]] = []
    for id_ in ids:
        if id_ == END:
            found.append([])
        else:
            found[-1].append(id_)
    return found


def test_left_to_right_the_stream_is_the_documents_with_ends_between() -> None:
    texts = ["abc", "defgh", "i"]
    packer = Packer(TOKENIZER, InfillingConfig(), 6)
    ids, kinds = pack(packer, parts(texts, rate=0.0), 2)
    assert (
        TOKENIZER.decode(ids, skip_special_tokens=False)
        == "".join(f"{SPECIALS[0]}{text}" for text in texts) + SPECIALS[0]
    )
    assert kinds == [MASKED] + 12 * [LEFT_TO_RIGHT]


def test_a_stream_that_is_too_short_begins_anew() -> None:
    packer = Packer(TOKENIZER, InfillingConfig(), 6)
    ids, _ = pack(packer, parts(["abc"], rate=0.0), 2)
    assert TOKENIZER.decode(ids) == "abcabcabc"


def test_a_document_that_goes_on_from_the_block_before_has_no_end_before_it() -> None:
    packer = Packer(TOKENIZER, InfillingConfig(), 4)
    (part,) = parts(["abcd"], rate=0.0)
    part.is_continued = True
    ids, kinds = pack(packer, [part], 1)
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == f"abcd{SPECIALS[0]}"
    assert kinds[1:] == 4 * [LEFT_TO_RIGHT]


def test_prompts_are_masked() -> None:
    packer = Packer(TOKENIZER, InfillingConfig(), 8)
    (part,) = parts(["prompt: answer!!"], rate=0.0)  # too long for a window
    part.prompt = 7
    ids, kinds = pack(packer, [part], 2)
    assert TOKENIZER.decode(ids) == "prompt: answer!!"
    assert kinds == 8 * [MASKED] + 9 * [LEFT_TO_RIGHT]


@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=12), length=st.integers(41, 60))
def test_examples_with_prompts_lie_in_one_window(lengths: list[int], length: int) -> None:
    packer = Packer(TOKENIZER, InfillingConfig(), length)
    of = [Part([100 + i] * n, prompt=n // 2) for i, n in enumerate(lengths)]
    ids, kinds = pack(packer, of, 2 * len(of) + 1)  # room for all
    at = 0
    found = []
    for piece in pieces(ids):
        at += 1 + len(piece)
        if piece and at < len(ids):
            begin = at - len(piece)
            assert at <= begin // length * length + length
            found.append(piece)
            prompt = len(piece) // 2
            assert kinds[begin : at + 1] == prompt * [MASKED] + (len(piece) - prompt + 1) * [
                LEFT_TO_RIGHT
            ]
    assert len(found) >= len(of)
    assert sorted(found[: len(of)]) == [part.ids for part in of]


def test_a_window_is_filled_with_the_next_example_that_fits_and_else_padded() -> None:
    packer = Packer(TOKENIZER, InfillingConfig(), 10)
    of = [Part([100 + n] * n, prompt=1) for n in (6, 8, 2, 4)]
    ids, kinds = pack(packer, of, 3)
    assert [len(piece) for piece in pieces(ids)[:7]] == [6, 2, 8, 4, 2, 0, 0]
    assert kinds[28:] == 3 * [MASKED]  # two of padding, and the next prompt


@pytest.mark.parametrize("tokenizer", [TOKENIZER, DEMO], ids=["bytes", "demo"])
@settings(deadline=None, max_examples=50)
@given(
    texts=documents,
    length=st.integers(16, 200),
    between=st.sampled_from([None, (20, 100)]),
    slack=st.sampled_from([0, SLACK]),  # without it pieces end where their windows do
    seed=st.integers(0, 9),
)
def test_every_piece_ends_in_its_window_and_the_pieces_are_the_documents(
    tokenizer: Tokenizer,
    texts: list[str],
    length: int,
    between: tuple[int, int] | None,
    slack: int,
    seed: int,
) -> None:
    infilling = InfillingConfig(lines=0.5, nodes=0.5, piece_tokens=between)
    packer = Packer(tokenizer, infilling, length)
    of = parts(texts, tokenizer, seed=seed)
    windows = -(-3 * sum(len(part.ids) + 9 for part in of) // length)  # more than enough
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mqa_gpt.training.packing.SLACK", slack)
        ids, kinds = pack(packer, of, windows)
    fim = tokenizer.fim
    assert fim is not None

    text = "".join(texts)
    read = ""
    at = 0
    for piece in pieces(ids):
        at += 1 + len(piece)  # of the end of text after the piece
        if at == len(ids):
            break  # cut off by the block's end
        begin = at - len(piece)
        if piece[:1] == [fim.prefix]:
            assert at <= begin // length * length + length  # its end is a label of its window
            context = kinds[begin : at + 1].index(MIDDLE)
            assert context > piece.index(fim.middle)
            assert set(kinds[begin : begin + context]) == {CONTEXT}
            assert set(kinds[begin + context : at + 1]) == {MIDDLE}
            read += original(piece, tokenizer)
        else:
            assert set(kinds[begin:at]) <= {LEFT_TO_RIGHT}
            assert kinds[at] in (LEFT_TO_RIGHT, MASKED)
            read += tokenizer.decode(piece)
    assert (3 * text).startswith(read[: len(text) * 3])
    assert len(read) >= len(text)


def test_hardly_anything_stays_left_to_right_when_everything_is_infilled() -> None:
    packer = Packer(DEMO, InfillingConfig(), 256)
    _, kinds = packer.pack(parts(30 * [CODE], DEMO), 20)
    assert ((kinds == CONTEXT) | (kinds == MIDDLE)).float().mean() > 0.8
    assert (kinds == MASKED).float().mean() < 0.01


def test_lengths_of_pieces_vary_between_two_numbers_if_given() -> None:
    def lengths(between: tuple[int, int] | None) -> list[int]:
        packer = Packer(TOKENIZER, InfillingConfig(piece_tokens=between), 1000)
        ids, _ = pack(packer, parts([40 * CODE], TOKENIZER), 15)
        return [len(piece) - 3 for piece in pieces(ids)[:-1] if piece[:1] == [1]]  # <fim_prefix>

    assert min(lengths(None)) > 400
    varied = lengths((64, 640))
    assert max(varied) <= 640
    assert sum(length < 200 for length in varied) > 10
    assert sum(length > 200 for length in varied) > 10


def test_a_part_may_begin_and_end_inside_a_character() -> None:
    packer = Packer(TOKENIZER, InfillingConfig(), 64)
    (part,) = parts([40 * "名"])
    part.ids, part.is_continued = part.ids[1:-1], True
    ids, _ = pack(packer, [part], 2)
    assert 30 < TOKENIZER.decode(ids, skip_special_tokens=True).count("名") < 60
    assert "\N{REPLACEMENT CHARACTER}" not in TOKENIZER.decode(ids)


def test_the_rate_is_the_share_of_rearranged_documents() -> None:
    packer = Packer(TOKENIZER, InfillingConfig(), 2000)
    ids, _ = pack(packer, parts(400 * [80 * "x"], rate=0.3), 16)
    found = pieces(ids)
    assert 0.25 < sum(piece[:1] == [1] for piece in found) / len(found) < 0.35


def test_what_is_left_of_a_middle_falls_from_one_to_nothing() -> None:
    x, c, m = LEFT_TO_RIGHT, CONTEXT, MIDDLE
    kinds = torch.tensor([[m, c, m, m, m, m, x, m], [x, m, m, c, c, c, m, m]], dtype=torch.uint8)
    expected = [[1, 0, 1, 0.75, 0.5, 0.25, 0, 1], [0, 1, 0.5, 0, 0, 0, 1, 0.5]]
    assert torch.equal(middle_left(kinds), torch.tensor(expected))


def test_a_tokenizer_without_end_of_text_is_refused() -> None:
    with pytest.raises(InputError, match="which packing needs"):
        Packer(Tokenizer(byte_tokenizer()), InfillingConfig(), 8)


def test_many_pieces_begin_their_window_as_prompts_do() -> None:
    packer = Packer(DEMO, InfillingConfig(), 256)
    ids, _ = packer.pack(parts(30 * [CODE], DEMO), 20)
    assert (ids[:-1].view(20, 256)[:, 0] == 1).sum() > 10  # <fim_prefix>
