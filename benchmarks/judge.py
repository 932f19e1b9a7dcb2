"""Is an attention's answer as exact as it can be? FlashAttention's rule.

The error of an answer is its largest distance from attention in float64 on the same (rounded)
inputs. It may be twice that of plain PyTorch in the same dtype, for gradients three times, plus
1e-5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mqa_gpt.attention import reference_attention
from mqa_kernels import reference

FACTORS = {"out": 2.0, "lse": 2.0, "dq": 3.0, "dk": 3.0, "dv": 3.0}
SLACK = 1e-5

# Queries at a time, so that scores of long sequences fit into memory. Plain PyTorch gets long
# pieces: it rounds its share of dK and dV once per piece.
EXACT_PIECE, PLAIN_PIECE = 256, 2048

Attend = Callable[[Tensor, Tensor, Tensor, "int | Tensor"], Tensor]


class Verdict(NamedTuple):
    """An error, what the rule allows, and whether that is kept; NaN never is."""

    error: float
    allowed: float
    passed: bool


class Truth(NamedTuple):
    """What one row of the batch should be: exactly, and as plain PyTorch in the same dtype has it.

    Both map "out" (1, T, H, D) and, with gradients, "dq" (1, T, H, D), "dk" and "dv" (1, S, G, D).
    """

    row: int
    exact: dict[str, Tensor]
    plain: dict[str, Tensor]

    def judge(self, answers: Mapping[str, Tensor | None]) -> dict[str, Verdict]:
        """One verdict per answer; answers are of the whole batch."""
        return {
            name: judge(answer[self.row][None], self.plain[name], self.exact[name], FACTORS[name])
            for name, answer in answers.items()
            if answer is not None
        }


def judge(answer: Tensor, plain: Tensor, exact: Tensor, factor: float) -> Verdict:
    """The rule for one tensor."""
    error = (answer.double() - exact).abs().max().item()
    allowed = factor * (plain.double() - exact).abs().max().item() + SLACK
    return Verdict(error, allowed, error <= allowed)


def find_truth(
    q: Tensor, k: Tensor, v: Tensor, start: int, do: Tensor | None = None, row: int = -1
) -> Truth:
    """Compute one row of the batch both ways, with gradients if `do` (B, T, H, D) is given.

    Args:
        q, k, v, start: as in `mqa_kernels.attention`, one start for all rows.
        row: which one; the last by default, which a wrong stride misses by most.
    """
    q, k, v = (x[row][None].detach() for x in (q, k, v))
    do = None if do is None else do[row][None]
    wide_do = None if do is None else do.double()
    return Truth(
        row,
        by_pieces(exact_attention, q.double(), k.double(), v.double(), start, wide_do, EXACT_PIECE),
        by_pieces(plain_attention, q, k, v, start, do, PLAIN_PIECE),
    )


def exact_attention(q: Tensor, k: Tensor, v: Tensor, start: int | Tensor) -> Tensor:
    """Attention in the dtype of float64 arguments throughout; plain PyTorch's softmax is float32.

    q (B, T, H, D); k, v (B, S, G, D); returns (B, T, H, D).
    """
    B, T, H, D = q.shape
    S, G = k.shape[1], k.shape[2]
    probabilities = reference.scores_of(q, k, start, D**-0.5).softmax(-1)  # (B, T, H, S)
    grouped = probabilities.view(B, T, G, H // G, S)
    return torch.einsum("btgrs,bsgd->btgrd", grouped, v).reshape(B, T, H, D)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, start: int | Tensor) -> Tensor:
    """The model's reference with the usual scale."""
    return reference_attention(q, k, v, start, q.shape[-1] ** -0.5)


def by_pieces(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: int | Tensor,
    do: Tensor | None = None,
    piece: int = PLAIN_PIECE,
) -> dict[str, Tensor]:
    """An attention and, if `do` is given, its gradients, a piece of the queries at a time.

    Queries do not influence each other: outputs and dQ are joined, dK and dV are sums.

    Returns:
        "out" and, with `do`, "dq", "dk" and "dv", in q's dtype.
    """
    outs, dqs = [], []
    dk, dv = (torch.zeros(x.shape, dtype=torch.float64, device=x.device) for x in (k, v))
    for first in range(0, q.shape[1], piece):
        part = slice(first, first + piece)
        leaves = [x.detach().requires_grad_(do is not None) for x in (q[:, part], k, v)]
        out = attend(leaves[0], leaves[1], leaves[2], start + first)
        outs.append(out.detach())
        if do is not None:
            gradients = torch.autograd.grad(out, leaves, do[:, part])
            dqs.append(gradients[0])
            dk += gradients[1]
            dv += gradients[2]
    answers = {"out": torch.cat(outs, 1)}
    if do is not None:
        answers |= {"dq": torch.cat(dqs, 1), "dk": dk.to(k.dtype), "dv": dv.to(v.dtype)}
    return answers
