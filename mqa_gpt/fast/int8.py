"""8-bit weights: a quarter of float32's bytes, so up to four times the tokens per second where
reading the weights takes the time.

Each row of a weight matrix (an output channel of a linear layer, a token of the embedding) is kept
as integers q from -127 to 127 and one float32 scale s, with w close to s q and s = max |w| / 127.
Rounding moves a weight by at most s / 2, and what the model computes by a little: `mqa-gpt verify
--quantize int8` says by how much. LayerNorms, biases and position embeddings stay as they are.

`quantize` makes this of a loaded model, `GPT.from_pretrained(..., quantize="int8")` of a checkpoint
while it is read. Saved like any model, such a checkpoint loads here, and not in transformers. The
layers below are the definition and run anywhere; on a CPU `mqa_gpt.fast.compiled` is fast.

On a CUDA device kernels read the integers as they are, one byte per weight, for up to 64 rows (16
in float32): in fused steps (`mqa_gpt.fast.fused_step`), and in a layer by itself. With more rows a
layer converts all its weights to floats in every call: in 16 bits it moves 1 + 2 + 2 bytes per
weight where a plain layer moves 2. From some hundred rows on, as in a prefill, that hardly counts
next to the arithmetic; for decoding a number of rows in between, plain weights are better.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mqa_gpt.attention import HAS_TRITON
from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import InputError

if TYPE_CHECKING:
    from mqa_gpt.model import GPT

METHODS = ("int8",)

# In `config.json`, under the key that transformers uses for its own methods. Without their
# "quant_method" it refuses the checkpoint; with a name that it does not know, it would take the
# integers for the weights.
CONFIG_KEY = "quantization_config"
CONFIG_ENTRY = {"mqa_gpt": "int8"}


def check_method(method: str | None) -> None:
    """InputError unless `method` is one of `METHODS`, or None for none."""
    if method is not None and method not in METHODS:
        raise InputError(
            f"quantize is {method!r}: expected {' or '.join(METHODS)}; leave it out to keep the "
            "weights as they are"
        )


def says_quantized(config: GPTConfig) -> bool:
    """Whether a config is that of a saved 8-bit model."""
    return config.extra.get(CONFIG_KEY) == CONFIG_ENTRY


def is_quantized(model: GPT) -> bool:
    """Whether the weights are int8."""
    return isinstance(model.transformer.wte, Int8Embedding)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (N, K) -> integers (N, K) int8 and their scales (N,) float32."""
    if weight.is_meta:  # the operations below would make torch import a compiler: two seconds
        integers = torch.empty(weight.shape, dtype=torch.int8, device="meta")
        return integers, torch.empty(len(weight), dtype=torch.float32, device="meta")
    weight = weight.detach().float()
    # Not by `abs`, which would copy the weights once more.
    scale = torch.maximum(weight.amax(1), -weight.amin(1)) / 127  # (N,)
    # A row of zeros has no scale; NaN and infinity must not become harmless numbers.
    divisor = torch.where(scale == 0, 1.0, scale)[:, None]  # (N, 1)
    return (weight / divisor).round_().to(torch.int8), scale


class _Int8(nn.Module):
    """A weight of 8-bit integers with a float32 scale per row, in a model of any dtype."""

    weight_scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        integers, scale = quantize_rows(weight)
        # A parameter, so that one which two layers share stays shared when the model is moved.
        self.weight = nn.Parameter(integers, requires_grad=False)
        self.register_buffer("weight_scale", scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> _Int8:
        scale = self.weight_scale
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        self.weight_scale = scale.to(self.weight.device)  # as exact as before `model.to(dtype)`
        return self


def reads_integers(device: torch.device, dtype: torch.dtype, rows: int) -> bool:
    """Whether a kernel, which has no gradient, computes this many rows."""
    if not HAS_TRITON or device.type != "cuda" or torch.is_grad_enabled():
        return False
    from mqa_kernels.launch import MAX_ROWS

    return 1 <= rows <= MAX_ROWS.get(dtype, 0)


class Int8Linear(_Int8):
    """`nn.Linear` with 8-bit weights, computed as the product with the weights s q.

    Attributes:
        weight: (N, K) int8.
        weight_scale: (N,) float32.
        bias: (N,) in the model's dtype, or None.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.weight)
        self.train(linear.training)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N) in the dtype of x."""
        rows = x.numel() // x.shape[-1]
        if self.weight.is_contiguous() and reads_integers(x.device, x.dtype, rows):
            from mqa_kernels import int8_linear

            x_2d = x.reshape(rows, -1).contiguous()  # (R, K)
            y = int8_linear(x_2d, self.weight, self.weight_scale, self.bias)  # (R, N)
            return cast(Tensor, y.view(*x.shape[:-1], -1))
        # Multiplied in float32, then rounded to x's dtype: (N, K) for the time of the product.
        weight = torch.empty_like(self.weight, dtype=x.dtype)
        torch.mul(self.weight, self.weight_scale[:, None], out=weight)
        return F.linear(x, weight, self.bias)


class Int8Embedding(_Int8):
    """`nn.Embedding` with 8-bit weights.

    Attributes:
        weight: (V, C) int8.
        weight_scale: (V,) float32.
        dtype: of what it gives.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__(embedding.weight)
        self.train(embedding.training)
        self.dtype = embedding.weight.dtype

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> (B, T, C)."""
        # F.embedding, like the plain layer, refuses ids outside the vocabulary.
        rows = F.embedding(ids, self.weight)  # (B, T, C) int8
        return (rows * self.weight_scale[ids][..., None]).to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Int8Embedding:
        super()._apply(fn, *args, **kwargs)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype  # `model.to(dtype)` means this too
        return self


def quantize(model: GPT) -> None:
    """Replace a model's linear layers and token embedding by their 8-bit forms, one by one.

    The plain weights are given up. A head that is tied to the embedding stays so.

    Raises:
        ValueError: they are 8-bit already.
    """
    if is_quantized(model):
        raise ValueError("the model's weights are 8-bit integers already")
    transformer = model.transformer
    tied = model.lm_head.weight is transformer.wte.weight
    transformer.set_submodule("wte", Int8Embedding(transformer.wte))
    # By name, because a list of the layers would keep all their weights to the end.
    names = [name for name, child in model.named_modules() if isinstance(child, nn.Linear)]
    for name in names:
        model.set_submodule(name, Int8Linear(cast(nn.Linear, model.get_submodule(name))))
    if tied:
        tie_head(model)


def tie_head(model: GPT) -> None:
    """Make the head's weights, plain or 8-bit, those of the embedding."""
    for name in ("weight", "weight_scale"):
        if hasattr(model.transformer.wte, name):
            setattr(model.lm_head, name, getattr(model.transformer.wte, name))
