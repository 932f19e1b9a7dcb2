"""`attention`, and its registration as a PyTorch operator with a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from mqa_kernels.backward import backward
from mqa_kernels.forward import forward


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: int | Tensor = 0,
    scale: float | None = None,
    dropout_p: float = 0.0,
    *,
    lengths: Tensor | None = None,
    left_padding: Tensor | None = None,
    seed: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of H query heads over G shared key/value heads, fused and differentiable.

    Query t of row b is at position start[b] + t and sees the slots up to that position. Slots after
    a row's last query are not read; they may hold NaN. Scores, softmax and sums are float32.

    Args:
        q: (B, T, H, D) in float32, bfloat16 or float16, D from 1 to 256.
        k, v: (B, S, G, D), G dividing H (1 in multi-query attention). q, k and v may be views, such
            as parts of one projection's output, as long as D is contiguous.
        start: position of the first new token: an int, or (B,) integers, read on the device.
        scale: factor of the scores, between 1e-30 and 1e30; D^-0.5 if None.
        dropout_p: share of the probabilities to drop; the others are scaled by 1 / (1 - dropout_p).
        lengths: (B,) integers: how many of the T tokens are valid in each row; all if None. The
            others are not computed: their output and gradients are zero.
        left_padding: (B,) integers: how many of each row's first slots are padding, which no query
            sees; 0 if None. `start` still counts all slots. A query that is itself padding sees
            nothing: its output is zero.
        seed: (1,) int64 on the device, decides what is dropped; drawn from PyTorch's generator if
            None.
        return_lse: also return the natural log-sum-exp of each query's scores.

    Returns:
        (B, T, H, D) in q's dtype; with `return_lse` also (B, T, H) float32, which has no gradient.

    Raises:
        ValueError: shapes, dtypes, devices or strides do not match, or there is neither a GPU nor
            Triton's interpreter to run on.
    """
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p is {dropout_p}: it must be at least 0 and below 1")
    if dropout_p > 0 and seed is None:
        seed = torch.randint(2**31 - 1, (1,), device=q.device)
    starts, offset = (start, 0) if isinstance(start, Tensor) else (None, start)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = attention_forward(
        q, k, v, starts, offset, lengths, left_padding, scale, dropout_p, seed
    )
    return (out, lse) if return_lse else out


attention_forward = torch.library.custom_op(
    "mqa_kernels::attention_forward", forward, mutates_args=()
)
attention_backward = torch.library.custom_op(
    "mqa_kernels::attention_backward", backward, mutates_args=()
)


@attention_forward.register_fake
def _(q, k, v, start, offset, lengths, left_padding, scale, dropout_p, seed):
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        q.new_empty(q.shape[:3], dtype=torch.float32),
    )


@attention_backward.register_fake
def _(do, q, k, v, out, lse, start, offset, lengths, left_padding, scale, dropout_p, seed):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, start, offset, lengths, left_padding, scale, dropout_p, seed = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, start, lengths, left_padding, seed)
    ctx.offset, ctx.scale, ctx.dropout_p = offset, scale, dropout_p


def _differentiate(ctx, do, _):
    q, k, v, out, lse, start, lengths, left_padding, seed = ctx.saved_tensors
    gradients = attention_backward(
        do, q, k, v, out, lse, start, ctx.offset, lengths, left_padding,
        ctx.scale, ctx.dropout_p, seed,
    )  # fmt: skip
    return *gradients, None, None, None, None, None, None, None


attention_forward.register_autograd(_differentiate, setup_context=_save)
