"""The studies in docs/research.md: short, and what they print is what stands below them."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs/research.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n([^`]*)```\n\n((?:    .*\n)+)", PAGE)


def test_there_are_ten_and_each_has_its_output() -> None:
    assert len(EXAMPLES) == PAGE.count("```python") == 1 + 10
    assert re.findall(r"^\*\*(\d+)\.", PAGE, re.MULTILINE) == [str(n) for n in range(1, 11)]


@pytest.mark.slow
@pytest.mark.parametrize(("code", "output"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_it_prints_what_stands_below_it(
    code: str, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line for line in code.splitlines() if line]
    assert len(lines) <= 15
    assert max(map(len, lines)) <= 100
    exec(code, {})
    printed = capsys.readouterr().out
    # The last digit depends on the order in which a processor sums.
    number = r"\d+\.\d+"
    shown = textwrap.dedent(output)
    assert re.sub(number, "x", printed).strip() == re.sub(number, "x", shown).strip()
    ours, theirs = (list(map(float, re.findall(number, text))) for text in (printed, shown))
    assert ours == pytest.approx(theirs, abs=0.011)
