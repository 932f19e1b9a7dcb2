"""The demo's data, from a made-up library: selection, tokenizer, packing and infilling."""

from __future__ import annotations

import random
import re
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from corpus import (
    SPECIAL_TOKENS,
    Corpus,
    batches,
    read_corpus,
    rearrange,
    split_into_pieces,
    train_tokenizer,
)
from hypothesis import given
from hypothesis import strategies as st

from mqa_gpt.fim import FimTokens
from mqa_gpt.tokenizer import Tokenizer


def module(name: str) -> str:
    """Twelve long lines, unique to this module."""
    return "".join(f"{name}_{i} = a_long_enough_line({i})\n" for i in range(12))


def corpus_of(folder: Path, files: dict[str, str | bytes]) -> Corpus:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_corpus(folder)


def test_listed_modules_are_held_out_and_never_trained_on(tmp_path: Path) -> None:
    corpus = corpus_of(
        tmp_path,
        {name: module(Path(name).stem) for name in ("heapq.py", "json/decoder.py", "abc.py")}
        | {"csv.py": "short\n", "mine/heapq.py": module("another"), "json/notes.txt": "text"},
    )
    assert corpus.held_out == {
        "csv.py": "short\n",
        "heapq.py": module("heapq"),
        "json/decoder.py": module("decoder"),
    }
    assert corpus.training == {"abc.py": module("abc"), "mine/heapq.py": module("another")}


def test_a_file_with_over_a_quarter_of_its_long_lines_in_a_held_out_module_is_left_out(
    tmp_path: Path,
) -> None:
    short = "".join(f"x{i} = 1\n" for i in range(20))
    held_out = module("heapq").splitlines(keepends=True)
    own = module("own").splitlines(keepends=True)
    files = {
        "heapq.py": module("heapq") + short,
        "quarter.py": "".join(own[:9] + held_out[:3]),
        "more.py": "".join(own[:8] + ["    " + line for line in held_out[:4]]),
        "short_lines.py": module("other") + short,
    }
    assert set(corpus_of(tmp_path, files).training) == {"quarter.py", "short_lines.py"}


@pytest.mark.parametrize(
    "name",
    [
        "test/support.py",
        "json/tests/decoding.py",
        "site-packages/numpy/core.py",
        "encodings/cp1252.py",
        "_sysconfigdata__linux_x86_64.py",
    ],
)
def test_tests_installed_packages_and_generated_tables_are_left_out(
    tmp_path: Path, name: str
) -> None:
    kept = ("encodings/utf_8.py", "testing.py", "unittest/case.py")
    files = {path: module(Path(path).stem) for path in ("heapq.py", name, *kept)}
    assert tuple(corpus_of(tmp_path, files).training) == kept


def test_empty_undecodable_and_repeated_files_are_left_out(tmp_path: Path) -> None:
    files = {
        "heapq.py": module("heapq"),
        "a.py": module("same"),
        "b.py": module("same").replace("\n", "\r\n"),
        "empty.py": " \n",
        "latin.py": "name = 'é'\n".encode("latin-1"),
    }
    assert corpus_of(tmp_path, files).training == {"a.py": module("same")}


def test_a_folder_without_held_out_modules_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is it a standard library"):
        corpus_of(tmp_path, {"mine.py": module("mine")})


TRAINED = train_tokenizer([module(name) + "12345 " * 50 for name in ("first", "second")], 290)
TOKENIZER = Tokenizer(TRAINED)


def test_special_tokens_have_starcoders_ids() -> None:
    assert [TRAINED.id_to_token(i) for i in range(19)] == SPECIAL_TOKENS
    assert TOKENIZER.special_ids == set(range(19))
    assert TOKENIZER.end_of_text_id == 0
    assert TOKENIZER.fim == FimTokens(prefix=1, suffix=3, middle=2, pad=4)
    assert TOKENIZER.vocab_size == 290


@given(st.lists(st.text() | st.sampled_from([*SPECIAL_TOKENS, "first_1", "   "])).map("".join))
def test_decoding_restores_any_encoded_text(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text, special_tokens=False)) == text


def test_every_digit_and_every_frequent_word_is_one_token() -> None:
    def pieces(text: str) -> list[str | None]:
        return [TOKENIZER.id_to_token(i) for i in TOKENIZER.encode(text)]

    assert pieces("12345") == list("12345")
    assert pieces("enough") == ["enough"]


class Characters:
    """A transparent tokenizer: a character's id is its code point."""

    end_of_text_id = 0
    fim = FimTokens(prefix=1, suffix=3, middle=2, pad=4)

    def encode(self, text: str, *, special_tokens: bool) -> list[int]:
        assert not special_tokens
        return list(map(ord, text))


class Parts(NamedTuple):
    """The parts of a rearranged document; in SPM the middle includes the prefix."""

    prefix: str
    suffix: str
    middle: str


def parts_of(document: str) -> Parts | None:
    """A document's parts, or None if it is not rearranged for infilling."""
    parts = re.fullmatch("\1(.*)\3(.*)\2(.*)", document, re.DOTALL)
    return Parts(*parts.groups()) if parts else None


def in_order(document: str) -> str:
    """The original of a document."""
    parts = parts_of(document)
    return parts.prefix + parts.middle + parts.suffix if parts else document


def test_the_windows_of_an_epoch_hold_all_documents_half_of_them_rearranged() -> None:
    # 200 texts of 45 characters, all different, make 9,200 tokens with their end tokens, and up
    # to 9,800 with control tokens: nine windows of 1,000 and a rest that is dropped.
    texts = ["".join(map(chr, range(i, i + 45))) for i in range(0x4E00, 0x4E00 + 9000, 45)]
    stream = batches(texts, Characters(), batch_size=1, length=1000, seed=0)
    windows = {batch[0, 0].item(): batch[0].tolist() for batch in islice(stream, 9)}
    ids = [0]
    for _ in range(9):  # the last token of a window is the first of the next
        ids += windows[ids[-1]][1:]
    assert list(windows) != ids[:9000:1000]  # they come in another order
    documents = "".join(map(chr, ids)).split("\0")[1:-1]  # the last one is cut off
    originals = list(map(in_order, documents))
    assert len(documents) > 180
    assert len(set(originals)) == len(documents)
    assert set(originals) <= set(texts)
    assert originals != [text for text in texts if text in originals]  # and so do the texts
    assert 0.4 < sum(map(bool, map(parts_of, documents))) / len(documents) < 0.6


LINES = """\
def first(a, b):
    x = a + b

    return second(x, 3)


class Empty:
    pass
"""


def test_half_of_the_holes_end_with_a_line_and_begin_with_a_line_or_a_word() -> None:
    rng = random.Random(0)
    documents = ["".join(map(chr, rearrange(LINES, Characters(), rng))) for _ in range(4000)]
    assert set(map(in_order, documents)) == {LINES}
    psm = [parts for parts in map(parts_of, documents) if parts and parts.prefix]
    # Of those with a prefix: PSM is half of all, and every fifth or so begins at the beginning.
    assert 0.35 < len(psm) / len(documents) < 0.5
    # Of the cuts anywhere one in eight comes before a line break too.
    at_line_end = Counter(parts.middle for parts in psm if parts.suffix.startswith("\n"))
    assert 0.45 < at_line_end.total() / len(psm) < 0.65
    frequent = {middle for middle, count in at_line_end.items() if count >= 6}
    assert {
        "\n    x = a + b",
        " a + b",
        "\n\n    return second(x, 3)",
        "x, 3)",
        "\n    x = a + b\n\n    return second(x, 3)",
        "\n    x = a + b\n\n    return second(x, 3)\n\n\nclass Empty:",
        "\n    pass",
    } <= frequent


@pytest.mark.parametrize("text", ["", "\n", "  \n\n", "x", "x\n"])
def test_a_piece_of_one_line_or_less_can_be_rearranged(text: str) -> None:
    rng = random.Random(0)
    for _ in range(20):
        assert in_order("".join(map(chr, rearrange(text, Characters(), rng)))) == text


def test_batches_depend_on_the_seed() -> None:
    def first(seed: int) -> torch.Tensor:
        texts = [module(name) for name in ("a", "b", "c", "d")]
        stream = batches(texts, TOKENIZER, batch_size=3, length=32, seed=seed)
        return torch.stack(list(islice(stream, 40)))  # several passes

    assert first(1).shape == (40, 3, 33)
    assert first(1).dtype == torch.int64
    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


@pytest.mark.parametrize("end", ["\n", "no line break at the end"])
def test_a_text_is_cut_at_line_starts_into_pieces_of_very_different_sizes(end: str) -> None:
    rng = random.Random(0)
    text = "".join("x" * rng.randrange(60) + "\n" for _ in range(2000)) + end
    pieces = list(split_into_pieces(text, 3000, rng))
    assert "".join(pieces) == text
    assert all(piece.endswith("\n") for piece in pieces[:-1])
    sizes = list(map(len, pieces[:-1]))
    assert 200 < min(sizes) < 300
    assert 2000 < max(sizes) <= 3000 + 60
