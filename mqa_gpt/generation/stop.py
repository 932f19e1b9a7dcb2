"""From a row's tokens to its text, and the stop strings that end it."""

from __future__ import annotations

from mqa_gpt.generation.request import Request
from mqa_gpt.tokenizer import StreamDecoder, Tokenizer


class RowText:
    """The text of one continuation as its tokens come, up to the first stop string.

    A stop string may span tokens, so text that may turn out to begin one is held back until it is
    decided (`take`).

    Attributes:
        text: all of it that is final, without the stop string that ended it.
        is_stopped: whether a stop string was completed.
    """

    def __init__(self, tokenizer: Tokenizer, request: Request) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stops, self._min_tokens = request.stop, request.min_new_tokens
        self._longest = max(map(len, self._stops), default=0)
        self._tokens = self._taken = 0  # tokens pushed, characters handed out
        self._searched_from = 0  # stop strings may not begin before this character
        self.text = ""
        self.is_stopped = False

    def push(self, token_id: int) -> None:
        """Take one token; its text is searched for stop strings."""
        # No stop string that is complete only now can begin before this.
        begin = max(self._searched_from, len(self.text) - self._longest + 1)
        self.text += self._decoder.push(token_id)
        self._tokens += 1
        if self._tokens <= self._min_tokens:
            self._searched_from = len(self.text)
            return
        found = [at for stop in self._stops if (at := self.text.find(stop, begin)) >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.is_stopped = True

    def finish(self) -> None:
        """End the row: bytes that never became a character are shown as U+FFFD."""
        self.text += self._decoder.flush()
        self._stops = ()

    def take(self) -> str:
        """New final text, holding back a suffix that could begin a stop string."""
        end = len(self.text)
        if not self.is_stopped:
            end -= max((self._overlap(stop) for stop in self._stops), default=0)
        piece = self.text[self._taken : end]
        self._taken += len(piece)
        return piece

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the text not yet handed out with which `stop` begins."""
        at = max(self._taken, self._searched_from, len(self.text) - len(stop) + 1)
        while (at := self.text.find(stop[0], at)) >= 0:
            if stop.startswith(self.text[at:]):
                return len(self.text) - at
            at += 1
        return 0
