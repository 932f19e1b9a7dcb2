"""`mqa-gpt convert`: what it writes, reports and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from mqa_gpt import GPT, Tokenizer
from mqa_gpt.checkpoints.save import save_model
from mqa_gpt.cli.app import app
from tests.helpers import SPECIALS, byte_tokenizer, error, random_ids, tiny_model
from tests.training.test_gpt2 import reference

TEXT = "def double(x):\n    return 2 * x\n" * 20


@pytest.fixture
def mha(tmp_path: Path) -> Path:
    """A multi-head checkpoint in float16, with a tokenizer."""
    folder, tokenizer = tmp_path / "mha", byte_tokenizer(*SPECIALS)
    model = tiny_model(multi_query=False, vocab_size=tokenizer.get_vocab_size())
    save_model(model.half(), folder, tokenizer=Tokenizer(tokenizer))
    return folder


def convert(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_heads_become_one_and_losses_on_the_text_are_reported(mha: Path, tmp_path: Path) -> None:
    (tmp_path / "text.py").write_text(TEXT)
    text, reports = ("--text", tmp_path / "text.py"), {}
    for method in ("aligned", "mean", "first"):
        out = tmp_path / method
        result = convert("--model", mha, "--out", out, "--method", method, *text, "--json")
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        assert report["method"] == method
        assert report["before"]["key_value_heads"] == 3
        assert report["after"]["key_value_heads"] == 1
        assert (
            report["after"]["cache_bytes_per_token"] * 3
            == (report["before"]["cache_bytes_per_token"])
        )
        reports[method] = report
        model = GPT.from_pretrained(out)
        assert model.config.multi_query
        assert model.dtype == torch.float16
        assert Tokenizer.from_pretrained(out).vocab_size == model.config.vocab_size
    assert len({report["before"]["loss"] for report in reports.values()}) == 1
    assert len({report["after"]["loss"] for report in reports.values()}) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the text has no two tokens: give more, or leave it out"),
        (TEXT[:100], "100 tokens are too few for n_embd 60: give at least 600, or leave the text"),
    ],
    ids=["none", "little"],
)
def test_too_little_text_is_refused(text: str, message: str, mha: Path, tmp_path: Path) -> None:
    (tmp_path / "text.py").write_text(text)
    words = ("--model", mha, "--text", tmp_path / "text.py")
    result = convert(*words, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()
    # To report losses, two tokens are enough.
    mean = convert(*words, "--out", tmp_path / "mean", "--method", "mean")
    assert mean.exit_code == (0 if text else 2), mean.output
    assert ("loss on the text" in mean.stdout) == bool(text)


def test_one_head_becomes_many_with_the_same_logits(mha: Path, tmp_path: Path) -> None:
    convert("--model", mha, "--out", tmp_path / "mqa")
    (tmp_path / "text.py").write_text(TEXT)
    words = ("--to", "mha", "--text", tmp_path / "text.py", "--json")
    result = convert("--model", tmp_path / "mqa", *words, "--out", tmp_path / "same")
    report = json.loads(result.stdout)
    assert report["after"]["loss"] == pytest.approx(report["before"]["loss"], rel=1e-4)
    result = convert("--model", tmp_path / "mqa", "--to", "mha", "--out", tmp_path / "back")
    assert result.exit_code == 0, result.output
    assert "key/value heads" in result.stdout
    assert result.stderr == f"the converted model is in {tmp_path / 'back'}\n"
    one, many = (GPT.from_pretrained(tmp_path / n, dtype="float32") for n in ("mqa", "back"))
    ids = random_ids(one.config, 2, 20)
    assert error(many(ids), one(ids)) < 1e-4


def test_where_there_is_nothing_to_convert_this_is_said(mha: Path, tmp_path: Path) -> None:
    result = convert("--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: demo has one key/value head already, so there is nothing to convert: pass --to "
        "mha for the other way\n"
    )
    result = convert("--model", mha, "--to", "mha", "--out", tmp_path / "out")
    assert "has all heads already" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_not_written_to(mha: Path) -> None:
    before = (mha / "model.safetensors").read_bytes()
    result = convert("--model", mha, "--out", mha)
    assert result.exit_code == 2
    assert "exists already: name another folder, or remove it" in result.stderr
    assert (mha / "model.safetensors").read_bytes() == before


def test_a_gpt2_checkpoint_is_read(tmp_path: Path) -> None:
    model = reference()
    model.save_pretrained(tmp_path / "gpt2")
    result = convert("--model", tmp_path / "gpt2", "--to", "mha", "--out", tmp_path / "ours")
    assert result.exit_code == 0, result.output
    assert "no tokenizer is written" in result.stderr
    ids = torch.randint(97, (2, 20))
    assert error(GPT.from_pretrained(tmp_path / "ours")(ids), model(ids).logits) < 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "gqa"], "--to is 'gqa': expected mqa or mha"),
        (["--method", "median"], "--method is 'median': expected one of aligned, mean, first"),
        (["--model", "/nowhere"], "there is no folder '/nowhere'"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_and_nothing_is_written(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    result = convert("--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()
