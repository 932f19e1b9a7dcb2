"""Tokenized documents: in memory, or on disk as memory-mapped shards with an index.

A corpus on disk is a folder:

    index.json             format, version, the tokenizer's fingerprint, the type of a token, the
                           shards' names with their numbers of documents and tokens
    documents.bin          for each document its length in tokens, how many of them are a prompt,
                           and the CRC-32 of its bytes in the shard: three uint32
    tokens-00000.bin ...   the documents' tokens one after another: uint16, or uint32 if the
                           vocabulary has more than 65,536 entries

Numbers are in the byte order that the index names. No document is spread over two shards. Sizes are
compared with the index when a corpus is opened, checksums when a document is read. A folder is
written under another name and renamed when it is complete.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import mmap
import os
import shutil
import sys
import zlib
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mqa_gpt.errors import InputError, shown
from mqa_gpt.tokenizer import Tokenizer

FORMAT, VERSION = "mqa-gpt token shards", 1
TRAINING, HELD_OUT = "training", "held-out"  # a run's corpora
INDEX_FILE, DOCUMENTS_FILE = "index.json", "documents.bin"
SHARD_TOKENS = 2**27  # 256 MiB at two bytes a token
WIDTHS: dict[str, Literal["H", "I"]] = {"uint16": "H", "uint32": "I"}  # of `array` and `memoryview`


class TokenizedDocument(NamedTuple):
    """One document's ids, of which the first `prompt` are a prompt that is not to be learned."""

    ids: list[int]
    prompt: int = 0


@dataclass
class Corpus:
    """Documents as token ids, to be read in any order.

    Attributes:
        lengths: (documents,) int64 tokens of each.
        prompts: (documents,) int64, how many of them are its prompt.
        checksums: CRC-32 of each document's bytes.
        shards: the tokens, as memoryviews of uint16 or uint32.
        firsts: number of each shard's first document.
        folder: where it lies, or None for one in memory.
    """

    lengths: Tensor
    prompts: Tensor
    checksums: array[int]
    shards: list[memoryview]
    firsts: list[int]
    folder: Path | None = None

    def __post_init__(self) -> None:
        self.starts = self.lengths.cumsum(0) - self.lengths  # (documents,) int64

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Of all documents."""
        return int(self.lengths.sum())

    def ids(self, document: int) -> list[int]:
        """The ids of a document.

        Raises:
            InputError: its bytes on disk are not those that were written.
        """
        shard = bisect.bisect_right(self.firsts, document) - 1
        start = int(self.starts[document] - self.starts[self.firsts[shard]])
        view = self.shards[shard][start : start + int(self.lengths[document])]
        if self.folder is not None and zlib.crc32(view.cast("B")) != self.checksums[document]:
            raise InputError(
                f"{self.folder / shard_name(shard)} is damaged at document {document}: its "
                "checksum is wrong; write the corpus again"
            )
        return view.tolist()


def corpus_in_memory(documents: Iterable[TokenizedDocument]) -> Corpus:
    """A corpus that fits in memory; documents without tokens are left out."""
    tokens, records = array("I"), array("I")
    for document in documents:
        if document.ids:
            tokens.extend(document.ids)
            records.extend((len(document.ids), document.prompt, 0))
    return Corpus(*_columns(records), [memoryview(tokens)], [0])


def write_corpus(
    folder: str | PathLike[str],
    documents: Iterable[TokenizedDocument],
    tokenizer: Tokenizer,
    *,
    shard_tokens: int = SHARD_TOKENS,
) -> None:
    """Write documents as shards.

    Args:
        folder: of the corpus, which must not exist or be empty.
        documents: those without tokens are left out.
        tokenizer: whose ids they are.
        shard_tokens: about how many a file holds.

    Raises:
        InputError: `folder` exists and is not empty.
        OSError: it cannot be written; nothing is left of it.
    """
    type_name = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    records, tokens = array("I"), array(WIDTHS[type_name])
    shards: list[dict[str, Any]] = []
    written = 0  # documents in earlier shards

    def flush(folder: Path) -> None:
        nonlocal written
        documents = len(records) // 3
        shard = {"documents": documents - written, "tokens": len(tokens)}
        shards.append({"file": shard_name(len(shards)), **shard})
        _write(folder / shards[-1]["file"], tokens)
        del tokens[:]
        written = documents

    with written_at_once(Path(folder)) as temporary:
        for document in documents:
            if document.ids:
                part = array(WIDTHS[type_name], document.ids)
                records.extend((len(part), document.prompt, zlib.crc32(part)))
                tokens.extend(part)
            if len(tokens) >= shard_tokens:
                flush(temporary)
        if tokens:
            flush(temporary)
        _write(temporary / DOCUMENTS_FILE, records)
        index = {
            "format": FORMAT,
            "version": VERSION,
            "byteorder": sys.byteorder,
            "tokenizer": fingerprint(tokenizer),
            "dtype": type_name,
            "documents": written,
            "tokens": sum(shard["tokens"] for shard in shards),
            "shards": shards,
        }
        _write(temporary / INDEX_FILE, (json.dumps(index, indent=2) + "\n").encode())


@contextmanager
def written_at_once(folder: Path) -> Iterator[Path]:
    """A new folder to write to, which takes the name of `folder` if the block succeeds.

    Raises:
        InputError: `folder` exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists already: remove it, or name another folder")
    temporary = folder.with_name(f".unfinished-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def open_corpus(folder: str | PathLike[str], tokenizer: Tokenizer | None = None) -> Corpus:
    """Map the shards of a corpus into memory.

    Args:
        folder: as `write_corpus` left it.
        tokenizer: the one that will read the ids, to be compared with the one that made them.

    Raises:
        InputError: no corpus of this version and byte order, of another tokenizer, or of files
            whose sizes contradict the index; names the file.
    """
    folder = Path(folder)
    index = _read_index(folder / INDEX_FILE)
    if tokenizer is not None and index["tokenizer"] != fingerprint(tokenizer):
        raise InputError(
            f"{folder} was tokenized with another tokenizer: write it again with this one"
        )
    letter = WIDTHS[index["dtype"]]
    records = array("I")
    records.frombytes(_map(folder / DOCUMENTS_FILE, 12 * index["documents"]))
    width = array(letter).itemsize
    shards = [
        _map(folder / shard_name(i), width * shard["tokens"]).cast(letter)
        for i, shard in enumerate(index["shards"])
    ]
    firsts = list(accumulate((shard["documents"] for shard in index["shards"]), initial=0))[:-1]
    corpus = Corpus(*_columns(records), shards, firsts, folder)
    if corpus.tokens != index["tokens"]:
        raise InputError(
            f"{folder / DOCUMENTS_FILE} is damaged: its documents have {corpus.tokens:,} tokens, "
            f"the index says {index['tokens']:,}; write the corpus again"
        )
    return corpus


def is_corpus(folder: Path) -> bool:
    """Whether a folder looks like one that `write_corpus` made."""
    return (folder / INDEX_FILE).is_file() and (folder / DOCUMENTS_FILE).is_file()


def is_prepared(folder: Path) -> bool:
    """Whether a folder looks like one that `mqa_gpt.training.prepare.prepare` made."""
    return is_corpus(folder / TRAINING)


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"tokens-{number:05d}.bin"


def fingerprint(tokenizer: Tokenizer) -> str:
    """What tells a tokenizer from every other one."""
    return hashlib.sha256(tokenizer.to_json().encode()).hexdigest()


def _columns(records: array[int]) -> tuple[Tensor, Tensor, array[int]]:
    """Lengths and prompts, int64, and checksums of the documents."""
    if not records:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), records
    table = torch.frombuffer(records, dtype=torch.int32).view(-1, 3)  # (documents, 3)
    return table[:, 0].long(), table[:, 1].long(), records[2::3]


def _read_index(file: Path) -> dict[str, Any]:
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): it is no corpus") from None
    except ValueError as error:
        raise InputError(f"{file} is not JSON ({error}): write the corpus again") from None
    expected = {"format": FORMAT, "version": VERSION, "byteorder": sys.byteorder}
    found = {key: index.get(key) for key in expected} if isinstance(index, dict) else index
    if found != expected:
        raise InputError(f"{file} is of {shown(found)}: this version reads {shown(expected)}")
    try:
        sums = [sum(s[key] for s in index["shards"]) for key in ("documents", "tokens")]
        is_sound = sums == [index["documents"], index["tokens"]] and index["dtype"] in WIDTHS
        is_sound = is_sound and isinstance(index["tokenizer"], str)
    except (KeyError, TypeError):
        is_sound = False
    if not is_sound:
        raise InputError(f"{file} is damaged: its numbers do not add up; write the corpus again")
    return index


def _map(file: Path, size: int) -> memoryview:
    """A file of a known size as read-only memory."""
    try:
        with file.open("rb") as opened:
            found = os.fstat(opened.fileno()).st_size
            if found == size and size:
                return memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror})") from None
    if found != size:
        raise InputError(
            f"{file} has {found:,} bytes, the index says {size:,}: write the corpus again"
        )
    return memoryview(b"")


def _write(file: Path, data: bytes | array[int]) -> None:
    with file.open("wb") as opened:
        opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())
