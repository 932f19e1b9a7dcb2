"""What the tests of the fused kernels have in common: random inputs, shapes, marks."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from tests.kernels.error_rule import DEVICE, DTYPES

EPS = 1e-5
MARKS = [
    pytest.mark.slow,
    pytest.mark.usefixtures("new_memory_is_nan"),
    # NumPy warns where exp overflows to infinity, which is right: the sigmoid of that is 0.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),
]


def randoms(dtype, *shapes, seed=0):
    """Random tensors of these shapes, and the same in float64."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]
    return made, [x.double() for x in made]


def norm_inputs(dtype, rows, C, N, seed=0):
    """x, norm_weight, norm_bias, eps, weight, bias; and the same in float64."""
    made, wide = randoms(dtype, (rows, C), (C,), (C,), (N, C), (N,), seed=seed)
    return [*made[:3], EPS, *made[3:]], [*wide[:3], EPS, *wide[3:]]


def int8_weight(N, K, seed=1):
    """An int8 weight (N, K) and its rows' scales (N,); the same with the scales in float64.

    All integers up to 127 occur, and the scales differ by a factor of 100.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, (N, K), generator=generator).to(DEVICE, torch.int8)
    scale = torch.logspace(-4, -2, N, device=DEVICE)[torch.randperm(N, generator=generator)]
    return (weight, scale), (weight, scale.double())


def cases(few, many):
    """Shapes with up to 16 rows in every dtype, and with more in 16 bits."""
    every = [*product(few, DTYPES), *product(many, DTYPES[1:])]
    return pytest.mark.parametrize(("shape", "dtype"), every, ids=str)
