"""Is the answer of an attention as exact as it can be? FlashAttention's rule.

The error is the largest distance from attention in float64 on the same (rounded) inputs. It may be
twice that of plain PyTorch in the same dtype, three times for gradients, plus 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mqa_gpt.attention import reference_attention
from mqa_kernels import reference

FACTORS = {"out": 2.0, "dq": 3.0, "dk": 3.0, "dv": 3.0}
SLACK = 1e-5

# Queries at a time, so that the scores of long sequences fit into memory. Plain PyTorch gets long
# pieces, since it rounds dK and dV once per piece.
EXACT_PIECE, PLAIN_PIECE = 256, 2048

Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]
Answers = dict[str, Tensor]


class Verdict(NamedTuple):
    """An error, what the rule allows, and whether it passes; NaN never does."""

    error: float
    allowed: float
    passed: bool


class Truth(NamedTuple):
    """The last row of the batch, which a wrong stride misses by most, in float64 and as plain
    PyTorch computes it in the inputs' dtype.

    Both map "out" (1, T, H, D) and, with gradients, "dq" (1, T, H, D), "dk" and "dv" (1, S, G, D).
    """

    exact: Answers
    plain: Answers

    def judge(self, answers: Answers) -> dict[str, Verdict]:
        """A verdict on each answer, which is of the whole batch."""
        verdicts = {}
        for name, answer in answers.items():
            exact = self.exact[name]
            error = (answer[-1:].double() - exact).abs().max().item()
            allowed = FACTORS[name] * (self.plain[name].double() - exact).abs().max().item() + SLACK
            verdicts[name] = Verdict(error, allowed, error <= allowed)
        return verdicts


def find_truth(q: Tensor, k: Tensor, v: Tensor, start: int, do: Tensor | None = None) -> Truth:
    """Compute the last row both ways, with gradients if `do` (B, T, H, D) is given.

    Args:
        q, k, v, start: as in `mqa_kernels.attention`, one start for all rows.
    """
    q, k, v = (x[-1:].detach() for x in (q, k, v))
    do = None if do is None else do[-1:]
    wide_do = None if do is None else do.double()
    return Truth(
        by_pieces(exact_attention, q.double(), k.double(), v.double(), start, wide_do, EXACT_PIECE),
        by_pieces(plain_attention, q, k, v, start, do, PLAIN_PIECE),
    )


def exact_attention(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    """Attention in float64 throughout; plain PyTorch's softmax is float32.

    q (B, T, H, D); k, v (B, S, G, D); returns (B, T, H, D).
    """
    visible = reference.visible_slots(q, k, start)
    return reference.attention(q, k, v, visible, q.shape[-1] ** -0.5)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    """The model's reference attention, scaled by D^-0.5."""
    return reference_attention(q, k, v, start, q.shape[-1] ** -0.5)


def by_pieces(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, start: int, do: Tensor | None, piece: int
) -> Answers:
    """An attention and, if `do` is given, its gradients, a piece of the queries at a time.

    Queries do not influence each other: outputs and dQ are concatenated, dK and dV summed.

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
