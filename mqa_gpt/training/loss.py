"""The next-token loss from hidden states, without the logits of all tokens at once.

With V 49,152, the float32 logits of 2,048 tokens take 400 MB, and their gradient as much again.
Here a chunk of tokens has its logits computed, turned into losses and then, in the same memory,
into their gradient, which the two products of the backward pass consume at once. Liger-Kernel and
`torch.nn.functional.linear_cross_entropy` (torch 2.13 and later) do the same; the latter gives
either a mean or each token's loss, and in the dtype of its input: in bfloat16 a loss of 10.98 is
10.88.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100  # the label of a token that is not trained on, as in transformers

# Bytes of one chunk's logits: on a CPU few enough for its caches, on a GPU enough to keep it busy.
CPU_CHUNK_BYTES, CHUNK_BYTES = 2**25, 2**29


class TokenLoss(NamedTuple):
    """The loss of one batch in nats, float32 (float64 for a float64 model).

    Attributes:
        sum: (), over the tokens that count; differentiable.
        per_token: in the shape of the labels, 0 where ignored; without gradient.
    """

    sum: Tensor
    per_token: Tensor


def next_token_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, excluded: Tensor | None = None
) -> TokenLoss:
    """Cross-entropy of `hidden @ weight.T` with the labels, one chunk of tokens at a time.

    The products run in the dtype of `hidden`, or autocast's; the softmax and all sums are float32.
    The gradient is computed with the loss and kept, so `backward` can run once.

    Args:
        hidden: (..., C) states after the final norm.
        weight: (V, C), the vocabulary projection `lm_head.weight`.
        labels: (...) int64, the token after each state, or `IGNORED` (-100).
        excluded: (...) int64, a token that is no choice there, or -100; the label always is one.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    states = hidden.flatten(0, -2).to(dtype)  # (N, C)
    loss, per_token = _TokenLoss.apply(  # type: ignore[no-untyped-call]
        states, weight, labels.flatten(), None if excluded is None else excluded.flatten()
    )
    return TokenLoss(loss, per_token.view(labels.shape))


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, excluded: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """hidden (N, C), weight (V, C), labels and excluded (N,) -> () and (N,)."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        losses = torch.empty(len(labels), dtype=wide, device=hidden.device)
        chunk_bytes = CPU_CHUNK_BYTES if hidden.device.type == "cpu" else CHUNK_BYTES
        chunk = max(16, chunk_bytes // (len(weight) * wide.itemsize))
        with torch.autocast(hidden.device.type, enabled=False):
            narrow = weight.to(hidden.dtype)
            for start in range(0, len(labels), chunk):
                rows = slice(start, start + chunk)
                x, label = hidden[rows], labels[rows, None]  # (n, C), (n, 1)
                counts = label != IGNORED
                label = label.masked_fill(~counts, 0)
                # -log softmax(logits)[label]; the logits become the softmax in place.
                logits = (x @ narrow.T).to(wide)  # (n, V)
                if excluded is not None:
                    token = excluded[rows, None]  # (n, 1)
                    is_choice = (token == IGNORED) | (token == label)
                    away = torch.where(is_choice, 0.0, -torch.inf).to(wide)
                    logits.scatter_add_(1, token.clamp(min=0), away)
                logits -= logits.amax(1, keepdim=True)
                chosen = logits.gather(1, label)  # (n, 1)
                total = logits.exp_().sum(1, keepdim=True)  # (n, 1)
                losses[rows] = ((total.log() - chosen) * counts)[:, 0]
                # Its gradient is softmax - onehot(label).
                if grad_hidden is not None or grad_weight is not None:
                    logits *= counts / total
                    logits.scatter_add_(1, label, -counts.to(wide))
                    grad = logits.to(hidden.dtype)
                if grad_hidden is not None:
                    torch.mm(grad, narrow, out=grad_hidden[rows])
                if grad_weight is not None and grad.dtype == wide:
                    grad_weight.addmm_(grad.T, x)
                elif grad_weight is not None:
                    grad_weight += grad.T @ x
        ctx.grads, ctx.weight_dtype = (grad_hidden, grad_weight), weight.dtype
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of `forward`, scaled in place: the weight's is as large as the weight."""
        if ctx.grads is None:
            raise RuntimeError("the gradient of this loss is used up: compute the loss again")
        (grad_hidden, grad_weight), ctx.grads = ctx.grads, None
        if grad_hidden is not None:
            grad_hidden *= grad_sum
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_sum).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None
