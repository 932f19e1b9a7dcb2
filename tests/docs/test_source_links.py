"""On the site, a link to a file of the repository opens the file's text at the linked name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from definitions import definitions

EXTENSIONS = Path(__file__).parents[2] / "docs/_ext"

CODE = """\
LIMIT = 3


class Cat:
    size: int = 1

    def purr(self):
        pass
"""


def test_definitions_are_found_with_their_lines():
    assert definitions(CODE) == {"LIMIT": 1, "Cat": 4, "Cat.size": 5, "Cat.purr": 7}


@pytest.mark.slow
def test_a_link_to_a_name_opens_its_line(tmp_path: Path):
    pytest.importorskip("myst_parser")
    (tmp_path / "docs").mkdir()
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo/cat.py").write_text(CODE, encoding="utf-8")
    (tmp_path / "docs/page.md").write_text(
        "# Page\n\n[`Cat.purr`](../zoo/cat.py#Cat.purr), [all](../zoo/cat.py), [here](#page)\n",
        encoding="utf-8",
    )
    (tmp_path / "docs/conf.py").write_text(
        f"import sys\nsys.path.insert(0, {str(EXTENSIONS)!r})\n"
        "extensions = ['myst_parser', 'sphinx.ext.linkcode', 'source_links']\n"
        "root_doc, include_patterns, myst_heading_anchors = 'docs/page', ['docs/*.md'], 1\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-c", "docs", ".", "out"]
    subprocess.run(command, cwd=tmp_path, check=True)
    page = (tmp_path / "out/docs/page.html").read_text(encoding="utf-8")
    assert 'href="../source/zoo/cat.py.html#Cat.purr"' in page
    assert 'href="../source/zoo/cat.py.html"' in page
    source = (tmp_path / "out/source/zoo/cat.py.html").read_text(encoding="utf-8")
    (line,) = re.findall(r'id="Cat\.purr"></span>(.*)', source)
    assert "purr" in line
