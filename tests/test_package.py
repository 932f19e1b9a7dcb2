"""The package itself: its public names come when they are asked for, and torch with them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mqa_gpt
from tests.cli.test_app import environment


def test_every_public_name_is_there_and_is_its_modules():
    for name in mqa_gpt.__all__:
        home = sys.modules[getattr(mqa_gpt, name).__module__]
        assert getattr(mqa_gpt, name) is getattr(home, name)
    assert dir(mqa_gpt) == sorted(mqa_gpt.__all__)


def test_what_type_checkers_see_is_what_there_is():
    """The names stand three times: for type checkers, for `import *` and for `__getattr__`."""
    tree = ast.parse(Path(mqa_gpt.__file__).read_text())
    seen = {
        node.module.removeprefix("mqa_gpt."): [alias.name for alias in node.names]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("mqa_gpt.")
    }
    assert seen == mqa_gpt._MODULES
    assert sorted(mqa_gpt.__all__) == sorted(name for names in seen.values() for name in names)


@pytest.mark.slow
def test_the_package_by_itself_imports_no_torch_and_the_command_only_what_all_commands_need():
    code = "import mqa_gpt, sys; assert 'torch' not in sys.modules; import mqa_gpt.cli.app; "
    code += "assert not sys.modules.keys() & {'numba', 'sympy', 'transformers'}; "  # seconds
    code += "mqa_gpt.GPT"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


def test_a_name_that_there_is_not_is_an_error_of_the_usual_kind():
    with pytest.raises(AttributeError, match="module 'mqa_gpt' has no attribute 'GPT2'"):
        mqa_gpt.GPT2  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'GPT2'"):
        exec("from mqa_gpt import GPT2")
