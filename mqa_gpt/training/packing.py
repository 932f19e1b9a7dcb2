"""Packing: documents become one stream of tokens that is cut into windows.

The stream of a block of n windows of T tokens is

    <|endoftext|> document <|endoftext|> document ... <|endoftext|>        n T + 1 tokens

and window i is the tokens from i T to (i + 1) T inclusive: its last token, the label of the last
position, is the next one's first. So nothing is lost. Documents are of three sorts:

    left to right   runs on over the ends of windows
    infilling       is cut into pieces, each of which lies in one window, its `<|endoftext|>`
                    included: a middle is never cut off from its prefix and suffix, nor from its
                    end (Bavarian et al. 2022 call this context-level). Often a piece begins its
                    window, with nothing before `<fim_prefix>`, as prompts do
    with a prompt   lies in one window too; what is left of a window is filled with the next one
                    that fits, and padded if none does
"""

from __future__ import annotations

import bisect
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from mqa_gpt.errors import ConfigError
from mqa_gpt.tokenizer import Tokenizer
from mqa_gpt.training.infilling import InfillingConfig, rearrange

# What a token is as a label.
LEFT_TO_RIGHT, CONTEXT, MIDDLE, MASKED = range(4)

LEAST_TOKENS = 64  # less text than this is not rearranged
SLACK = 8  # tokens by which a text grows, as a rule, when it is cut into three
PROMPT_TOKENS = 3  # <prefix>, <suffix>, <middle>
LEAST_LENGTH = PROMPT_TOKENS + SLACK + 4 + 1  # with the bytes of a character and <|endoftext|>


def middle_left(kinds: Tensor) -> Tensor:
    """How much of its middle is left at each label, its `<|endoftext|>` included: the target of
    Horizon-Length Prediction (Ding et al. 2024).

    Args:
        kinds: (B, T) of labels.

    Returns:
        (B, T) float32: from 1 at the first label of a middle of n down to 1/n at its last, and 0
        at labels that are of no middle.
    """
    T = kinds.shape[1]
    position = torch.arange(T, device=kinds.device).expand_as(kinds)  # (B, T)
    is_middle = kinds == MIDDLE
    before = position.masked_fill(is_middle, -1).cummax(1).values  # last label of none
    after = position.masked_fill(is_middle, T).flip(1).cummin(1).values.flip(1)
    return ((after - position) / (after - before - 1)).masked_fill(~is_middle, 0.0)


@dataclass
class Part:
    """A document, or what of it lies in one block.

    Attributes:
        ids: its tokens, at least one.
        prompt: how many of them are a prompt, which is not learned.
        is_continued: whether its beginning lies in the block before.
        holes: what draws its holes; None leaves it left to right.
    """

    ids: list[int]
    prompt: int = 0
    is_continued: bool = False
    holes: random.Random | None = None


def require_tokens(tokenizer: Tokenizer, infilling: InfillingConfig) -> int:
    """The id of `<|endoftext|>`, once a tokenizer is known to have what packing needs.

    Raises:
        ConfigError: it has no `<|endoftext|>`, or something is to be infilled and it has not the
            control tokens.
    """
    end = tokenizer.end_of_text_id
    if end is None:
        raise ConfigError("tokenizer.source has no <|endoftext|>, which packing needs: use another")
    if infilling.is_used and tokenizer.fim is None:
        raise ConfigError(
            "data.infilling.rate is above 0, but the tokenizer has no fill-in-the-middle tokens "
            "such as <fim_prefix>: use another one, or set it to 0"
        )
    return end


class Packer:
    """Makes the streams of blocks.

    Args:
        tokenizer: one with `<|endoftext|>` and, if anything is to be infilled, its tokens.
        infilling: rates and holes.
        length: T, tokens per window.
    """

    def __init__(self, tokenizer: Tokenizer, infilling: InfillingConfig, length: int) -> None:
        end = require_tokens(tokenizer, infilling)
        self.tokenizer, self.infilling, self.length, self.end = tokenizer, infilling, length, end
        self._bytes = [
            tokenizer.decode_bytes([id_], skip_special_tokens=False)
            for id_ in range(tokenizer.vocab_size)
        ]
        self._least = min(LEAST_TOKENS, length // 2)

    def pack(self, parts: Sequence[Part], windows: int) -> tuple[Tensor, Tensor]:
        """The stream of a block.

        Args:
            parts: what it is made of, at least one, with about as many tokens as there is room for.
                What infilling and padding add displaces the last of them; if they are too short
                after all, the stream starts again with the first.
            windows: n, at least 1.

        Returns:
            ids (nT + 1,) int32, and what each is as a label, (nT + 1,) uint8.
        """
        assert parts
        size = windows * self.length + 1
        self._ids: list[int] = []
        self._kinds = bytearray()
        self._add([self.end], MASKED)
        waiting: deque[Part] = deque()
        while len(self._ids) < size:
            if not waiting:
                waiting.extend(parts)
            part = self._next(waiting)
            if part is None:
                self._add([self.end] * (self._room - 1), MASKED)
            elif part.holes is not None:
                self._add_infilling(part.ids, part.holes)
            else:
                if len(self._ids) == 1 and part.is_continued:  # no end of text before it
                    self._ids.clear()
                    self._kinds.clear()
                self._add(part.ids[: part.prompt], MASKED)
                self._add([*part.ids[part.prompt :], self.end], LEFT_TO_RIGHT)
        ids = torch.tensor(self._ids[:size], dtype=torch.int32)
        return ids, torch.frombuffer(self._kinds[:size], dtype=torch.uint8)

    def is_whole(self, tokens: int, prompt: int) -> bool:
        """Whether a document of `tokens` tokens, `prompt` of them a prompt, lies in one window."""
        return prompt > 0 and tokens < self.length

    @property
    def _room(self) -> int:
        """Tokens that fit into the window that the next one begins or continues, at least 2.

        What follows the last input of a window is its last label and begins the next window.
        """
        room = self.length - (len(self._ids) - 1) % self.length
        return room if room > 1 else self.length + 1

    def _add(self, ids: list[int], kind: int) -> None:
        self._ids += ids
        self._kinds += bytes([kind]) * len(ids)

    def _next(self, waiting: deque[Part]) -> Part | None:
        """Take out the first part that may begin here: all but those with prompts may."""
        for i, part in enumerate(waiting):
            tokens = len(part.ids)
            if not self.is_whole(tokens, part.prompt) or tokens < self._room:
                del waiting[i]
                return part
        return None

    def _add_infilling(self, ids: list[int], rng: random.Random) -> None:
        """A document in pieces, each rearranged for infilling."""
        text = _Text([self._bytes[id_] for id_ in ids])
        begin = text.begin
        while begin < text.end:
            is_rest = begin > text.begin and text.tokens_from(begin) < self._least
            if self._room < self._least or is_rest:
                begin = self._add_remnant(text, begin)
            else:
                begin = self._add_piece(text, begin, rng)

    def _add_piece(self, text: _Text, begin: int, rng: random.Random) -> int:
        """The next piece, no longer than its window has room for; returns where it ends."""
        room = self._room - 1  # its <|endoftext|> is in the window too
        tokens = room - PROMPT_TOKENS - SLACK
        if self.infilling.piece_tokens is not None:
            low, high = self.infilling.piece_tokens
            tokens = min(tokens, int(low * (high / low) ** rng.random()))
        while tokens > 0 and (end := text.cut_at_line(begin, tokens)) > begin:
            ids, middle = rearrange(text.part(begin, end), self.tokenizer, self.infilling, rng)
            if len(ids) <= room:
                self._add(ids[:middle], CONTEXT)
                self._add([*ids[middle:], self.end], MIDDLE)
                return end
            tokens -= len(ids) - room + SLACK
        return self._add_remnant(text, begin)

    def _add_remnant(self, text: _Text, begin: int) -> int:
        """What follows, left to right, to the end of the window or the text; returns where it ends.

        Where the window ends first, the `<|endoftext|>` after it is not learned.
        """
        room = self._room - 2  # so that what follows `<|endoftext|>` begins the next window
        following = text.part(begin, text.cut(begin, room + SLACK))
        ids = self.tokenizer.encode(following, special_tokens=False)[:room]
        end = begin + sum(len(self._bytes[id_]) for id_ in ids)
        while not text.is_boundary(end):
            end -= len(self._bytes[ids.pop()])
        self._add(ids, LEFT_TO_RIGHT)
        self._add([self.end], LEFT_TO_RIGHT if end == text.end else MASKED)
        return end


class _Text:
    """The bytes of a document, to be cut by numbers of its tokens.

    Attributes:
        begin, end: of its whole characters; a block may cut one, whose bytes are then left out.
    """

    def __init__(self, tokens: list[bytes]) -> None:
        self._bytes = b"".join(tokens)
        self._ends = list(accumulate(map(len, tokens)))  # byte after each token
        begin = 0
        while begin < len(self._bytes) and not self.is_boundary(begin):
            begin += 1
        self.begin = begin
        self.end = begin + len(self._bytes[begin:].decode(errors="ignore").encode())

    def part(self, begin: int, end: int) -> str:
        """The text between two boundaries."""
        return self._bytes[begin:end].decode()

    def is_boundary(self, byte: int) -> bool:
        """Whether a byte is not inside a character."""
        return byte == len(self._bytes) or self._bytes[byte] & 0xC0 != 0x80

    def tokens_from(self, begin: int) -> int:
        """How many tokens end after a byte."""
        return len(self._ends) - bisect.bisect_right(self._ends, begin)

    def cut(self, begin: int, tokens: int) -> int:
        """The last boundary within `tokens` tokens after `begin`, or the text's end."""
        last = bisect.bisect_right(self._ends, begin) + tokens - 1
        end = min(self._ends[min(last, len(self._ends) - 1)], self.end)
        while not self.is_boundary(end):
            end -= 1
        return max(begin, end)

    def cut_at_line(self, begin: int, tokens: int) -> int:
        """The same, but after the last line that ends in the second half, if there is one."""
        end = self.cut(begin, tokens)
        if end == self.end:
            return end
        return self._bytes.rfind(b"\n", (begin + end) // 2, end) + 1 or end
