"""Imports run one way: what a reader meets first knows nothing of what comes after it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mqa_gpt"

# From the ground up; a module imports from its own layer and those below. The book comes first.
LAYERS = [
    {"errors"},
    {"config", "sampling", "attention", "cache", "model", "tokenizer", "fim"},
    {"machine", "progress"},
    {"fast"},
    {"checkpoints"},
    {"generation"},
    {"llm"},
    {"verify", "integrations"},
    {"bench"},
    {"training", "research", "evaluation", "server"},
    {"explorer"},
    {"cli"},
    {"__init__", "__main__"},
]
# The book's files in reading order: none imports one that is read later.
BOOK = ["config", "attention", "cache", "model", "tokenizer", "fim", "sampling"]

# For the users' sake these methods of the book look back, inside the function.
LOOKS_BACK = {
    "model.py": {"mqa_gpt.checkpoints.load", "mqa_gpt.checkpoints.save"},
    "tokenizer.py": {"mqa_gpt.checkpoints.hub", "mqa_gpt.checkpoints.tokenizer_files"},
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def place(name: str) -> str:
    """The part of the package that a module belongs to: "mqa_gpt.fast.int8" -> "fast"."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(file: Path) -> set[str]:
    """The modules of the package that a file imports, anywhere and for types too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module.split(".")[0] == "mqa_gpt":
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found |= {name for name in names if is_module(name)} or {node.module}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.split(".")[0] == "mqa_gpt"}
    return found


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("file", modules(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_module_imports_from_its_own_layer_and_those_below(file: Path) -> None:
    if file == PACKAGE / "__init__.py":
        return  # hands on names from everywhere
    height = {name: level for level, layer in enumerate(LAYERS) for name in layer}
    own = place(module_name(file))
    allowed = LOOKS_BACK.get(str(file.relative_to(PACKAGE)), set())
    above = {name for name in imports(file) - allowed if height[place(name)] > height[own]}
    assert above == set()
    siblings = {
        name for name in imports(file) if place(name) != own and height[place(name)] == height[own]
    }
    assert siblings == set() or own in BOOK


def test_what_looks_back_does_so_inside_a_function() -> None:
    for name, looked_at in LOOKS_BACK.items():
        tree = ast.parse((PACKAGE / name).read_text())
        at_once = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
        assert at_once.isdisjoint(looked_at), name


def test_the_book_is_read_in_the_order_of_its_imports() -> None:
    for file in (PACKAGE / f"{name}.py" for name in BOOK):
        later = BOOK[BOOK.index(file.stem) + 1 :]
        assert {place(name) for name in imports(file)}.isdisjoint(later), file.stem


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {}
    for file in modules():
        name = module_name(file).removesuffix(".__init__")
        if name != "mqa_gpt":
            allowed = LOOKS_BACK.get(str(file.relative_to(PACKAGE)), set())
            graph[name] = imports(file) - allowed - {"mqa_gpt"}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, (*path, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_kernels_know_nothing_of_the_package() -> None:
    for file in (ROOT / "kernels").rglob("*.py"):
        assert imports(file) == set(), file
