"""The names that a Python file defines, to which documents link: `model.py#GPT.forward`."""

from __future__ import annotations

import ast


def definitions(text: str) -> dict[str, int]:
    """The line of each class, function and assignment at the top of a module or a class."""
    found = {}

    def walk(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found[prefix + node.name] = node.lineno
                if isinstance(node, ast.ClassDef):
                    walk(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Name):
                        found[prefix + target.id] = node.lineno

    walk(ast.parse(text).body, "")
    return found
