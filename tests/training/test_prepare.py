from __future__ import annotations

from pathlib import Path

import pytest

from mqa_gpt.errors import InputError
from mqa_gpt.tokenizer import Tokenizer
from mqa_gpt.training.documents import Document, Report, SourceConfig
from mqa_gpt.training.prepare import (
    held_out_documents,
    is_held_out,
    prepare,
    tokenize,
    training_documents,
)
from tests.helpers import SPECIALS, byte_tokenizer

TOKENIZER = Tokenizer(byte_tokenizer(*SPECIALS))
HELD = "def held_out(argument):\n    return argument.is_held_out()\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    code = tmp_path / "code"
    code.mkdir()
    texts = {
        "held.py": HELD,
        "copy.py": f"# a copy\n{HELD}",
        "part.py": f"{HELD}{''.join(f'# some other line number {i}' + chr(10) for i in range(99))}",
        "one.py": "x = 1\n",
        "same.py": "x = 1\n",
        "other.py": "y = 2\n",
    }
    for name, text in texts.items():
        (code / name).write_text(text)
    return code


def config(folder: Path, **changes: object) -> SourceConfig:
    return SourceConfig(sources=(str(folder),), **{"held_out": ("held.py",), **changes})  # type: ignore[arg-type]


def texts_of(corpus: object) -> list[str]:
    return [TOKENIZER.decode(corpus.ids(i)) for i in range(len(corpus))]  # type: ignore[attr-defined, arg-type]


def test_held_out_documents_and_what_repeats_them_are_not_trained_on(
    folder: Path, tmp_path: Path
) -> None:
    data = prepare(config(folder), TOKENIZER, tmp_path / "data")
    assert data.held_out is not None
    assert texts_of(data.held_out) == [HELD]
    assert texts_of(data.training) == ["x = 1\n", "y = 2\n", (folder / "part.py").read_text()]
    assert data.report.documents == 3
    assert data.report.names == {
        "repeats held-out documents": ["copy.py"],
        "held out": ["held.py"],
        "read already": ["same.py"],
    }


def test_copies_may_be_kept(folder: Path, tmp_path: Path) -> None:
    kept = config(folder, duplicates=True, held_out_overlap=1.0)
    assert len(prepare(kept, TOKENIZER, tmp_path / "data").training) == 5


def test_without_held_out_documents_there_is_no_such_corpus(folder: Path, tmp_path: Path) -> None:
    data = prepare(config(folder, held_out=()), TOKENIZER, tmp_path / "data")
    assert data.held_out is None
    assert len(data.training) == 5


def test_a_share_of_names_is_held_out_and_it_is_always_the_same() -> None:
    some = SourceConfig(held_out_share=0.2)
    chosen = [i for i in range(1000) if is_held_out(f"{i}.py", some)]
    assert 150 < len(chosen) < 250
    more = SourceConfig(held_out_share=0.3)
    assert all(is_held_out(f"{i}.py", more) for i in chosen)


def test_a_resumed_run_reads_what_it_has_read_before(folder: Path, tmp_path: Path) -> None:
    first = prepare(config(folder), TOKENIZER, tmp_path / "data")
    (folder / "one.py").write_text("x = 'changed'\n")
    again = prepare(config(folder), TOKENIZER, tmp_path / "data")
    assert texts_of(again.training) == texts_of(first.training)
    assert again.report == first.report


def test_a_prepared_folder_is_a_source_itself(folder: Path, tmp_path: Path) -> None:
    first = prepare(config(folder), TOKENIZER, tmp_path / "data")
    again = prepare(config(tmp_path / "data"), TOKENIZER, tmp_path / "elsewhere")
    assert texts_of(again.training) == texts_of(first.training)
    assert not (tmp_path / "elsewhere").exists()


def test_tokenized_documents_are_not_read_as_text(folder: Path, tmp_path: Path) -> None:
    prepare(config(folder), TOKENIZER, tmp_path / "data")
    both = SourceConfig(sources=(str(folder), str(tmp_path / "data")))
    with pytest.raises(InputError, match="data holds tokenized documents"):
        prepare(both, TOKENIZER, tmp_path / "more")


def test_a_damaged_report_is_named(folder: Path, tmp_path: Path) -> None:
    prepare(config(folder), TOKENIZER, tmp_path / "data")
    (tmp_path / "data" / "report.json").write_text("[]")
    with pytest.raises(InputError, match=r"report.json is damaged"):
        prepare(config(folder), TOKENIZER, tmp_path / "data")


def test_data_of_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    prepare(config(folder), TOKENIZER, tmp_path / "data")
    with pytest.raises(InputError, match="tokenized with another tokenizer"):
        prepare(config(folder), Tokenizer(byte_tokenizer("<|endoftext|>")), tmp_path / "data")


def test_sources_without_documents_are_an_error_that_says_why(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no documents to train on: 6 left out, by language"):
        prepare(config(folder, languages=("C",)), TOKENIZER, tmp_path / "data")
    with pytest.raises(InputError, match=r"data.sources is empty"):
        prepare(SourceConfig(), TOKENIZER, tmp_path / "data")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["code"]


def test_prompts_are_counted_and_may_hold_control_tokens() -> None:
    documents = [
        Document("a", "b<fim_prefix>", prompt="<fim_prefix>a"),
        Document("c", "text"),
    ]
    first, second = tokenize(documents, TOKENIZER, Report())
    assert (len(first.ids), first.prompt) == (15, 2)
    assert (len(second.ids), second.prompt) == (4, 0)


def test_what_the_tokenizer_cannot_express_is_left_out() -> None:
    entries = byte_tokenizer(*SPECIALS)
    report = Report()
    documents = [Document("a", "x"), Document("b", "\ud800"), Document("c", "y")]
    assert len(list(tokenize(documents, Tokenizer(entries), report))) == 2
    assert report.names == {"cannot be tokenized": ["b"]}


def test_a_tokenizer_can_be_trained_on_the_same_documents(folder: Path) -> None:
    data = config(folder)
    found = training_documents(data, held_out_documents(data), Report())
    assert [document.name for document in found] == ["one.py", "other.py", "part.py"]


@pytest.mark.parametrize("name", ["caf\udce9.py", "\ud800.py"])
def test_a_name_that_is_not_utf8_is_held_out_or_not_like_any_other(name: str) -> None:
    assert not is_held_out(name, SourceConfig(held_out_share=0.0))
    assert is_held_out(name, SourceConfig(held_out_share=1.0))
