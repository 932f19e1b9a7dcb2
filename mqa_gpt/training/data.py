"""The data of a run: its documents, its tokenizer, and the samples made of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mqa_gpt.tokenizer import Tokenizer
from mqa_gpt.training.config import RunConfig
from mqa_gpt.training.samples import Samples
from mqa_gpt.training.shards import TokenizedDocument, corpus_in_memory
from mqa_gpt.training.vocabulary import train_tokenizer

TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True)
class Data:
    """What a run reads.

    Attributes:
        tokenizer: of the run.
        training: samples of the documents that are trained on.
        held_out: samples of the others, or None if all are trained on.
    """

    tokenizer: Tokenizer
    training: Samples
    held_out: Samples | None


def load_data(config: RunConfig, out: Path, say: Callable[[str], None]) -> Data:
    """Read and tokenize a run's documents."""
    texts = [
        path.read_text()
        for source in config.data.sources
        for path in sorted(Path(source).rglob("*.py"))
    ]
    held = texts[::10]
    texts = [t for i, t in enumerate(texts) if i % 10]
    folder = out / TOKENIZER_FOLDER
    if not (folder / "tokenizer.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        train_tokenizer(texts, config.tokenizer.vocab_size).save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_pretrained(folder)

    def samples(texts: list[str]) -> Samples:
        documents = (
            TokenizedDocument(tokenizer.encode(text, special_tokens=False)) for text in texts
        )
        return Samples(corpus_in_memory(documents), tokenizer, config.data, seed=config.run.seed)

    return Data(tokenizer, samples(texts), samples(held))
