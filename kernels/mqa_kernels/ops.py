"""The public function, and its registration with PyTorch's dispatcher and autograd."""

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

    Query t of row b stands at position start[b] + t and sees the slots up to it. Slots behind a
    row's last query, NaN included, have no influence. Softmax and sums are float32.

    Args:
        q: (B, T, H, D) in float32, bfloat16 or float16, D from 1 to 256.
        k, v: (B, S, G, D), G dividing H (1 in multi-query attention). All three may be views, such
            as parts of one projection's output, as long as D is contiguous.
        start: position of the first new token: one int, or (B,) integers, read on the device.
        scale: what the scores are multiplied by, from 1e-30 to 1e30; D^-0.5 if None.
        dropout_p: share of the probabilities that is dropped, the others being scaled up.
        lengths: (B,) integers: how many of its T tokens each row really has; None for all. What is
            beyond is not computed: its output is zero and it has no gradient.
        left_padding: (B,) integers: how many of each row's first slots are padding, which nobody
            sees; None for none. Positions count them: `start` is a slot as ever. A query that
            stands there itself sees nothing: its output is zero.
        seed: one int64 number on the device that decides what is dropped; drawn from PyTorch's
            generator if None.
        return_lse: also return the log-sum-exp of each query's scores.

    Returns:
        (B, T, H, D) in q's dtype; with `return_lse` also (B, T, H) float32, which has no gradient.

    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit, or there is no GPU (nor Triton's
            interpreter) to run on.
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
