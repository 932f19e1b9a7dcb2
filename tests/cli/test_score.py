"""`mqa-gpt score`: what the library says, as a table and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mqa_gpt import LLM
from mqa_gpt.cli.app import app

TEXT = "import os\n"


def invoke(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, ["score", *arguments], input=stdin)


def test_json_holds_the_scores_of_the_library(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n" * 5)
    result = invoke(TEXT, "--file", str(tmp_path / "a.py"), "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    scores = LLM.load().score([TEXT, "x = 1\n" * 5])
    for found, expected in zip(report["texts"], scores, strict=True):
        assert found["token_ids"] == expected.token_ids
        assert found["logprobs"] == pytest.approx(expected.logprobs, abs=1e-3)
        assert found["bits_per_byte"] == pytest.approx(expected.bits_per_byte, abs=1e-3)
        assert found["bytes"] == expected.bytes
    assert report["texts"][1]["name"] == str(tmp_path / "a.py")
    ids = ", ".join(map(str, scores[1].token_ids))
    assert f'"token_ids": [{ids}]' in result.stdout  # in one line


def test_a_table_has_a_row_per_text_and_per_token_if_asked() -> None:
    result = invoke("--context", "import", " os", " sys", "--tokens")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("' os'") == result.stdout.count("' sys'") == 1
    assert "prompt 1" in result.stdout
    assert "bits per byte" in result.stdout
    (pair,) = LLM.load().score([("import", " os")])
    assert f"{pair.logprob:,.2f}" in result.stdout


def test_standard_input_is_read_in_windows() -> None:
    text = "a = b + c\n" * 40
    result = invoke("-", "--window", "64", "--stride", "16", "--json", stdin=text)
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["texts"]
    expected = LLM.load().score(text, window=64, stride=16)
    assert found["logprob"] == pytest.approx(expected.logprob, abs=0.05)
    assert found["logprob"] != pytest.approx(LLM.load().score(text).logprob, abs=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "prompt 0 is empty"),
        (["x", "--window", "100000"], "--window is 100000"),
        (["x", "--window", "8", "--stride", "9"], "--stride is 9"),
        (["--file", "no-such-file"], "cannot read"),
        (["x", "--batch-size", "0"], "--batch-size is 0"),
    ],
)
def test_a_mistake_is_a_message(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.output
