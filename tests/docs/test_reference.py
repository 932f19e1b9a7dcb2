"""The API reference covers the packages that have a page in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs/api").glob("*.md"))
PACKAGES = [page.stem for page in PAGES if (ROOT / "mqa_gpt" / page.stem).is_dir()]


def documented(page: str) -> set[str]:
    text = (ROOT / f"docs/api/{page}.md").read_text(encoding="utf-8")
    return set(re.findall(r"automodule:: (\S+)", text))


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_of_the_package_is_in_it(package: str):
    modules = {file.stem for file in (ROOT / "mqa_gpt" / package).glob("[!_]*.py")}
    assert documented(package) == {f"mqa_gpt.{package}.{module}" for module in modules}


def test_the_packages_are_found():
    assert {"generation", "research", "training"} <= set(PACKAGES)
