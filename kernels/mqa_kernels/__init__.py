"""Fused attention for one key/value head shared by many query heads, in Triton.

    from mqa_kernels import attention

    out = attention(q, k, v)    # q (B, T, H, D); k, v (B, S, G, D)

The derivation is in kernels/README.md. Nothing here depends on mqa_gpt.
"""

from mqa_kernels.launch import runs_on
from mqa_kernels.ops import attention

__all__ = ["attention", "runs_on"]
