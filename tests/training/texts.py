"""Python to cut holes into, tokenizers for it, and the way back from infilling."""

from __future__ import annotations

from mqa_gpt.tokenizer import Tokenizer
from tests.helpers import SPECIALS, byte_tokenizer

CODE = '''import os


class Café:
    """Über all."""

    @property
    def name(self, *, größe: int = 3) -> str:
        # a comment
        if self.open and größe > 2:
            return f"{self.x!r} \\\\d {größe:>{3}}"
        elif None:
            return [y for y in (1, 2,
                                3)]
        else:
            del self.x[0], os.environ["ä"]
        try:
            pass
        except (OSError, ValueError) as error:
            raise RuntimeError from error


print(Café().name(größe=4))
'''

TOKENIZER = Tokenizer(byte_tokenizer(*SPECIALS))
DEMO = Tokenizer.from_pretrained("mqa_gpt/demo")


def original(ids: list[int], tokenizer: Tokenizer) -> str:
    """The text that was rearranged: in both orders, what stands before the suffix comes first, then
    what follows `<fim_middle>`, then the suffix."""
    fim = tokenizer.fim
    assert fim is not None
    assert ids[0] == fim.prefix
    suffix, middle = ids.index(fim.suffix), ids.index(fim.middle)
    before, after, rest = ids[1:suffix], ids[suffix + 1 : middle], ids[middle + 1 :]
    return tokenizer.decode([*before, *rest, *after], skip_special_tokens=False)
