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


# Why something may be deleted. The race detector compares all accesses of the two epochs that a
# deleted barrier separated, so this is what it found, not an assumption:
#
# - PRIVATE: a layout is converted through shared memory, and each warp reads only what it wrote.
# - RING: a barrier before a copy into a slot of the ring that no warp has read since the barrier
#   before: the first copies, and those after a loop.
# - END: the barrier after a loop. What follows writes elsewhere than the loop's last step reads.
# - DRAIN: the wait for copies after the last loop, which has left none in flight; the wait for
#   products after the first loop, since another comes before the sums are used.
# - LOOP: the fence before a loop, each step of which has its own.
BARRIER, COPIES = "without a barrier", "without waiting for copies"
PRODUCTS = "without waiting for products"
FENCE = "without a fence of shared memory"
KERNELS = [
    Broken(
        "qkv_kernel",
        [case("qkv", B=2, T=3, H=4, G=1, D=64, lengths=[4, 0])],
        {BARRIER: 1},  # PRIVATE
    ),
    Broken(
        "linear_kernel",
        [case("linear", rows=5, K=4000, N=20)],
        {BARRIER: 3},  # twice PRIVATE, RING
    ),
    Broken(
        "linear_kernel",
        [case("linear", rows=8, K=1000, N=20, activation=None, int8=True)],
        {BARRIER: 2},  # RING
    ),
    Broken(
        "argmax_kernel",
        [case("argmax", rows=3, C=768, V=20)],
        {BARRIER: 2},  # PRIVATE
    ),
    Broken(
        "forward_kernel",  # mma.sync
        [case("decode", B=1, T=1, S=600, H=32, G=1, D=128, start=[590])],
        {BARRIER: 3},  # twice RING, END
    ),
    Broken(
        "forward_kernel",  # wgmma: loops of several steps; splits without a masked step
        [
            case("decode", B=1, T=100, S=270, H=1, G=1, D=128, start=[130]),
            case("decode", B=1, T=3, S=1030, H=32, G=1, D=128, start=[1026]),
        ],
        {BARRIER: 1, FENCE: 2},  # END; LOOP
    ),
    Broken(
        "dq_kernel",
        [case("train", B=1, T=50, S=190, H=1, G=1, D=128, start=[130])],
        {BARRIER: 2, COPIES: 1, PRODUCTS: 1, FENCE: 2},  # END, RING; DRAIN; LOOP
    ),
    Broken(
        "dkv_kernel",
        [
            case("train", B=1, T=70, S=160, H=2, G=1, D=128, start=[90]),
            case("train", B=1, T=300, S=300, H=1, G=1, D=128, start=[0]),
        ],
        {BARRIER: 3, COPIES: 1, FENCE: 2},  # RING, twice END; DRAIN; LOOP
    ),
]
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
