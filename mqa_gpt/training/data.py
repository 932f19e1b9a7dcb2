"""The data of a run: its tokenizer, its documents as token ids, and the samples made of both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mqa_gpt.checkpoints.headers import read_config
from mqa_gpt.errors import InputError
from mqa_gpt.tokenizer import TOKENIZER_FILE, Tokenizer
from mqa_gpt.training.checks import require_tokenizer
from mqa_gpt.training.config import DATA_FOLDER, SIZES_FILE, TOKENIZER_FOLDER, RunConfig
from mqa_gpt.training.documents import Report
from mqa_gpt.training.model import model_config
from mqa_gpt.training.parallel import World, on_first
from mqa_gpt.training.prepare import held_out_documents, prepare, training_documents
from mqa_gpt.training.samples import Samples
from mqa_gpt.training.vocabulary import train_tokenizer


class Data(NamedTuple):
    """What a run reads.

    Attributes:
        tokenizer: of the run.
        training: samples of the documents that are trained on.
        held_out: samples of those that are not, or None if there are none. An evaluation reads the
            first `evaluate_samples` of them: beyond one epoch, the documents with other holes.
        report: of the documents.
    """

    tokenizer: Tokenizer
    training: Samples
    held_out: Samples | None
    report: Report


def load_data(
    config: RunConfig, out: Path, say: Callable[[str], None], ranks: World | None = None
) -> Data:
    """Make a run's tokenizer, sizes and corpora in its folder, or open what an earlier call made.

    The first rank makes them while the others wait.

    Args:
        ranks: None if there is only this process.

    Raises:
        InputError: the sources, the tokenizer or the folder cannot be used.
    """
    group = None if ranks is None else ranks.patient
    return on_first(lambda: _load(config, out, say), group) or _load(config, out, say)


def _load(config: RunConfig, out: Path, say: Callable[[str], None]) -> Data:
    save_tokenizer(config, out / TOKENIZER_FOLDER, say)
    tokenizer = Tokenizer.from_pretrained(out / TOKENIZER_FOLDER)
    sizes = out / SIZES_FILE
    if not sizes.exists():
        _write(sizes, model_config(config, tokenizer).to_json())
    require_tokenizer(config, tokenizer, read_config(out))
    corpora = prepare(config.data, tokenizer, out / DATA_FOLDER)
    for line in corpora.report.lines():
        say(line)
    training = Samples(corpora.training, tokenizer, config.data, seed=config.run.seed)
    held_out = None
    if corpora.held_out is not None:
        try:
            held_out = Samples(corpora.held_out, tokenizer, config.data, seed=config.run.seed)
        except InputError as error:
            raise InputError(f"held-out documents: {error}") from None
    if held_out is None:
        say("nothing is held out, so there is no held-out loss: see data.held_out_share")
    say(f"{len(training):,} sequences of {config.data.length:,} tokens per epoch")
    return Data(tokenizer, training, held_out, corpora.report)


def save_tokenizer(config: RunConfig, folder: Path, say: Callable[[str], None]) -> None:
    """Have a run's tokenizer in a folder: a copy of an existing one, or one that is trained."""
    file = folder / TOKENIZER_FILE
    if file.exists():
        return
    source = config.tokenizer.source or config.model.pretrained
    if source is not None:
        text = Tokenizer.from_pretrained(source).to_json()
    else:
        say("training the tokenizer")
        documents = training_documents(config.data, held_out_documents(config.data), Report())
        texts = (document.prompt + document.text for document in documents)
        text = train_tokenizer(texts, config.tokenizer.vocab_size).to_str()
    folder.mkdir(parents=True, exist_ok=True)
    _write(file, text)


def _write(file: Path, text: str) -> None:
    temporary = file.with_suffix(".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)
