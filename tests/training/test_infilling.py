from __future__ import annotations

import ast
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mqa_gpt.errors import ConfigError
from mqa_gpt.fim import fim_transform
from mqa_gpt.tokenizer import Tokenizer
from mqa_gpt.training.infilling import (
    KINDS,
    Hole,
    InfillingConfig,
    character_hole,
    draw_hole,
    line_hole,
    node_hole,
    rearrange,
)
from tests.training.texts import CODE, DEMO, TOKENIZER, original

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=80) | st.text(
    " \n\tab(.:é", max_size=80
)
configs = st.sampled_from([InfillingConfig(spm_rate=r, **{"characters": 0.0, kind: 1.0})
                           for kind in KINDS for r in (0.0, 1.0)])  # fmt: skip


@pytest.mark.parametrize("tokenizer", [TOKENIZER, DEMO], ids=["bytes", "demo"])
@given(text=texts, config=configs, seed=st.integers(0, 100))
def test_prefix_middle_and_suffix_are_the_text(
    tokenizer: Tokenizer, text: str, config: InfillingConfig, seed: int
) -> None:
    ids, middle = rearrange(text, tokenizer, config, random.Random(seed))
    assert original(ids, tokenizer) == text
    start, end = draw_hole(text, config, random.Random(seed))
    assert tokenizer.decode(ids[middle:]) == text[start:end]


@given(text=texts, seed=st.integers(0, 100), spm_rate=st.sampled_from([0.0, 0.5, 1.0]))
def test_by_default_a_text_is_rearranged_as_the_book_does_it(
    text: str, seed: int, spm_rate: float
) -> None:
    config = InfillingConfig(spm_rate=spm_rate)
    ids, _ = rearrange(text, DEMO, config, random.Random(seed))
    expected = fim_transform(text, DEMO, random.Random(seed), rate=1.0, spm_rate=spm_rate)
    assert ids == expected


def test_spm_rate_is_the_share_of_spm() -> None:
    fim = TOKENIZER.fim
    assert fim is not None

    def count(spm_rate: float) -> int:
        config, rng = InfillingConfig(spm_rate=spm_rate), random.Random(0)
        pieces = [rearrange("abcdef" * 9, TOKENIZER, config, rng)[0] for _ in range(200)]
        return sum(ids[1] == fim.suffix for ids in pieces)  # a prefix is seldom empty

    assert count(0.0) < 20
    assert 60 < count(0.3) < 100
    assert count(1.0) == 200


def test_holes_of_characters_lie_anywhere() -> None:
    holes = {character_hole("abcd", random.Random(seed)) for seed in range(300)}
    assert holes == {(i, j) for i in range(5) for j in range(i, 5)}


@given(text=texts, seed=st.integers(0, 100))
def test_a_hole_of_lines_ends_with_a_line_and_takes_the_white_space_before_it(
    text: str, seed: int
) -> None:
    hole = line_hole(text, random.Random(seed))
    if hole is None:
        assert not text.strip()
        return
    start, end = hole
    assert not text[end:].split("\n")[0].strip()
    assert text[start:end].strip()
    assert not text[:start][-1:].isspace()


def test_some_holes_of_lines_begin_at_a_word() -> None:
    text = "def f(a):\n    return a.b\n"
    begun = {
        text[slice(*hole)] for seed in range(400) if (hole := line_hole(text, random.Random(seed)))
    }
    assert {"def f(a):", " f(a):", "a):", "\n    return a.b", " a.b", "b"} <= begun


def segments(text: str) -> set[str]:
    nodes = ast.walk(ast.parse(text))
    return {found for node in nodes if (found := ast.get_source_segment(text, node))}


def holes(find: Callable[[str, random.Random], Hole | None], text: str) -> list[Hole]:
    found = (find(text, random.Random(seed)) for seed in range(3000))
    return [hole for hole in found if hole is not None]


def test_a_hole_of_a_node_is_one_with_the_white_space_before_it() -> None:
    nodes = segments(CODE)
    found = holes(node_hole, CODE)
    assert len(found) > 2000
    for start, end in found:
        assert CODE[start:end].lstrip() in nodes
        assert not CODE[:start][-1:].isspace()


def test_holes_of_nodes_are_statements_and_expressions_large_and_small() -> None:
    found = {CODE[slice(*hole)] for hole in holes(node_hole, CODE)}
    assert "import os" in found
    assert "\n            pass" in found
    assert " größe" in found
    assert " größe: int" in found
    assert any(hole.strip().startswith("class Café") for hole in found)
    assert any(
        hole.strip().startswith("if self.open") and "del self.x[0]" in hole for hole in found
    )


def test_a_statement_is_found_in_text_that_does_not_parse_as_a_whole() -> None:
    text = (
        "  in the middle of a sentence\n\n    def f(self):\n        return self.x(1)\n   ''' and so"
    )
    with pytest.raises(SyntaxError):
        ast.parse(text)
    found = {text[slice(*hole)].strip() for hole in holes(node_hole, text)}
    assert {"def f(self):\n        return self.x(1)", "return self.x(1)", "self.x"} <= found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   \n",
        "# no node\n",
        "else\n",
        "x = \x00\n",
        "'''" + 99 * "\n",
        "a\rb\rc",
        "é\r(\n é)\n",
    ],
)
def test_where_no_node_is_found_lines_or_characters_are_taken(text: str) -> None:
    config = InfillingConfig(characters=0.0, nodes=1.0)
    for seed in range(50):
        start, end = draw_hole(text, config, random.Random(seed))
        assert 0 <= start <= end <= len(text)


def test_shares_of_holes_are_ratios() -> None:
    config = InfillingConfig(characters=0.0, lines=0.2, nodes=0.2)
    rng = random.Random(0)
    found = [CODE[slice(*draw_hole(CODE, config, rng))] for _ in range(500)]
    names = sum(hole.strip().isidentifier() for hole in found)  # seldom by lines
    assert 25 < names < 125


def test_another_rate_may_hold_from_an_epoch_on() -> None:
    config = InfillingConfig(rate=0.1, late_rate=0.9, late_epoch=2)
    assert [config.rate_in(epoch) for epoch in range(4)] == [0.1, 0.1, 0.9, 0.9]
    assert InfillingConfig(rate=0.1, late_epoch=2).rate_in(3) == 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": 1.5}, "rate is 1.5"),
        ({"late_rate": 1.5}, "late_rate is 1.5"),
        ({"late_epoch": -1}, "late_epoch is -1"),
        ({"spm_rate": -1.0}, "spm_rate is -1.0"),
        ({"characters": 0.0}, "are all 0"),
        ({"piece_tokens": (0, 5)}, r"piece_tokens\[0\] is 0"),
        ({"piece_tokens": (5, 4)}, r"piece_tokens\[1\] is 4"),
    ],
)
def test_unusable_settings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InfillingConfig(**changes)  # type: ignore[arg-type]
