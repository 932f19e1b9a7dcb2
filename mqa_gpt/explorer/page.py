"""render: the page itself, one HTML file with its style, script and data inside.

Everything that comes from a text travels as JSON in a block that browsers do not run, with `<`
escaped, and reaches the page as text only, never as HTML. The Content-Security-Policy allows this
style and this script, by their hashes, and nothing else: no request, no other code.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib.resources import files
from typing import Any

from mqa_gpt.explorer.data import collect
from mqa_gpt.llm import LLM


def explore(llm: LLM, prompt: str | None = None, **options: Any) -> str:
    """A page that shows how the model reads and continues a prompt, or fills a hole.

    Args:
        prompt, options: those of `mqa_gpt.explorer.data`, whose errors it raises.

    Returns:
        HTML that needs no server and makes no request; for 128 tokens of the demo less than 2 MB.
    """
    return render(collect(llm, prompt, **options))


def render(data: dict[str, Any]) -> str:
    """The page for what `collect` returned."""
    template, style = _read("page.html"), _read("page.css")
    script = _read("base.js") + _read("panels.js")
    pieces = {
        "STYLE": style,
        "STYLE_HASH": _hash(style),
        "SCRIPT": script,
        "SCRIPT_HASH": _hash(script),
        "DATA": json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    }
    return re.sub(r"\{\{([A-Z_]+)\}\}", lambda match: pieces[match[1]], template)


def _read(name: str) -> str:
    return files("mqa_gpt.explorer").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
