"""Tokenizer: text to token ids and back, one byte-level BPE vocabulary with control tokens.

Byte-level BPE (GPT-2, Radford et al. 2019) sees a text as UTF-8 bytes, so its 256 smallest entries
can write any text; merges join frequent neighbours into longer entries. A vocabulary file must be
text itself, so it writes each byte as a printable letter: "Ġ" is a space, "Ċ" a line feed.

Hugging Face's `tokenizers` does the splitting and merging. What is added here is the difference
between text that may hold control tokens (a raw prompt) and text that may not (what a user wants
infilled), and decoding token by token.
"""

from __future__ import annotations

import codecs
import operator
import re
from collections.abc import Iterable
from functools import cached_property
from os import PathLike
from typing import NamedTuple

import tokenizers

from mqa_gpt.errors import CheckpointError, InputError, PromptError, require_text, shown

TOKENIZER_FILE = "tokenizer.json"

END_OF_TEXT = "<|endoftext|>"

# prefix, suffix, middle, pad, as StarCoder and as SantaCoder spell them
FIM_SPELLINGS = (
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<fim_pad>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>", "<fim-pad>"),
)

# StarCoder's documents may begin with where they come from.
REPO_NAME, FILE_NAME, STARS = "<reponame>", "<filename>", "<gh_stars>"

CONTROL_NAMES = {END_OF_TEXT, *FIM_SPELLINGS[0], *FIM_SPELLINGS[1], REPO_NAME, FILE_NAME, STARS}

# How control tokens of this family and of chat models are spelled.
MARKER = re.compile(r"<\|\w+\|>|<fim[-_](?:prefix|suffix|middle|pad)>")


def _byte_of_letter() -> dict[str, int]:
    """GPT-2's letters: printable bytes as in Latin-1, the others from U+0100 on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF_LETTER = _byte_of_letter()


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
        special_ids: ids of the control tokens; any of them ends an infilled text.
        end_of_text_id: id of `<|endoftext|>`, or None.
        fim: ids of the fill-in-the-middle tokens, or None if the tokenizer has none.

    Args:
        tokenizer: a byte-level BPE; its truncation and padding are switched off.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        if not isinstance(tokenizer, tokenizers.Tokenizer):
            raise InputError(f"tokenizer is {shown(tokenizer)}: it must be a tokenizers.Tokenizer")
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
        self.special_ids = frozenset(
            id_ for id_, token in added.items() if token.special or token.content in CONTROL_NAMES
        )
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self.end_of_text_id = self.control_id(END_OF_TEXT)
        self.fim = self._find_fim()
        self._bytes = _TokenBytes(tokenizer)
        # StarCoder's has no entry for 0xF1, which begins planes 4 to 7 of Unicode, all unassigned.
        self._missing = bytes(
            b for letter, b in BYTE_OF_LETTER.items() if self.token_id(letter) is None
        )

    @classmethod
    def from_pretrained(
        cls, name_or_dir: str | PathLike[str], *, revision: str | None = None
    ) -> Tokenizer:
        """Load `tokenizer.json`, or else `vocab.json` and `merges.txt`, of a hub name or a folder.

        Raises:
            CheckpointError: the files are missing, damaged, or describe a tokenizer of another
                family; names the file.
        """
        from mqa_gpt.checkpoints.hub import resolve
        from mqa_gpt.checkpoints.tokenizer_files import load_tokenizer

        return cls(load_tokenizer(resolve(name_or_dir, revision)))

    def to_json(self) -> str:
        """The contents of a `tokenizer.json`, for `from_pretrained` and for transformers."""
        text: str = self._tokenizer.to_str(pretty=True)
        return text

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """The ids of a text; nothing is put before or after them.

        Args:
            text: any text that UTF-8 can express.
            special_tokens: True reads `<fim_prefix>`, `<|endoftext|>` and so on in `text` as
                control tokens; False reads everything as plain text.

        Raises:
            PromptError: `text` is not a str, or holds a lone surrogate or a character that the
                vocabulary cannot express.
            CheckpointError: the vocabulary itself turns this plain text into a control token.
        """
        require_text("text", text)
        self._require_bytes(text)
        if special_tokens:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
            return ids
        return self._require_plain(self._plain.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """The ids of several texts, all of them plain text, tokenized on all cores.

        Raises:
            PromptError, CheckpointError: as `encode`, for any of them.
        """
        texts = list(texts)
        for text in texts:
            require_text("text", text)
            self._require_bytes(text)
        encodings = self._plain.encode_batch_fast(texts, add_special_tokens=False)
        return [self._require_plain(encoding.ids) for encoding in encodings]

    def min_tokens(self, text: str) -> int:
        """A lower bound on the number of tokens in a text, without tokenizing it.

        For a text that may be far too long: tokenizing 10 MB takes seconds and gigabytes.

        Raises:
            PromptError: `text` is not a str, or holds a lone surrogate.
        """
        require_text("text", text)
        return -(-len(text.encode()) // self.max_token_bytes)

    @cached_property
    def max_token_bytes(self) -> int:
        """The longest piece of text that one token can stand for, in bytes of UTF-8."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        lengths = [len(token.content.encode()) for token in added]
        lengths += map(len, self._tokenizer.get_vocab(with_added_tokens=False))  # letters are bytes
        # NFC composes up to nine bytes, those of a Hangul syllable's parts, into three.
        composing = 1 if self._tokenizer.normalizer is None else 3
        return composing * max(lengths, default=1)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids: `decode_bytes`, where bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids, skip_special_tokens=skip_special_tokens).decode(
            errors="replace"
        )

    def decode_bytes(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> bytes:
        """The bytes that ids stand for; an id without an entry stands for none.

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
            raise PromptError(f"ids hold {shown(min(ids))}: a token id is 0 or more")
        if skip_special_tokens:
            ids = [id_ for id_ in ids if id_ not in self.special_ids]
        return b"".join(map(self._bytes.__getitem__, ids))

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

    def unknown_markers(self, text: str) -> list[str]:
        """Control tokens spelled in a text that are plain text here, such as `<|im_start|>`.

        They are another model's: `<fim-prefix>` for StarCoder, chat markers for a base model.
        """
        names = dict.fromkeys(MARKER.findall(text))
        return [name for name in names if self.control_id(name) is None]

    def same_vocabulary(self, other: Tokenizer) -> bool:
        """Whether every id means the same to both: the same entry, control token or not."""
        return (
            self.special_ids == other.special_ids
            and self._tokenizer.get_vocab() == other._tokenizer.get_vocab()
        )

    def _require_plain(self, ids: list[int]) -> list[int]:
        """The ids of plain text, or CheckpointError if one of them is a control token."""
        if not self.special_ids.isdisjoint(ids):
            id_ = next(id_ for id_ in ids if id_ in self.special_ids)
            raise CheckpointError(
                f"this tokenizer makes the control token {shown(self.id_to_token(id_))} out of "
                "plain text: its merges are damaged; use the tokenizer.json of the original "
                "checkpoint"
            )
        return ids

    def _require_bytes(self, text: str) -> None:
        """Raise PromptError if a byte of the text has no entry: it would be left out silently."""
        data = text.encode()
        if len(data.translate(None, self._missing)) < len(data):
            lost = next(letter for letter in text if set(letter.encode()) & set(self._missing))
            raise PromptError(
                f"text holds U+{ord(lost):04X}, which this tokenizer cannot express: remove or "
                "replace it"
            )

    def _find_fim(self) -> FimTokens | None:
        for names in FIM_SPELLINGS:
            prefix, suffix, middle, pad = map(self.control_id, names)
            if prefix is not None and suffix is not None and middle is not None:
                return FimTokens(prefix, suffix, middle, pad)
        return None


class _TokenBytes(dict[int, bytes]):
    """The bytes of each token, looked up the first time they are needed."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __missing__(self, id_: int) -> bytes:
        entry = self._tokenizer.id_to_token(id_) if id_ < 2**32 else None
        if entry is None:  # a padding row of the embedding: it has no text
            return b""
        try:
            self[id_] = bytes(BYTE_OF_LETTER[letter] for letter in entry)
        except KeyError:  # an added token, stored as plain text
            self[id_] = entry.encode()
        return self[id_]


class StreamDecoder:
    """Decodes token by token; the pieces add up to `decode` of all of them.

    Text is handed out as soon as it is final. UTF-8 spreads a character over up to four bytes, so
    at most three bytes wait for the next token. Control tokens are left out.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that became final with this token, often all of it, sometimes "".

        Raises:
            PromptError: the id is negative or not an integer.
        """
        return self._utf8.decode(self._tokenizer.decode_bytes([token_id]))

    def flush(self) -> str:
        """What is left when no token follows: "", or U+FFFD for a character cut in the middle."""
        return self._utf8.decode(b"", final=True)
