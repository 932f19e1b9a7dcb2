"""The tokenizer of a run: an existing one, or one trained on the run's own documents."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from mqa_gpt.errors import ConfigError, require_int

# StarCoder's control tokens, in its order: ids 0 to 18.
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<fim_prefix>",
    "<fim_middle>",
    "<fim_suffix>",
    "<fim_pad>",
    "<filename>",
    "<gh_stars>",
    "<issue_start>",
    "<issue_comment>",
    "<issue_closed>",
    "<jupyter_start>",
    "<jupyter_text>",
    "<jupyter_code>",
    "<jupyter_output>",
    "<empty_output>",
    "<commit_before>",
    "<commit_msg>",
    "<commit_after>",
    "<reponame>",
]
LEAST_SIZE = len(SPECIAL_TOKENS) + 256  # every byte has a token of its own


@dataclass(frozen=True)
class TokenizerConfig:
    """The section `[tokenizer]`.

    Attributes:
        source: a hub name or folder to take it from. None takes the one of `model.pretrained`, or
            trains one on the training documents.
        vocab_size: of one that is trained.
    """

    source: str | None = None
    vocab_size: int = 4096

    def __post_init__(self) -> None:
        require_int(ConfigError, "vocab_size", self.vocab_size, LEAST_SIZE)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE as StarCoder's: control tokens first, every digit a token of its own.

    Args:
        texts: the training documents.
        vocab_size: entries at most; few texts yield fewer.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
