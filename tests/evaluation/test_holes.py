"""Holes cut from folders of code: where they are, and that they are the same every time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mqa_gpt.errors import InputError
from mqa_gpt.evaluation.holes import KINDS, MAX_CHARACTERS, MAX_LINES, cut_holes, read_files

TEXT = "import os\n\n\ndef f(x):\n    y = x\n\n    return y\n \nprint(f(1))"
TEXTS = {"a.py": TEXT, "b.py": "\n  \nx = 1\n", "blank.py": "\n\n"}


@pytest.mark.parametrize("kind", KINDS)
def test_prefix_hole_and_suffix_join_to_the_file(kind: str) -> None:
    tasks = cut_holes(TEXTS, kind, 1000)
    assert len({task.id for task in tasks}) == len(tasks) > 3
    for task in tasks:
        _, name, place = str(task.id).split("/")
        begin, end = map(int, place.split("-"))
        assert task.prefix + task.solution + task.suffix == TEXTS[name]
        assert task.solution == TEXTS[name][begin:end]
        assert task.solution.strip()
        assert task.kind == kind


def test_single_lines_are_all_lines_that_are_not_blank_with_their_line_break() -> None:
    holes = {task.solution for task in cut_holes(TEXTS, "single-line", 1000)}
    assert holes == {
        "import os\n", "def f(x):\n", "    y = x\n", "    return y\n", "print(f(1))", "x = 1\n"
    }  # fmt: skip


def test_multi_lines_hold_two_to_five_lines_that_are_not_blank() -> None:
    sizes = set()
    text = "".join(f"line {i}\n\n" for i in range(40))
    for task in cut_holes({"a": text}, "multi-line", 1000):
        assert task.solution.startswith("line")
        assert task.solution.endswith("\n")
        sizes.add(task.solution.count("line"))
    assert sizes == set(range(2, MAX_LINES + 1))
    assert cut_holes({"a": "x\ny"}, "multi-line", 9)[0].solution == "x\ny"


def test_spans_begin_anywhere_and_are_at_most_so_long() -> None:
    tasks = cut_holes({"a": "ab \n" * 500}, "random-span", 300)
    sizes = [len(task.solution) for task in tasks]
    assert max(sizes) <= MAX_CHARACTERS
    assert min(sizes) < 20
    assert max(sizes) > 180
    assert {task.solution[0] for task in tasks} == set("ab \n")


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_what_is_cut(kind: str) -> None:
    texts = {"a": TEXT * 9}
    first, same, other = (cut_holes(texts, kind, 5, seed) for seed in (0, 0, 1))
    assert first == same != other
    assert len(first) == 5


def test_a_folder_is_read_without_what_is_no_code(tmp_path: Path) -> None:
    for name, data in {
        "b/two.py": b"two\r\n", "a.py": b"one\n", "c.txt": "ä".encode(), "empty.py": b"",
        "blank.py": b" \n", "binary.py": b"\xff\xfe", "nul.py": b"a\0b", ".hidden.py": b"x",
        ".git/config": b"x", "large.py": b"x" * 1_000_001,
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "b/loop").symlink_to(tmp_path)
    (tmp_path / "dangling.py").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.py")
    assert read_files(tmp_path) == {"a.py": "one\n", "c.txt": "ä", "b/two.py": "two\n"}
    assert list(read_files(tmp_path, ["*.py"])) == ["a.py", "b/two.py"]


def test_what_has_no_holes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        read_files(tmp_path / "missing")
    with pytest.raises(InputError, match="'' is not a folder"):
        read_files("")
    with pytest.raises(InputError, match=r"holds no text files that fit '\*'"):
        read_files(tmp_path)
    with pytest.raises(InputError, match="no place for a multi-line hole"):
        cut_holes({"a": "one line\n"}, "multi-line", 1)
    with pytest.raises(InputError, match="expected one of single-line"):
        cut_holes(TEXTS, "lines", 1)
    with pytest.raises(InputError, match="count is 0"):
        cut_holes(TEXTS, "single-line", 0)
