"""Fused multi-query attention in Triton, and the other kernels of a decode step.

    from mqa_kernels import attention

    out = attention(q, k, v)    # q (B, T, H, D); k, v (B, S, G, D)

For decoding a few rows, layer norms, projections and cache writes are fused too. The derivations
are in kernels/README.md. Nothing here depends on mqa_gpt.
"""

from mqa_kernels.fused_ops import (
    int8_linear,
    linear_residual,
    norm_argmax,
    norm_linear,
    norm_lm_head,
    norm_qkv_to_cache,
)
from mqa_kernels.launch import most_rows, runs_on
from mqa_kernels.ops import attention

__all__ = [
    "attention",
    "int8_linear",
    "linear_residual",
    "most_rows",
    "norm_argmax",
    "norm_linear",
    "norm_lm_head",
    "norm_qkv_to_cache",
    "runs_on",
]
