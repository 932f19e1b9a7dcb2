"""Kernels broken on purpose are noticed: barriers, waits, fences and masks deleted one by one."""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest

pytest.importorskip("triton", reason="Triton is not available on this platform")

import triton

from tests.ptx import mutations
from tests.ptx.matrix import Case, case
from tests.ptx.mutations import MUTATIONS

EVERYTHING = os.environ.get("MQA_GPT_PTX") == "all"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not triton.__version__.startswith("3.7."), reason="other versions place barriers elsewhere"
    ),
]


class Broken(NamedTuple):
    """A kernel, the cases that run it, and what may be deleted from it unnoticed, and why.

    A mutation counts as noticed if one of the cases fails.
    """

    kernel: str
    cases: list[Case]
    redundant: dict[str, int]


# Why a barrier may be deleted. The race detector compares all accesses of the two epochs that the
# deletion joins, so each of these is what it found, not an assumption:
#
# - PRIVATE: a layout is converted through shared memory, and each warp reads only what it wrote.
# - RING: a barrier before a copy into a slot of the ring that no warp has read since the last
#   barrier: the first copies, and those after a loop.
# - END: the barrier after a loop. What follows writes elsewhere than the loop's last step reads.
#
# Fences before a loop are redundant because each step of the loop has its own.
BARRIER, FENCE = "without a barrier", "without a fence before wgmma"
KERNELS = [
    Broken("qkv_kernel", [case("qkv", B=2, T=3, H=4, G=1, D=64, lengths=[4, 0])], {BARRIER: 1}),
]  # fmt: skip
# A mask is needed at the edges only, so that some may be deleted in any one case.
MASKS = ("storing without a mask", "loading without a mask")


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("broken", KERNELS if EVERYTHING else KERNELS[:1], ids=lambda x: x.kernel)
def test_broken_kernels_are_noticed(broken, mutation, compiling):
    found = [compiling(mutations.unnoticed, mutation, broken.kernel, each) for each in broken.cases]
    total = found[0][0]
    unnoticed = set.intersection(*(set(places) for _, places in found))
    if mutation in MASKS:
        assert total == 0 or len(unnoticed) < total
    else:
        assert len(unnoticed) <= broken.redundant.get(mutation, 0), f"{unnoticed} of {total}"
