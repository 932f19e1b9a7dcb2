"""From tokens to text, up to the first stop string."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from mqa_gpt import GPTConfig, Tokenizer
from mqa_gpt.generation.request import Request, make_requests
from mqa_gpt.generation.stop import RowText
from tests.helpers import byte_tokenizer

TOKENIZER = Tokenizer(byte_tokenizer("<|endoftext|>"))


def pieces(text: str, stops: tuple[str, ...], min_new_tokens: int = 0) -> tuple[list[str], RowText]:
    """What is handed out after each token of a text, and at its end."""
    row = RowText(TOKENIZER, Request((0,), 99, stop=stops, min_new_tokens=min_new_tokens))
    found = []
    for token in TOKENIZER.encode(text):
        row.push(token)
        found.append(row.take())
        if row.is_stopped:
            return found, row
    row.finish()
    return [*found, row.take()], row


@given(
    st.text("abc\nä€", max_size=30),
    st.lists(st.text("abc\nä€", min_size=1, max_size=6), max_size=4),
)
def test_the_text_ends_before_the_stop_string_that_is_complete_first(
    text: str, stops: list[str]
) -> None:
    found, row = pieces(text, tuple(stops))
    ends = {text.find(stop) + len(stop): stop for stop in stops if stop in text}
    if ends:
        end = min(ends)  # where a stop string is complete first; of several the longest
        expected = min(text[:end].find(stop) for stop in stops if text[:end].endswith(stop))
        assert row.text == text[:expected]
    else:
        assert row.text == text
    assert row.is_stopped == bool(ends)
    assert "".join(found) == row.text  # what was handed out was never taken back


def test_text_that_may_begin_a_stop_string_is_held_back_until_it_is_decided() -> None:
    found, row = pieces("a\n\nb", ("\n\n\n",))
    assert found == ["a", "", "", "\n\nb", ""]
    assert row.text == "a\n\nb"
    found, row = pieces("ab\n\n\nc", ("\n\n\n",))
    assert found == ["a", "b", "", "", ""]
    assert row.text == "ab"


def test_a_character_of_several_tokens_comes_whole() -> None:
    assert pieces("ä€", ())[0] == ["", "ä", "", "", "€", ""]


def test_stop_strings_among_the_first_tokens_do_not_count() -> None:
    found, row = pieces("abab", ("ab",), min_new_tokens=2)
    assert (found, row.text) == (["a", "b", "", ""], "ab")
    assert row.is_stopped
    # One that begins there is not completed later either.
    assert pieces("xaby", ("ab",), min_new_tokens=2)[1].text == "xaby"


def test_a_single_stop_string_is_not_taken_for_its_characters() -> None:
    config = GPTConfig(vocab_size=TOKENIZER.vocab_size)
    (request,) = make_requests(config, [[1]], 4, stop="\n\n")
    assert request.stop == ("\n\n",)


def test_long_and_many_stop_strings_take_little_time() -> None:
    text = "the text of a completion " * 8
    for stops in (
        ("a" * 1_000_000, "the text" * 100_000),
        tuple(f"{i}x" * 5000 for i in range(1000)),
    ):
        begin = time.process_time()
        assert pieces(text, stops)[1].text == text
        assert time.process_time() - begin < 2
