"""The PTX of every shipped kernel, interpreted and judged by the error rule.

A sample runs by default, and everything with MQA_GPT_PTX=all (`make check-kernels`).
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton", reason="Triton is not available on this platform")

from tests.ptx import cases
from tests.ptx.machine import ORDERS
from tests.ptx.matrix import SAMPLE, everything, name_of

EVERYTHING = os.environ.get("MQA_GPT_PTX") == "all"

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", everything() if EVERYTHING else SAMPLE, ids=name_of)
def test_compiled_kernels_are_as_accurate_as_plain_pytorch(case, compiling):
    assert compiling(cases.run, *case)


@pytest.mark.parametrize("order", ORDERS[1:] if EVERYTHING else ["reverse"])
@pytest.mark.parametrize("case", SAMPLE if EVERYTHING else SAMPLE[3:4], ids=name_of)
def test_warps_may_run_in_any_order(case, order, compiling):
    assert compiling(cases.run, *case, order=order)
