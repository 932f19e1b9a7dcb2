"""Links to the repository's files, such as `[text](../mqa_gpt/model.py#GPT.forward)`.

On a git host such a link opens the file. On the site it opens a page with the file's text, at the
definition of the name after `#`. The `[source]` links of the API reference lead to the same pages.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from definitions import definitions
from docutils import nodes
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx.application import Sphinx

SCHEME = "source:"
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(#[\w.]+)?(?=\))")
COPIED = (".svg", ".png", ".html")  # by Sphinx, for the browser to show


def mark_links(app: Sphinx, docname: str, source: list[str]) -> None:
    """In a page's Markdown, give the links to files that are no pages the scheme `source:`."""
    folder = (app.srcdir / docname).parent

    def marked(match: re.Match[str]) -> str:
        file = (folder / match[1]).resolve()
        if not file.is_file() or app.env.path2doc(file) or file.suffix in COPIED:
            return match[0]
        return SCHEME + file.relative_to(app.srcdir).as_posix() + (match[2] or "")

    source[0] = LINK.sub(marked, source[0])


def resolve_links(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Turn `source:` links into links to the pages that `source_pages` makes."""
    linked: set[str] = app.env.__dict__.setdefault("linked_sources", set())
    for link in doctree.findall(nodes.reference):
        if link.get("refuri", "").startswith(SCHEME):
            file, _, name = link["refuri"].removeprefix(SCHEME).partition("#")
            linked.add(file)
            page = app.builder.get_relative_uri(docname, f"source/{file}")
            link["refuri"] = page + (f"#{name}" if name else "")
            link["internal"] = True


def source_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """A page for every file that something links to, with an anchor at each definition."""
    for file in sorted(app.env.__dict__.get("linked_sources", ())):
        text = (app.srcdir / file).read_text(encoding="utf-8")
        try:
            lexer = get_lexer_for_filename(file, stripnl=False)
        except ClassNotFound:
            lexer = TextLexer()
        formatter = HtmlFormatter(linespans="line", nowrap=True)
        lines = highlight(text, lexer, formatter).split("\n")
        if file.endswith(".py"):
            for name, line in definitions(text).items():
                lines[line - 1] = f'<span id="{name}"></span>{lines[line - 1]}'
        body = "\n".join(lines)
        body = f'<h1>{file}</h1><div class="highlight"><pre>{body}</pre></div>'
        yield f"source/{file}", {"title": file, "body": body}, "page.html"


def linkcode_resolve(domain: str, info: dict[str, str]) -> str | None:
    """Where the API reference's `[source]` leads: the file in which an object is defined."""
    value: Any = sys.modules[info["module"]]
    for part in info["fullname"].split("."):
        value = getattr(value, part, None)
    try:
        value = inspect.unwrap(getattr(value, "fget", value))
        file = Path(inspect.getsourcefile(value) or "").resolve()
        root = Path(__file__).parents[2]
        return f"{SCHEME}{file.relative_to(root).as_posix()}#{value.__qualname__}"
    except (TypeError, ValueError, AttributeError):  # a constant, or not of this project
        return None


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the hooks; called by Sphinx."""
    app.config.linkcode_resolve = linkcode_resolve
    app.config.myst_url_schemes = {"http": None, "https": None, "mailto": None, "source": None}
    app.connect("source-read", mark_links)
    app.connect("doctree-resolved", resolve_links)
    app.connect("html-collect-pages", source_pages)
    return {"parallel_read_safe": False, "parallel_write_safe": False}
