"""One HTML file that shows what the model does with a text: no server, no network."""

from mqa_gpt.explorer.data import collect
from mqa_gpt.explorer.page import explore, render

__all__ = ["collect", "explore", "render"]
