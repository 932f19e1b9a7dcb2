from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from mqa_gpt.errors import ConfigError, InputError
from mqa_gpt.training.documents import Document, Report, SourceConfig, fits, read_documents


def read(*sources: object, **settings: Any) -> tuple[list[Document], Report]:
    report = Report()
    config = SourceConfig(sources=tuple(map(str, sources)), **settings)
    return list(read_documents(config, report)), report


def names(documents: list[Document]) -> list[str]:
    return [document.name for document in documents]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {
        "b.py": b"b = 1\r\n",
        "a.py": b"\xef\xbb\xbfa = '\xc3\xa9'\n",
        "test/t.py": b"t",
        "sub/test/t.py": b"t",
        "sub/c.c": b"int c;",
        ".git/config": b"hidden",
        "sub/.hidden.py": b"hidden",
        "latin.py": b"caf\xe9",
        "empty.py": b" \n\n",
        "huge.py": b"x" * 2000,
        "nul.py": b"a\0b",
    }
    for name, data in files.items():
        path = tmp_path / "code" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "code"


def test_a_folder_is_its_files_by_their_paths(folder: Path) -> None:
    documents, report = read(folder, max_bytes=1000)
    assert names(documents) == ["a.py", "b.py", "sub/c.c", "sub/test/t.py", "test/t.py"]
    assert documents[0].text == "a = 'é'\n"
    assert documents[1].text == "b = 1\n"
    assert report.names == {
        "not UTF-8": ["latin.py"],
        "empty": ["empty.py"],
        "larger than data.max_bytes": ["huge.py"],
        "binary (holds a NUL)": ["nul.py"],
        "by name": [".git/config", "sub/.hidden.py"],
    }


def test_patterns_choose_by_name(folder: Path) -> None:
    documents, _ = read(folder, include=("*.py",), exclude=("*/test/*", "*/.*", "huge*"))
    assert names(documents) == ["a.py", "b.py"]
    documents, _ = read(folder, include=("sub/*",), exclude=())
    assert names(documents) == ["sub/.hidden.py", "sub/c.c", "sub/test/t.py"]


def test_a_star_matches_slashes_and_a_slash_stands_before_every_name() -> None:
    assert fits("test/a.py", ["*/test/*"])
    assert fits("x/test/a/b.py", ["*/test/*"])
    assert not fits("latest/a.py", ["*/test/*"])
    assert fits("json/decoder.py", ["json/decoder.py"])
    assert not fits("x/json/decoder.py", ["json/decoder.py"])


def test_a_folder_that_cannot_be_listed_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    documents, report = read(folder, include=("sub/*", "a.py"))
    assert names(documents) == ["a.py"]
    assert report.names["cannot be read (Permission denied)"] == [str(folder / "sub")]


def test_what_is_no_file_or_cannot_be_read_is_left_out(folder: Path) -> None:
    os.mkfifo(folder / "pipe.py")
    (folder / "broken.py").symlink_to("nowhere")
    documents, report = read(folder, include=("pipe.py", "broken.py"))
    assert documents == []
    assert report.names["not a file"] == ["broken.py", "pipe.py"]


LINES = [
    {"content": "one", "lang": "Python", "max_stars_repo_path": "p/one.py", "licenses": ["MIT"]},
    {"text": "two", "language": "C", "license": "mit"},
    {"content": "three", "lang": "python", "max_stars_repo_licenses": ["MIT", "GPL-3.0"]},
    {"content": "four", "licenses": []},
    {"prompt": "2 + 2 =", "completion": " 4"},
    {"content": 5},
    ["six"],
    {"content": "\ud800"},
]


def test_json_lines_are_records(tmp_path: Path) -> None:
    text = "\n".join([*map(json.dumps, LINES), "{", "", '{"content": "last"}'])
    (tmp_path / "data.jsonl").write_text(text)
    documents, report = read(tmp_path)
    assert documents == [
        Document("p/one.py", "one"),
        Document("data.jsonl:2", "two"),
        Document("data.jsonl:3", "three"),
        Document("data.jsonl:4", "four"),
        Document("data.jsonl:5", " 4", "2 + 2 ="),
        Document("data.jsonl:11", "last"),
    ]
    assert report.left_out == {
        "without text in content or text, or in prompt and completion": 1,
        "not a JSON object": 1,
        "not UTF-8": 1,
        "not JSON": 1,
    }
    with gzip.open(tmp_path / "data.jsonl.gz", "wt") as file:
        file.write(text)
    again, report_again = read(tmp_path / "data.jsonl.gz")
    assert [d.text for d in again] == [d.text for d in documents]
    assert report_again.left_out == report.left_out


def test_records_are_chosen_by_language_and_licence(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, LINES)))

    def texts(**settings: Any) -> list[str]:
        return [document.text for document in read(tmp_path, **settings)[0]]

    assert texts(languages=("PYTHON",)) == ["one", "three"]
    assert texts(licenses=("MIT",)) == ["one", "two"]
    assert texts(licenses=("mit", "gpl-3.0")) == ["one", "two", "three"]
    assert texts(include=("*.py",)) == ["one"]
    _, report = read(tmp_path, languages=("C",), licenses=("GPL-3.0",))
    assert report.left_out["by language"] == 6
    assert report.left_out["by licence"] == 1


def test_a_parquet_file_has_the_columns_of_the_stack(tmp_path: Path) -> None:
    rows = 600  # more than one batch
    table = pyarrow.table(
        {
            "content": [f"text {i}" for i in range(rows)],
            "lang": ["Python", "C"] * (rows // 2),
            "max_stars_repo_path": [f"{i}.py" for i in range(rows)],
            "max_stars_repo_name": ["a/b"] * rows,
            "max_stars_repo_licenses": [["MIT"]] * rows,
            "size": [6] * rows,
        }
    )
    (tmp_path / "data").mkdir()
    parquet.write_table(table, tmp_path / "data" / "part.parquet")
    (tmp_path / "data" / "torn.parquet").write_bytes(b"PAR1 and no more")
    documents, report = read(tmp_path, languages=("C",), licenses=("MIT",))
    assert documents == [Document(f"{i}.py", f"text {i}") for i in range(1, rows, 2)]
    assert report.left_out["by language"] == rows // 2
    assert sum(report.left_out.values()) == rows // 2 + 1


def test_a_gzip_file_that_is_cut_off_gives_what_it_has(tmp_path: Path) -> None:
    data = gzip.compress("\n".join(['{"content": "x"}'] * 9).encode())
    (tmp_path / "data.jsonl.gz").write_bytes(data[:-9])
    _, report = read(tmp_path)
    assert any("cannot be read" in reason for reason in report.left_out)


def test_a_gzip_file_with_a_damaged_block_is_left_out(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(b'{"content": "x"}\n' * 9))
    data[10] ^= 0xFF  # the kind of its first block
    (tmp_path / "data.jsonl.gz").write_bytes(data)
    documents, report = read(tmp_path)
    assert documents == []
    (reason,) = report.left_out
    assert reason.startswith("cannot be read (Error -3 while decompressing data")


def test_a_row_of_a_table_that_is_not_utf8_is_left_out_alone(tmp_path: Path) -> None:
    data = pyarrow.array([b"one", b"caf\xe9", b"three"], pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), len(data), data.buffers())
    parquet.write_table(pyarrow.table({"content": column}), tmp_path / "data.parquet")
    documents, report = read(tmp_path)
    assert [document.text for document in documents] == ["one", "three"]
    assert report.names == {"not UTF-8": ["data.parquet:2"]}


def test_an_error_without_words_is_named_by_its_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise pyarrow.ArrowInvalid

    monkeypatch.setattr(parquet, "ParquetFile", refuse)
    (tmp_path / "data.parquet").touch()
    _, report = read(tmp_path)
    assert report.names == {"cannot be read (ArrowInvalid)": ["data.parquet"]}


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"needs pyarrow: pip install 'mqa-gpt\[train\]'"):
        read(tmp_path)


def test_a_source_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data.sources: .*nowhere does not exist"):
        read(tmp_path / "nowhere")


def test_the_standard_library_is_a_source_without_what_is_installed() -> None:
    documents, _ = read("python-standard-library", include=("json/*.py", "*/torch/__init__.py"))
    assert names(documents)[:2] == ["json/__init__.py", "json/decoder.py"]
    assert all(name.startswith("json/") for name in names(documents))


def test_a_report_says_how_much_is_left_out_and_names_some() -> None:
    report = Report(documents=1200, characters=3_400_000)
    for i in range(2000):
        report.leave_out(f"{i}.py", "empty")
    report.leave_out("x", "not UTF-8")
    assert report.lines() == [
        "1,200 documents, 3.4 million characters",
        "2,000 left out, empty: 0.py, 1.py, 2.py ...",
        "1 left out, not UTF-8: x",
    ]
    assert len(report.names["empty"]) == 100


def test_unusable_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.max_bytes is 0"):
        SourceConfig(max_bytes=0)
    with pytest.raises(ConfigError, match=r"data.held_out_share is 2"):
        SourceConfig(held_out_share=2)
