"""The package itself: its public names come when they are asked for, and torch with them."""

from __future__ import annotations

import subprocess
import sys

import pytest

import mqa_gpt
from tests.test_cli import environment


def test_every_public_name_is_there_and_is_its_modules():
    for name in mqa_gpt.__all__:
        home = sys.modules[getattr(mqa_gpt, name).__module__]
        assert getattr(mqa_gpt, name) is getattr(home, name)
    assert set(mqa_gpt.__all__) <= set(dir(mqa_gpt))


@pytest.mark.parametrize(
    "order", [["mqa_gpt.llm", "mqa_gpt.generate", "mqa_gpt"], ["mqa_gpt", "mqa_gpt.llm"]]
)
def test_generate_is_the_function_whatever_is_imported_first(order: list[str]):
    code = f"""
import {", ".join(order)}
from mqa_gpt import generate
from mqa_gpt.generate import check_request
assert callable(generate) and mqa_gpt.generate is generate
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


def test_the_package_by_itself_imports_no_torch():
    code = "import mqa_gpt, sys; assert 'torch' not in sys.modules; mqa_gpt.GPT"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


def test_a_name_that_there_is_not_is_an_error_of_the_usual_kind():
    with pytest.raises(AttributeError, match="module 'mqa_gpt' has no attribute 'GPT2'"):
        mqa_gpt.GPT2  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'GPT2'"):
        exec("from mqa_gpt import GPT2")
