"""Kernels broken on purpose are noticed: barriers, waits, fences and masks deleted one by one."""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest

pytest.importorskip("triton", reason="Triton is not available on this platform")

import triton

from tests.ptx import mutations
from tests.ptx.matrix import Case, case

EVERYTHING = os.environ.get("MQA_GPT_PTX") == "all"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not triton.__version__.startswith("3.7."), reason="other versions place barriers elsewhere"
    ),
]


class Broken(NamedTuple):
    """A kernel in a case that launches it.

    Attributes:
        places: mutation -> how many places can be mutated so, and how many of these unnoticed;
            none where it is not listed. Masks count only if they hold back a thread in this case.
    """

    kernel: str
    case: Case
    places: dict[str, tuple[int, int]]


BARRIER, COPIES = "without a barrier", "without waiting for copies"
PRODUCTS, FENCE = "without waiting for products", "without a fence of shared memory"
EARLIER = "without waiting for the kernel before"
STORE, LOAD, COPY = (f"{action} without a mask" for action in ("storing", "loading", "copying"))

# Why something may be deleted unnoticed. The race detector compares all accesses of the two epochs
# that a deleted barrier separated, so this is what it found, not an assumption:
#
# - PRIVATE: a layout is converted through shared memory, and each warp reads only what it wrote.
# - RING: a barrier before a copy into a slot of the ring that no warp has read since the barrier
#   before: the first copies, and those after a loop.
# - ONCE: the same in a loop that runs one step only.
# - END: the barrier after a loop. What follows writes elsewhere than the loop's last step reads.
# - DRAIN: the wait for copies after a loop. Those in flight are for steps that do not come, into
#   slots of the ring that what follows does not use. Or the wait for products after the first loop,
#   since another comes before the sums are used.
# - LOOP: the fence before a loop, each step of which has its own.
# - STEP: the copy would be for a step that does not come.
# - AGAIN: what the mask holds back is masked again before it is used: a score, or what is stored.
DROPOUT = case("train", B=1, T=9, S=200, H=4, G=1, D=64, start=[190], p=0.2)
KERNELS = [
    Broken(
        "qkv_kernel",
        case("qkv", B=2, T=3, H=4, G=1, D=64, lengths=[4, 0]),
        {BARRIER: (11, 1), EARLIER: (1, 0), STORE: (2, 0), LOAD: (3, 0)},  # PRIVATE
    ),
    Broken(
        "linear_kernel",
        case("linear", rows=5, K=4000, N=20),
        {
            BARRIER: (22, 2),  # RING
            COPIES: (2, 0),
            EARLIER: (1, 0),
            STORE: (1, 0),
            LOAD: (11, 1),  # AGAIN
            COPY: (26, 0),
        },
    ),
    Broken(
        "linear_kernel",
        case("linear", rows=8, K=1000, N=20, activation=None, int8=True),
        {
            BARRIER: (15, 2),  # RING
            COPIES: (5, 0),
            EARLIER: (1, 0),
            STORE: (1, 0),
            LOAD: (8, 2),  # AGAIN
            COPY: (18, 0),
        },
    ),
    Broken(
        "linear_kernel",  # wgmma, in 7 steps: the last one's slot is written after the loop
        case("linear", rows=20, K=880, N=70, shipped=4096),
        {
            BARRIER: (10, 4),  # RING
            COPIES: (2, 1),  # DRAIN
            PRODUCTS: (2, 0),
            FENCE: (1, 0),
            EARLIER: (1, 0),
            STORE: (16, 0),
            LOAD: (2, 0),
            COPY: (62, 2),  # STEP
        },
    ),
    Broken(
        "linear_kernel",  # in 8 steps: what is written after the loop is a slot that copies fill
        case("linear", rows=20, K=1024, N=70, shipped=4096, int8=True),
        {
            BARRIER: (10, 5),  # RING, END
            COPIES: (2, 0),
            PRODUCTS: (1, 0),
            FENCE: (1, 0),
            EARLIER: (1, 0),
            STORE: (16, 0),
            LOAD: (4, 0),
            COPY: (62, 2),  # STEP
        },
    ),
    Broken(
        "norm_kernel",
        case("linear", rows=17, K=880, N=5),
        {BARRIER: (5, 0), EARLIER: (1, 0), STORE: (1, 0), LOAD: (4, 0)},
    ),
    Broken(
        "argmax_kernel",
        case("argmax", rows=3, C=768, V=20),
        {
            BARRIER: (20, 2),  # RING
            COPIES: (2, 0),
            EARLIER: (1, 0),
            STORE: (1, 0),
            LOAD: (4, 0),
            COPY: (30, 0),
        },
    ),
    Broken(
        "choose_kernel",
        case("argmax", rows=3, C=100, V=40),
        {EARLIER: (1, 0), STORE: (2, 0), LOAD: (1, 0)},
    ),
    Broken(
        "combine_kernel",
        case("decode", B=1, T=1, S=600, H=32, G=1, D=128, start=[590]),
        {EARLIER: (1, 0), STORE: (1, 0), LOAD: (7, 0)},
    ),
    Broken(
        "forward_kernel",  # mma.sync
        case("decode", B=1, T=1, S=600, H=32, G=1, D=128, start=[590]),
        {
            BARRIER: (27, 3),  # RING, END, RING
            COPIES: (4, 0),
            EARLIER: (1, 0),
            STORE: (1, 0),
            COPY: (80, 10),  # STEP, AGAIN
        },
    ),
    Broken(
        "forward_kernel",  # wgmma, in loops of several steps
        case("decode", B=1, T=100, S=270, H=1, G=1, D=128, start=[130]),
        {
            BARRIER: (11, 3),  # RING, END, RING
            COPIES: (4, 0),
            PRODUCTS: (4, 0),
            FENCE: (4, 2),  # LOOP
            EARLIER: (1, 0),
            STORE: (3, 0),
            LOAD: (2, 0),
            COPY: (20, 10),  # STEP, AGAIN
        },
    ),
    Broken(
        "forward_kernel",  # wgmma, in splits without a masked step
        case("decode", B=1, T=3, S=1030, H=32, G=1, D=128, start=[1026]),
        {
            BARRIER: (11, 3),  # RING, RING, ONCE
            COPIES: (4, 0),
            PRODUCTS: (4, 0),
            FENCE: (4, 2),  # LOOP
            EARLIER: (1, 0),
            STORE: (5, 0),
            LOAD: (2, 0),
            COPY: (40, 0),
        },
    ),
    Broken(
        "dq_kernel",
        case("train", B=1, T=50, S=190, H=1, G=1, D=128, start=[130]),
        {
            BARRIER: (13, 2),  # END, RING
            COPIES: (4, 1),  # DRAIN
            PRODUCTS: (6, 1),  # DRAIN
            FENCE: (4, 2),  # LOOP
            STORE: (3, 0),
            LOAD: (8, 0),
            COPY: (36, 14),  # STEP
        },
    ),
    Broken(
        "dkv_kernel",
        case("train", B=1, T=70, S=160, H=2, G=1, D=128, start=[90]),
        {
            BARRIER: (11, 4),  # RING, END, RING, END
            COPIES: (4, 1),  # DRAIN
            PRODUCTS: (6, 1),  # DRAIN
            FENCE: (4, 2),  # LOOP
            STORE: (12, 0),
            LOAD: (12, 0),
            COPY: (24, 0),
        },
    ),
    Broken(
        "forward_kernel",
        DROPOUT,
        {
            BARRIER: (11, 3),  # RING, END, RING
            COPIES: (4, 0),
            PRODUCTS: (4, 0),
            FENCE: (4, 2),  # LOOP
            EARLIER: (1, 0),
            STORE: (3, 0),
            LOAD: (2, 0),
            COPY: (24, 0),
        },
    ),
    Broken(
        "dq_kernel",
        DROPOUT,
        {
            BARRIER: (11, 1),  # END
            COPIES: (4, 2),  # DRAIN
            PRODUCTS: (6, 0),
            FENCE: (4, 2),  # LOOP
            STORE: (4, 0),
            LOAD: (11, 0),
            COPY: (4, 2),  # STEP
        },
    ),
    Broken(
        "dkv_kernel",
        DROPOUT,
        {
            BARRIER: (9, 1),  # END
            COPIES: (4, 1),  # DRAIN
            PRODUCTS: (6, 0),
            FENCE: (4, 2),  # LOOP
            STORE: (8, 0),
            LOAD: (8, 0),
            COPY: (24, 6),  # STEP
        },
    ),
]


@pytest.mark.parametrize(
    ("broken", "mutation"),
    [
        pytest.param(broken, mutation, id=f"{broken.kernel}-{i}-{mutation}".replace(" ", "-"))
        for i, broken in enumerate(KERNELS if EVERYTHING else KERNELS[:1])
        for mutation in mutations.MUTATIONS
    ],
)
def test_broken_kernels_are_noticed(broken, mutation, compiling):
    places, unnoticed = compiling(mutations.mutate, mutation, broken.kernel, broken.case)
    expected = broken.places.get(mutation, (0, 0))
    assert (places, len(unnoticed)) == expected, f"unnoticed: {unnoticed}"
