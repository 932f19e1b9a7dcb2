"""From sources to corpora: what is held out, what repeats it, and tokenizing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from mqa_gpt.checkpoints.files import read_json
from mqa_gpt.errors import InputError, PromptError
from mqa_gpt.progress import status
from mqa_gpt.tokenizer import Tokenizer
from mqa_gpt.training.documents import Document, Report, SourceConfig, fits, read_documents
from mqa_gpt.training.shards import (
    HELD_OUT,
    TRAINING,
    Corpus,
    TokenizedDocument,
    is_corpus,
    is_prepared,
    open_corpus,
    write_corpus,
    written_at_once,
)

LONG_LINE = 20  # characters; shorter lines are common to all files
BATCH_CHARACTERS = 2**22  # that are tokenized at a time
REPORT_FILE = "report.json"


class Corpora(NamedTuple):
    """A run's data.

    Attributes:
        training: what is learned.
        held_out: what is kept for measuring, or None if nothing is.
        report: what was read and left out when they were written.
    """

    training: Corpus
    held_out: Corpus | None
    report: Report


def prepare(config: SourceConfig, tokenizer: Tokenizer, folder: str | PathLike[str]) -> Corpora:
    """Read and tokenize a run's documents, or open what an earlier call has left in `folder`.

    A resumed run reads the same data even if the sources have changed since. If `config.sources` is
    one folder that this function has written before, it is opened where it is, whatever the other
    settings are.

    Args:
        folder: where the corpora go.

    Raises:
        InputError: a source cannot be used, nothing is left of the sources, or the corpora in
            `folder` are damaged or of another tokenizer.
    """
    folder = Path(folder)
    if len(config.sources) == 1 and is_prepared(Path(config.sources[0])):
        folder = Path(config.sources[0])
    if not is_prepared(folder):
        _write(config, tokenizer, folder)
    held_out, report = folder / HELD_OUT, folder / REPORT_FILE
    try:
        read = Report(**read_json(report, InputError))
    except TypeError as error:
        raise InputError(f"{report} is damaged ({error}): prepare the data again") from None
    return Corpora(
        training=open_corpus(folder / TRAINING, tokenizer),
        held_out=open_corpus(held_out, tokenizer) if is_corpus(held_out) else None,
        report=read,
    )


def held_out_documents(config: SourceConfig) -> list[Document]:
    """The documents that are kept from training."""
    if not config.held_out and not config.held_out_share:
        return []
    return [d for d in read_documents(config, Report()) if is_held_out(d.name, config)]


def is_held_out(name: str, config: SourceConfig) -> bool:
    """Whether a document of this name is kept from training."""
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).digest()
    drawn = int.from_bytes(digest[:8], "little") / 2**64
    return fits(name, config.held_out) or drawn < config.held_out_share


def training_documents(
    config: SourceConfig, held_out: Iterable[Document], report: Report
) -> Iterator[Document]:
    """The documents to train on: those that are not held out and do not repeat one that is.

    Args:
        held_out: what `held_out_documents` gives.
        report: is counted in.
    """
    held_out_lines: set[str] = set()
    seen = set()
    for document in held_out:
        held_out_lines |= _long_lines(document.text)
        seen.add(_digest(document))
    for document in read_documents(config, report):
        digest = _digest(document)
        lines = _long_lines(document.text) if held_out_lines else set()
        if is_held_out(document.name, config):
            report.leave_out(document.name, "held out")
        elif digest in seen and not config.duplicates:
            report.leave_out(document.name, "read already")
        elif len(lines & held_out_lines) > config.held_out_overlap * len(lines):
            report.leave_out(document.name, "repeats held-out documents")
        else:
            seen.add(digest)
            report.documents += 1
            report.characters += len(document.text)
            yield document


def tokenize(
    documents: Iterable[Document], tokenizer: Tokenizer, report: Report
) -> Iterator[TokenizedDocument]:
    """The ids of documents. Texts are plain text; prompts may hold control tokens, as those of
    `mqa-gpt generate` may.

    Args:
        report: counts those that the tokenizer cannot express.
    """
    for batch in _batches(documents):
        try:
            ids_of_texts = tokenizer.encode_batch(document.text for document in batch)
            prompts = [tokenizer.encode(document.prompt) for document in batch]
        except PromptError:  # of one of them
            if len(batch) > 1:
                for document in batch:
                    yield from tokenize([document], tokenizer, report)
            else:
                report.leave_out(batch[0].name, "cannot be tokenized")
            continue
        for prompt, ids in zip(prompts, ids_of_texts, strict=True):
            yield TokenizedDocument(prompt + ids, len(prompt))


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in groups that keep all cores busy."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _write(config: SourceConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """Both corpora and the report."""
    report = Report()
    with status() as say, written_at_once(folder) as temporary:
        say("looking for held-out documents")
        held_out = held_out_documents(config)
        if held_out:
            write_corpus(temporary / HELD_OUT, tokenize(held_out, tokenizer, report), tokenizer)

        def counted() -> Iterator[Document]:
            for document in training_documents(config, held_out, report):
                say(f"tokenizing: {report.documents:,} documents")
                yield document

        write_corpus(temporary / TRAINING, tokenize(counted(), tokenizer, report), tokenizer)
        if not report.documents:
            what = "; ".join(report.lines()[1:]) or "data.sources is empty"
            raise InputError(f"there are no documents to train on: {what}")
        values = json.dumps(dataclasses.asdict(report), indent=2)
        (temporary / REPORT_FILE).write_text(values + "\n", encoding="utf-8")


def _long_lines(text: str) -> set[str]:
    return {line for line in map(str.strip, text.splitlines()) if len(line) >= LONG_LINE}


def _digest(document: Document) -> bytes:
    text = f"{document.prompt}\0{document.text}"
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
