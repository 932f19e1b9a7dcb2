"""The tour's drawings show what the code computes."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from mqa_gpt import GPT
from mqa_gpt.attention import causal_mask
from mqa_gpt.generation.prefill import prefill
from tests.helpers import tiny_config

IMAGES = Path(__file__).parents[2] / "docs/images"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("file", sorted(IMAGES.glob("*.svg")), ids=lambda file: file.name)
def test_a_drawing_has_a_title_and_asks_for_nothing_else(file: Path):
    root = ElementTree.parse(file).getroot()
    assert (root.findtext(f"{SVG}title") or "").strip()
    assert not [node.tag for node in root.iter() if node.tag in (f"{SVG}image", f"{SVG}script")]
    assert not re.search(r"(href|src|url)\W+https?:", file.read_text(encoding="utf-8"))


def test_the_cache_is_drawn_as_it_is_filled():
    drawing = (IMAGES / "cache.svg").read_text(encoding="utf-8")
    before, after = drawing.split("After one decode step")
    lengths, then = (
        [int(n) for n in re.findall(r"monospace\" font-size=\"13\">(\d+)<", half)]
        for half in (before, after)
    )
    model = GPT(tiny_config()).eval()
    cache = model.new_cache(3, 10)
    ids = prefill(model, cache, [[1] * n for n in lengths]).argmax(-1)
    assert f"end = {cache.end}<" in before
    assert cache.start.tolist() == lengths
    with torch.inference_mode():
        model(ids[:, None], cache=cache)
    assert cache.lengths.tolist() == then
    assert f"append returns S = {cache.end} slots" in after
    new = re.findall(r'<rect x="(\d+)" y="\d+"[^>]*fill="#d9822b"', after)
    assert [(int(x) - 116) // 44 for x in new] == lengths  # a new token's slot: its row's old end


def test_the_tile_hides_what_the_causal_mask_hides():
    drawing = (IMAGES / "tile.svg").read_text(encoding="utf-8")
    cells = re.findall(r'<rect [^>]*fill="(#cfe0f5|url\(#masked\))"', drawing)
    drawn = torch.tensor([fill == "#cfe0f5" for fill in cells]).view(2, 4, 8)  # position, head, key
    assert torch.equal(drawn, causal_mask(6, 2, 8, torch.device("cpu"))[0, :, None].expand(2, 4, 8))
