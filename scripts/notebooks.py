"""Write the lessons as Jupyter notebooks (`make lessons`), with the checks that they import."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import jupytext

LESSONS = Path(__file__).parents[1] / "docs/lessons"
LINK = re.compile(r"(\]\([1-9]-[a-z-]+)\.md")  # to another lesson


def write_notebooks(folder: Path) -> list[Path]:
    """A notebook in `folder` for each lesson; the code of solutions and pictures is folded."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(LESSONS / "checks", folder / "checks", dirs_exist_ok=True)
    written = []
    for lesson in sorted(LESSONS.glob("[1-9]-*.md")):
        text = LINK.sub(r"\1.ipynb", lesson.read_text(encoding="utf-8"))
        notebook = jupytext.reads(text, fmt="md:myst")
        for cell in notebook.cells:
            if "hide-input" in cell.metadata.get("tags", []):
                cell.metadata["jupyter"] = {"source_hidden": True}
        written.append(folder / f"{lesson.stem}.ipynb")
        jupytext.write(notebook, written[-1])
    return written


if __name__ == "__main__":
    for path in write_notebooks(Path(sys.argv[1])):
        print(path)
