"""The tokenizer that a run trains: StarCoder's control tokens, digits, and every text restored."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mqa_gpt.errors import ConfigError
from mqa_gpt.fim import FimTokens
from mqa_gpt.tokenizer import Tokenizer
from mqa_gpt.training.vocabulary import SPECIAL_TOKENS, TokenizerConfig, train_tokenizer


def module(name: str) -> str:
    return "".join(f"{name}_{i} = a_long_enough_line({i})\n" for i in range(12))


TRAINED = train_tokenizer([module(name) + "12345 " * 50 for name in ("first", "second")], 290)
TOKENIZER = Tokenizer(TRAINED)


def test_special_tokens_have_starcoders_ids() -> None:
    assert [TRAINED.id_to_token(i) for i in range(19)] == SPECIAL_TOKENS
    assert TOKENIZER.special_ids == set(range(19))
    assert TOKENIZER.end_of_text_id == 0
    assert TOKENIZER.fim == FimTokens(prefix=1, suffix=3, middle=2, pad=4)
    assert TOKENIZER.vocab_size == 290


@given(st.lists(st.text() | st.sampled_from([*SPECIAL_TOKENS, "first_1", "   "])).map("".join))
def test_decoding_restores_any_encoded_text(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text, special_tokens=False)) == text


def test_every_digit_and_every_frequent_word_is_one_token() -> None:
    def pieces(text: str) -> list[str | None]:
        return [TOKENIZER.id_to_token(i) for i in TOKENIZER.encode(text)]

    assert pieces("12345") == list("12345")
    assert pieces("enough") == ["enough"]


def test_a_vocabulary_without_room_for_every_byte_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size is 274: it must be an integer of at least"):
        TokenizerConfig(vocab_size=274)
