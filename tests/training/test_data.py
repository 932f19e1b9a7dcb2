"""The data of a run: its tokenizer and corpora are made once, in its folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from mqa_gpt.errors import InputError
from mqa_gpt.tokenizer import Tokenizer
from mqa_gpt.training.data import load_data
from tests.helpers import SPECIALS, byte_tokenizer
from tests.training.runs import say_nothing, tiny_run, write_sources


def test_a_tokenizer_is_trained_and_the_data_is_not_read_again(tmp_path: Path) -> None:
    sources = write_sources(tmp_path / "sources")
    said: list[str] = []
    first = load_data(tiny_run(sources), tmp_path / "run", said.append)
    assert said[0] == "training the tokenizer"
    assert first.tokenizer.vocab_size == 290
    assert first.held_out is not None
    assert f"{len(first.training):,} sequences of 40 tokens per epoch" in said
    shutil.rmtree(sources)
    again = load_data(tiny_run(sources), tmp_path / "run", say_nothing)
    assert again.tokenizer.to_json() == first.tokenizer.to_json()
    assert torch.equal(again.training.rows([3, 4]).ids, first.training.rows([3, 4]).ids)


def test_the_tokenizer_does_not_see_what_is_held_out(tmp_path: Path) -> None:
    sources = write_sources(tmp_path / "sources")
    (sources / "module_1.py").write_text("unheard_of_word = 1\n" * 100)
    data = load_data(tiny_run(sources), tmp_path / "run", say_nothing)
    assert len(data.tokenizer.encode("unheard_of_word")) > 8


def test_a_tokenizer_may_be_given(tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    byte_tokenizer(*SPECIALS).save(str(tmp_path / "given/tokenizer.json"))
    config = tiny_run(write_sources(tmp_path / "sources"), tokenizer_source=str(tmp_path / "given"))
    data = load_data(config, tmp_path / "run", say_nothing)
    assert data.tokenizer.to_json() == Tokenizer.from_pretrained(tmp_path / "given").to_json()


def test_too_few_held_out_documents_for_a_sequence_are_said_to_be_those(tmp_path: Path) -> None:
    sources = write_sources(tmp_path / "sources")
    (sources / "held.py").write_text("x = 1\n")
    config = tiny_run(sources, data_held_out=["held.py"])
    with pytest.raises(InputError, match="held-out documents: the documents have"):
        load_data(config, tmp_path / "run", say_nothing)


def test_that_nothing_is_held_out_is_said(tmp_path: Path) -> None:
    sources = write_sources(tmp_path / "sources", 4)
    said: list[str] = []
    config = tiny_run(sources, data_held_out=[])
    assert load_data(config, tmp_path / "run", said.append).held_out is None
    assert any(line.startswith("nothing is held out") for line in said)
