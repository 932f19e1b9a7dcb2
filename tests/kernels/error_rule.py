"""FlashAttention's error rule, and where the kernels' tests run: on a GPU, or interpreted."""

from __future__ import annotations

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_as_accurate(ours: Tensor, plain: Tensor, exact: Tensor, factor: float = 2) -> None:
    """Our error is at most `factor` times that of plain PyTorch in the same dtype, plus 1e-5."""
    assert ours.dtype == plain.dtype
    assert ours.shape == exact.shape
    assert ours.isfinite().all()
    error, allowed = ((x.double() - exact).abs().max() for x in (ours, plain))
    assert error <= factor * allowed + 1e-5, f"error {error:.2e}, plain PyTorch's {allowed:.2e}"
