"""Tokenizer: text to ids and back, with the control tokens looked up by name.

The work is done by Hugging Face's `tokenizers`. What is added here is the difference between text
that may hold control tokens (a raw prompt) and text that may not (what a user wants infilled),
and decoding piece by piece.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable
from os import PathLike
from typing import NamedTuple

import tokenizers

from mqa_gpt.checkpoints.hub import resolve
from mqa_gpt.errors import CheckpointError, PromptError

TOKENIZER_FILE = "tokenizer.json"

END_OF_TEXT = "<|endoftext|>"

# prefix, suffix, middle, pad, as StarCoder and as SantaCoder spell them
FIM_SPELLINGS = (
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<fim_pad>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>", "<fim-pad>"),
)

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class FimTokens(NamedTuple):
    """Ids of the control tokens of fill-in-the-middle; only `pad` may be missing."""

    prefix: int
    suffix: int
    middle: int
    pad: int | None


class Tokenizer:
    """Text to token ids and back; never adds a token that is not in the text.

    Attributes:
        vocab_size: entries, control tokens included.
        special_ids: ids of the control tokens.
        end_of_text_id: id of `<|endoftext|>`, or None.
        fim: ids of the fill-in-the-middle tokens, or None where the tokenizer has none.

    Args:
        tokenizer: what does the work; its truncation and padding are switched off.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = False
        self._tokenizer = tokenizer
        # The same vocabulary without any added token: nothing in a text can become one.
        self._plain = tokenizers.Tokenizer(tokenizer.model)
        if tokenizer.normalizer is not None:
            self._plain.normalizer = tokenizer.normalizer
        if tokenizer.pre_tokenizer is not None:
            self._plain.pre_tokenizer = tokenizer.pre_tokenizer

        added = tokenizer.get_added_tokens_decoder()
        control_names = {END_OF_TEXT, *(name for names in FIM_SPELLINGS for name in names)}
        self.special_ids = frozenset(
            id_ for id_, token in added.items() if token.special or token.content in control_names
        )
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self.end_of_text_id = self.control_id(END_OF_TEXT)
        self.fim = self._find_fim()

    @classmethod
    def from_pretrained(
        cls, name_or_dir: str | PathLike[str], *, revision: str | None = None
    ) -> Tokenizer:
        """Load `tokenizer.json` from a hub name or a folder.

        Raises:
            CheckpointError: there is none, or it cannot be read; names the file.
        """
        path = resolve(name_or_dir, revision) / TOKENIZER_FILE
        if not path.is_file():
            raise CheckpointError(
                f"{path.parent} holds no {TOKENIZER_FILE}: copy it there from the checkpoint this "
                "model came from, or convert its tokenizer with transformers"
            )
        try:
            return cls(_parse(path.read_text("utf-8")))
        except Exception as error:  # tokenizers raises nothing narrower
            raise CheckpointError(
                f"{path} is not a tokenizer that can be used ({error}): download it again, or run "
                "`git lfs pull` if the folder is a git clone"
            ) from error

    def to_json(self) -> str:
        """What `tokenizer.json` holds, for `from_pretrained` and for transformers."""
        text: str = self._tokenizer.to_str(pretty=True)
        return text

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """The ids of a text; nothing is put before or after them.

        Args:
            text: any text that UTF-8 can express.
            special_tokens: True reads `<fim_prefix>`, `<|endoftext|>` and so on in `text` as
                control tokens; False reads everything as plain text.

        Raises:
            PromptError: `text` is not a str, or holds a lone surrogate.
            CheckpointError: the vocabulary itself turns this plain text into a control token.
        """
        if not isinstance(text, str):
            raise PromptError(f"text is {type(text).__name__}: it must be a str")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"text holds a lone surrogate (U+{ord(text[error.start]):04X}) at character "
                f"{error.start}: it cannot be written as UTF-8; remove or replace it"
            ) from None
        if special_tokens:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
            return ids
        ids = self._plain.encode(text, add_special_tokens=False).ids
        if not self.special_ids.isdisjoint(ids):
            id_ = next(id_ for id_ in ids if id_ in self.special_ids)
            raise CheckpointError(
                f"this tokenizer makes the control token {self.id_to_token(id_)!r} out of plain "
                "text: its merges are damaged; use the tokenizer.json of the original checkpoint"
            )
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD, ids without an entry nothing.

        Args:
            ids: token ids, 0 or more.
            skip_special_tokens: leave control tokens out.

        Raises:
            PromptError: an id is negative or not an integer.
        """
        try:
            ids = [operator.index(id_) for id_ in ids]
        except TypeError as error:
            raise PromptError(f"ids must be integers: {error}") from None
        if ids and min(ids) < 0:
            raise PromptError(f"ids hold {min(ids)}: a token id is 0 or more")
        if skip_special_tokens:
            ids = [id_ for id_ in ids if id_ not in self.special_ids]
        # An id beyond the vocabulary is a row of padding in the embedding: it has no text.
        ids = [id_ for id_ in ids if id_ < 2**32]
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def token_id(self, name: str) -> int | None:
        """The id of a vocabulary entry by its exact name, or None."""
        id_: int | None = self._tokenizer.token_to_id(name)
        return id_

    def id_to_token(self, id_: int) -> str | None:
        """The vocabulary entry of an id as it is stored (bytes in GPT-2's letters), or None."""
        name: str | None = self._tokenizer.id_to_token(id_)
        return name

    def control_id(self, name: str) -> int | None:
        """The id of a control token by its name, or None."""
        id_ = self.token_id(name)
        return id_ if id_ in self.special_ids else None

    def _find_fim(self) -> FimTokens | None:
        for names in FIM_SPELLINGS:
            prefix, suffix, middle, pad = map(self.control_id, names)
            if prefix is not None and suffix is not None and middle is not None:
                return FimTokens(prefix, suffix, middle, pad)
        return None


class StreamDecoder:
    """Decodes one token after the other; the pieces add up to `decode` of all of them.

    Text is handed out as soon as it is final: a character whose bytes are spread over several
    tokens comes with the last of them. Control tokens are left out.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []  # tokens since the last border between characters
        self._shown = 0  # characters of their text that were handed out

    def push(self, token_id: int) -> str:
        """The text that became final with this token, often all of it, sometimes "".

        Raises:
            PromptError: the id is negative or not an integer.
        """
        text = self._tokenizer.decode([*self._pending, token_id])
        self._pending.append(token_id)
        # An unfinished character decodes to one U+FFFD at the very end; what is before is final.
        end = len(text) - text.endswith(REPLACEMENT)
        piece = text[self._shown : end]
        self._shown = end
        if end == len(text):
            self._pending, self._shown = [], 0
        return piece

    def flush(self) -> str:
        """What is left when no token follows: "", or U+FFFD for a character cut in the middle."""
        piece = self._tokenizer.decode(self._pending)[self._shown :]
        self._pending, self._shown = [], 0
        return piece


def _parse(text: str) -> tokenizers.Tokenizer:
    """The tokenizer that a tokenizer.json describes, or some exception."""
    model = json.loads(text)["model"]
    # tokenizers 0.23 does not raise but abort the process where merges do not carry this prefix;
    # byte-level BPE has none.
    if model.get("continuing_subword_prefix"):
        raise ValueError("its model has a continuing_subword_prefix")
    return tokenizers.Tokenizer.from_str(text)
