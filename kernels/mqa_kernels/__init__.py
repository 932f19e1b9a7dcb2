"""Multi-query attention and the decode step as kernels: in Triton for GPUs, in numba for CPUs.

    from mqa_kernels import attention

    out = attention(q, k, v)    # q (B, T, H, D); k, v (B, S, G, D), on a CUDA device

For decoding a few rows on a GPU, layer norms, projections and cache writes are fused too; on a CPU
`mqa_kernels.cpu` runs the whole model. The derivations are in kernels/README.md. Nothing here
depends on mqa_gpt.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "attention": "ops",
    "int8_linear": "fused_ops",
    "linear_residual": "fused_ops",
    "most_rows": "launch",
    "norm_argmax": "fused_ops",
    "norm_linear": "fused_ops",
    "norm_lm_head": "fused_ops",
    "norm_qkv_to_cache": "fused_ops",
    "runs_on": "launch",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import Triton when one of its kernels is first asked for: the CPU's do without it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"mqa_kernels.{_HOMES[name]}"), name)
