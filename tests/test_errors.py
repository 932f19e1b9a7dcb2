"""What messages show of untrusted values, and the checks of single values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mqa_gpt.errors import PromptError, require_text, shown

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters()), inner),
)


@pytest.mark.slow
@given(values)
def test_a_value_in_a_message_is_one_short_printable_line(value):
    assert shown(value).isprintable()
    assert len(shown(value)) <= 200


def test_a_large_value_in_a_message_is_short_too():
    nested = "x" * 1000
    for _ in range(9):
        nested = [nested] * 9
    assert len(shown(nested)) == 200
    assert shown("x" * 1000).endswith("xxx'")
    assert shown("a\x1b[2J") == r"'a\x1b[2J'"


@pytest.mark.parametrize("value", ["", "größe 🐈", "\x00\n", "\N{REPLACEMENT CHARACTER}"])
def test_any_text_that_utf8_can_express_is_accepted(value):
    require_text("stop", value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "stop is of type NoneType, not str"),
        (b"x", "stop is of type bytes, not str"),
        ("ab\udcff", r"stop holds a lone surrogate \(U\+DCFF\) at character 2"),
    ],
)
def test_other_values_are_errors_that_name_them(value, message):
    with pytest.raises(PromptError, match=message):
        require_text("stop", value)
