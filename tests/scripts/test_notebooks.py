"""`make lessons` writes notebooks whose links, checks and solutions are in place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("jupytext")

import notebooks

LESSON = """\
---
jupytext:
  text_representation: {extension: .md, format_name: myst}
kernelspec: {name: python3, display_name: Python 3}
---

# 1. One

[Next](2-two.md), [the tour](../architecture.md)

```{code-cell} python
print(1)
```

```{code-cell} python
:tags: [hide-input, solution]
print(2)
```
"""


def test_a_lesson_becomes_a_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lessons = tmp_path / "lessons"
    (lessons / "checks").mkdir(parents=True)
    (lessons / "checks/__init__.py").touch()
    (lessons / "README.md").write_text("# Lessons\n", encoding="utf-8")
    (lessons / "1-one.md").write_text(LESSON, encoding="utf-8")
    monkeypatch.setattr(notebooks, "LESSONS", lessons)
    (path,) = notebooks.write_notebooks(tmp_path / "notebooks")
    assert path.name == "1-one.ipynb"
    assert (tmp_path / "notebooks/checks/__init__.py").exists()
    notebook = json.loads(path.read_text(encoding="utf-8"))
    text, code, solution = notebook["cells"]
    assert "[Next](2-two.ipynb), [the tour](../architecture.md)" in "".join(text["source"])
    assert (code["cell_type"], code["source"]) == ("code", ["print(1)"])
    assert "jupyter" not in code["metadata"]
    assert solution["metadata"]["jupyter"] == {"source_hidden": True}
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
