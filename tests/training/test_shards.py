from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mqa_gpt.errors import InputError
from mqa_gpt.tokenizer import Tokenizer
from mqa_gpt.training.shards import (
    DOCUMENTS_FILE,
    INDEX_FILE,
    Corpus,
    TokenizedDocument,
    corpus_in_memory,
    is_corpus,
    open_corpus,
    shard_name,
    write_corpus,
)
from tests.helpers import SPECIALS, byte_tokenizer

TOKENIZER = Tokenizer(byte_tokenizer(*SPECIALS))
DOCUMENTS = [
    TokenizedDocument([1, 2, 3]),
    TokenizedDocument([]),
    TokenizedDocument([4, 5], 1),
    TokenizedDocument(list(range(200))),
    TokenizedDocument([7]),
]
KEPT = [document for document in DOCUMENTS if document.ids]


def read(corpus: Corpus) -> list[TokenizedDocument]:
    return [TokenizedDocument(corpus.ids(i), int(corpus.prompts[i])) for i in range(len(corpus))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus", DOCUMENTS, TOKENIZER, shard_tokens=5)
    return tmp_path / "corpus"


def test_documents_are_read_as_they_were_written(folder: Path) -> None:
    corpus = open_corpus(folder, TOKENIZER)
    assert is_corpus(folder)
    assert len(corpus.shards) == 3
    assert read(corpus) == KEPT
    assert corpus.tokens == 206
    assert corpus.lengths.tolist() == [3, 2, 200, 1]


@given(st.lists(st.lists(st.integers(0, 65535), max_size=9), max_size=9))
def test_a_corpus_in_memory_reads_the_same(documents: list[list[int]]) -> None:
    corpus = corpus_in_memory(map(TokenizedDocument, documents))
    assert [document.ids for document in read(corpus)] == [ids for ids in documents if ids]


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path: Path) -> None:
    entries = byte_tokenizer(*SPECIALS)
    entries.add_tokens([f"token{i}" for i in range(2**16)])
    large = [TokenizedDocument([2**16 + 5])]
    write_corpus(tmp_path / "corpus", large, Tokenizer(entries))
    assert read(open_corpus(tmp_path / "corpus")) == large
    assert (tmp_path / "corpus" / shard_name(0)).stat().st_size == 4


def test_a_changed_byte_is_found_when_its_document_is_read(folder: Path) -> None:
    data = bytearray((folder / shard_name(1)).read_bytes())
    data[100] ^= 1
    (folder / shard_name(1)).write_bytes(data)
    corpus = open_corpus(folder, TOKENIZER)
    assert corpus.ids(0) == [1, 2, 3]
    with pytest.raises(InputError, match=r"tokens-00001.bin is damaged at document 2"):
        corpus.ids(2)


@pytest.mark.parametrize("name", [shard_name(0), DOCUMENTS_FILE])
def test_a_file_that_is_cut_off_or_missing_is_named(folder: Path, name: str) -> None:
    file = folder / name
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(InputError, match=f"{name} has {len(data) - 1} bytes"):
        open_corpus(folder)
    file.unlink()
    with pytest.raises(InputError, match=f"{name} cannot be read"):
        open_corpus(folder)


def test_lengths_that_contradict_the_index_are_found(folder: Path) -> None:
    data = bytearray((folder / DOCUMENTS_FILE).read_bytes())
    data[0] += 1
    (folder / DOCUMENTS_FILE).write_bytes(data)
    with pytest.raises(InputError, match="documents have 207 tokens, the index says 206"):
        open_corpus(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "another"}, "is of .*another"),
        ({"version": 2}, "is of .*2"),
        ({"byteorder": "big"}, "is of .*big"),
        ({"documents": 9}, "do not add up"),
        ({"dtype": "int8"}, "do not add up"),
        ({"shards": [3]}, "do not add up"),
        ({"tokenizer": "another"}, "tokenized with another tokenizer"),
    ],
)
def test_a_foreign_or_damaged_index_is_refused(
    folder: Path, changes: dict[str, object], message: str
) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    (folder / INDEX_FILE).write_text(json.dumps(index | changes))
    with pytest.raises(InputError, match=message):
        open_corpus(folder, TOKENIZER)


def test_an_index_that_is_no_json_or_missing_is_refused(folder: Path) -> None:
    (folder / INDEX_FILE).write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        open_corpus(folder)
    (folder / INDEX_FILE).write_text("[]")
    with pytest.raises(InputError, match="this version reads"):
        open_corpus(folder)
    (folder / INDEX_FILE).unlink()
    assert not is_corpus(folder)
    with pytest.raises(InputError, match="it is no corpus"):
        open_corpus(folder)


def test_a_document_is_kept_as_bytes_only(tmp_path: Path) -> None:
    class Ids(list[int]):
        """A list that tells when it is freed."""

    made: list[weakref.ref[Ids]] = []

    def documents() -> Iterator[TokenizedDocument]:
        for i in range(100):
            ids = Ids([i] * 10)
            made.append(weakref.ref(ids))
            yield TokenizedDocument(ids)
            del ids
            assert sum(ref() is not None for ref in made) <= 1

    write_corpus(tmp_path / "corpus", documents(), TOKENIZER)
    assert len(open_corpus(tmp_path / "corpus")) == 100


def test_nothing_is_left_when_writing_fails(tmp_path: Path) -> None:
    def failing() -> object:
        yield KEPT[0]
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError):
        write_corpus(tmp_path / "corpus", failing(), TOKENIZER)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(folder: Path) -> None:
    with pytest.raises(InputError, match="exists already"):
        write_corpus(folder, DOCUMENTS, TOKENIZER)
    assert read(open_corpus(folder)) == KEPT
