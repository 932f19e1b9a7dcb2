"""Checks of lesson 7: changing a head's basis, what rotary positions allow, the regression."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from checks import checker
from mqa_gpt.attention import attention_scores
from mqa_gpt.training.conversion import shared_head


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).double()


def _is_close(a: Any, b: Tensor) -> bool:
    return isinstance(a, Tensor) and a.shape == b.shape and torch.allclose(a, b, atol=1e-8)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """(1, 1, T, T) of one head's queries and keys, (T, D) each, as the library computes them."""
    return attention_scores(q[None, :, None], k[None, :, None], 0, q.shape[1] ** -0.5)


def _change_basis(f: Callable[..., Any]) -> str | None:
    for T, D in ((5, 3), (7, 4)):
        q, k, R = _random(T, D), _random(T, D + 1)[:, :D], _random(D, D)
        new_q, new_k = f(q, k, R)
        inverse = torch.linalg.inv(R)
        if not _is_close(new_k, k @ inverse.T):
            if _is_close(new_k, k @ inverse):
                return "the keys are rows here: for R^-1 k of each row, compute k @ R^-1 transposed"
            if _is_close(new_k, k @ R.T) or _is_close(new_k, k @ R):
                return "the keys are multiplied by R; they need its inverse, torch.linalg.inv(R)"
            return "the keys are not R^-1 k"
        if not torch.allclose(_scores(new_q, new_k), _scores(q, k)):
            if _is_close(new_q, q @ R.T):
                return (
                    "the keys are right; the queries are R q, and it must be R^T q: q @ R as rows"
                )
            return "the keys are right, but the scores change: the queries must become R^T q"
    return None


def _turn(angle: float) -> Tensor:
    """The rotation of a plane, (2, 2)."""
    cos, sin = math.cos(angle), math.sin(angle)
    return torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)


def _survives_rotation(f: Callable[..., Any]) -> str | None:
    stretch = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    cases = {
        "twice the identity": (2 * torch.eye(2, dtype=torch.float64), True),
        "another rotation": (_turn(1.0), True),
        "a rotation times 3": (3 * _turn(-0.4), True),
        "a matrix that stretches one direction": (stretch, False),
        "a random matrix": (_random(2, 2), False),
    }
    for name, (R, right) in cases.items():
        for angle in (0.3, 1.2):
            got = f(R, _turn(angle))
            if got is None or bool(got) != right:
                return (
                    f"for R {name} it gives {got}, and it should be {right}: compare "
                    "R Z R^-1 with Z, the rotation, by torch.allclose"
                )
    return None


def _regression(f: Callable[..., Any]) -> str | None:
    for H, D, C in ((3, 2, 7), (4, 3, 11)):
        heads = _random(H, D, C)
        alike = torch.eye(C, dtype=torch.float64)
        K, right = shared_head(heads, torch.eye(D, dtype=torch.float64).expand(H, D, D), alike)
        for k_h, wanted in zip(heads, right, strict=True):
            got = f(k_h, K)
            if _is_close(got, wanted):
                continue
            if _is_close(got, wanted.T):
                return "this is R transposed: K_h is about R K, so R stands on the left"
            if _is_close(got, k_h @ K.T):
                return "K_h K^T is right if the rows of K are orthonormal; divide by K K^T"
            return f"for D = {D}, C = {C} it is not the least-squares solution, K_h K^T (K K^T)^-1"
    return None


check = checker(
    change_basis=(_change_basis, "The scores do not know in which basis a head writes its keys."),
    survives_rotation=(
        _survives_rotation,
        "With rotary positions, only rotations and scalings of each plane are free.",
    ),
    regression=(_regression, "This is the library's R_h, where all directions of x are alike."),
)
