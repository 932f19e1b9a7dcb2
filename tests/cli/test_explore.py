"""`mqa-gpt explore`: a page or its data, never over another file by mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mqa_gpt.cli.app import app

TEXT = "import os\n"


def invoke(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, ["explore", *arguments], input=stdin)


def test_a_page_is_written_and_its_name_and_size_are_told(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    result = invoke(TEXT, "--max-new-tokens", "3", "--out", str(out))
    assert result.exit_code == 0, result.output
    page = out.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    count = len(json.loads(page.split('id="data">')[1].split("</script>")[0])["ids"])
    assert result.stdout.startswith(f"{out}: {count} tokens, ")
    assert list(tmp_path.iterdir()) == [out]


def test_a_file_that_exists_is_kept_unless_told(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    out.write_text("mine")
    result = invoke(TEXT, "--out", str(out))
    assert result.exit_code == 2
    assert "exists already: pass --force" in result.output
    assert out.read_text() == "mine"
    result = invoke(TEXT, "--max-new-tokens", "1", "--out", str(out), "--force")
    assert result.exit_code == 0, result.output
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_json_is_the_data_and_writes_no_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompt.py").write_text(TEXT)
    given = json.loads(invoke(TEXT, "--max-new-tokens", "2", "--json").stdout)
    read = json.loads(invoke("--file", "prompt.py", "--max-new-tokens", "2", "--json").stdout)
    piped = json.loads(invoke("-", "--max-new-tokens", "2", "--json", stdin=TEXT).stdout)
    assert given["ids"] == read["ids"] == piped["ids"]
    assert given["model"]["name"] == "demo"
    assert [path.name for path in tmp_path.iterdir()] == ["prompt.py"]


def test_options_reach_the_library() -> None:
    hole = ["--prefix", "for i, n in", "--suffix", "(names):\n", "--mode", "spm"]
    flags = ["--layer", "3", "--head", "2", "--stop", "(", "--max-new-tokens", "9"]
    report = json.loads(invoke(*hole, *flags, "--json").stdout)
    assert report["mode"] == "spm"
    assert report["selected"] == {"layer": 3, "head": 2}
    assert report["parts"][:2] == ["control", "control"]
    sampling = ["--temperature", "3", "--seed", "1", "--max-new-tokens", "8", "--json"]
    one, other = (json.loads(invoke(TEXT, *sampling).stdout)["ids"] for _ in range(2))
    assert one == other
    assert one != json.loads(invoke(TEXT, "--max-new-tokens", "8", "--json").stdout)["ids"]
    text = "<|endoftext|>"
    plain = invoke(text, "--no-special-tokens", "--max-new-tokens", "1", "--json").stdout
    assert "control" not in json.loads(plain)["parts"][:-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "the text is empty"),
        (["x", "--layer", "6"], "--layer is 6"),
        (["x", "--head", "4"], "--head is 4"),
        (["x", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["x " * 3000], "exceed the context"),
        (["x", "--prefix", "y"], "give one of these"),
        (["--file", "no-such-file"], "cannot read"),
        (["--prefix", "y", "--mode", "mps"], "--mode is 'mps'"),
        (["x", "--stop", ""], "--stop is ''"),
        (["x", "--out", "no/such/folder.html"], "there is no folder 'no/such'"),
        (["x", "--out", "."], "is a folder: choose another --out"),
        (["x", "--out", "/dev/full/x.html"], "there is no folder '/dev/full'"),
    ],
)
def test_a_mistake_is_a_message_and_leaves_no_file(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert list(tmp_path.iterdir()) == []
