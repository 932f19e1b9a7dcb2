"""The form of the lessons. `make docs` runs them from top to bottom, solutions included."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

jupytext = pytest.importorskip("jupytext")

LESSONS = Path(__file__).parents[2] / "docs/lessons"
FILES = sorted(LESSONS.glob("[0-9]-*.md"))
EXERCISE = re.compile(r"^#+ Exercise: ", re.MULTILINE)

each_lesson = pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])


def read(file: Path) -> Any:
    return jupytext.reads(file.read_text(encoding="utf-8"), fmt="md:myst")


def tags(cell: Any) -> list[str]:
    return cell.metadata.get("tags", [])


def exercises(notebook: Any) -> list[tuple[str, Any, Any]]:
    """Each exercise's name, stub and solution: the two code cells after its heading."""
    found, waiting = [], []
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and EXERCISE.search(cell.source):
            assert not waiting, f"{cell.source!r}: the exercise before it has no two code cells"
            waiting = [cell]
        elif cell.cell_type == "code" and waiting:
            waiting.append(cell)
            if len(waiting) == 3:
                (name,) = re.findall(r"^assert check\((\w+)\)", cell.source, re.MULTILINE)
                found.append((name, waiting[1], waiting[2]))
                waiting = []
    assert not waiting, f"{waiting[0].source!r}: the exercise has no two code cells"
    return found


@each_lesson
def test_a_lesson_is_a_notebook_with_its_number_in_the_title(file: Path):
    notebook = read(file)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.jupytext.text_representation.format_name == "myst"
    assert notebook.cells[0].source.startswith(f"# {file.name[0]}. ")
    assert file.read_text(encoding="utf-8").count("```{code-cell} python") == sum(
        cell.cell_type == "code" for cell in notebook.cells
    )


@each_lesson
def test_the_cells_are_plain_python(file: Path):
    for cell in read(file).cells:
        if cell.cell_type == "code":
            ast.parse(cell.source)


@each_lesson
def test_every_exercise_has_a_stub_and_a_folded_solution(file: Path):
    found = exercises(read(file))
    assert 2 <= len(found) <= 4
    for name, stub, solution in found:
        assert re.search(rf"^(def|class) {name}\b", stub.source, re.MULTILINE)
        assert "# your code" in stub.source
        assert stub.source.rstrip().endswith(f"\ncheck({name})")
        assert not {"hide-input", "solution"} & set(tags(stub))
        assert re.search(rf"^(def|class) {name}\b", solution.source, re.MULTILINE)
        assert f"\nassert check({name})\n" in solution.source + "\n"  # results may follow
        assert {"hide-input", "solution"} <= set(tags(solution))


@pytest.mark.slow
@each_lesson
def test_a_stub_is_told_that_it_is_not_done(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(LESSONS)
    monkeypatch.syspath_prepend(str(LESSONS))
    notebook = read(file)
    names: dict[str, Any] = {}
    for cell in notebook.cells:  # what stubs may name: modules, types
        if cell.cell_type == "code":
            tree = ast.parse(cell.source)
            tree.body = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
            exec(compile(tree, file.name, "exec"), names)
    assert names["check"].__module__ == "checks", "expected: from checks.lesson_N import check"
    for name, stub, _ in exercises(notebook):
        capsys.readouterr()
        exec(stub.source, names)
        assert capsys.readouterr().out.startswith(f"{name}: not yet: "), name
        assert names["check"](names[name]) is None
