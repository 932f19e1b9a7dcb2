"""Packed weights: what makes float32 inference on a CPU run at the speed of its memory.

A matrix product with few rows reads each weight once and does little with it, so its time is the
time to read the weights. The plain row-major layout keeps most CPUs from reading at full speed;
oneDNN's blocked layout, in which the weights of one vector instruction lie side by side, does not.

With AVX-512 the plain layout is read at full speed too by a product with one or two rows, and a
packed layer is slower there, though faster from about four rows on. A single prompt being the
common case, only the head is packed then, which gains from the third row and loses nothing before.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

UNPACKED = "load the model with GPT.from_pretrained, which leaves its weights as they are"


class PackedLinear(nn.Module):
    """`nn.Linear` for inference, with its weight in oneDNN's blocked layout only.

    Computes the same sums in another order, so results differ from `nn.Linear` by rounding. There
    is no `weight` to read or edit, and nothing to train, convert or save: `UNPACKED` says so.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = None if linear.bias is None else linear.bias.detach()
        # None: blocks for any number of rows.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features), without gradients."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(f"packed weights have no gradients: {UNPACKED}")
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(f"packed weights cannot be read or edited: {UNPACKED}")
        return super().__getattr__(name)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"packed weights cannot be saved: {UNPACKED}")

    def _apply(self, *args: Any, **kwargs: Any) -> PackedLinear:
        raise RuntimeError(f"packed weights cannot be moved or converted: {UNPACKED}")


def can_pack(module: nn.Module) -> bool:
    """Whether this torch has oneDNN's packed products and `module` is float32 on the CPU."""
    return all(_is_packable(p.dtype, p.device) for p in module.parameters())


def packing_bytes(module: nn.Module, dtype: torch.dtype, device: torch.device) -> int:
    """What `pack` takes beside the plain weights of `module`, if it is of this dtype and there.

    One layer at a time has its weight twice: plain and packed. A tied head, the last, keeps both.
    """
    if not _is_packable(dtype, device):
        return 0
    layers = (child for child in module.modules() if isinstance(child, nn.Linear))
    return max((layer.weight.numel() for layer in layers), default=0) * dtype.itemsize


def _is_packable(dtype: torch.dtype, device: torch.device) -> bool:
    operators = ("_reorder_linear_weight", "_linear_pointwise")
    return (
        dtype == torch.float32
        and device.type == "cpu"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and all(hasattr(torch.ops.mkldnn, name) for name in operators)
    )


def has_avx512() -> bool:
    """Whether torch computes with AVX-512 here."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def pack(module: nn.Module) -> None:
    """Replace the linear layers inside `module` by `PackedLinear`, one after the other.

    All of them, or with AVX-512 only `lm_head`. Their plain weights are given up, so the model can
    no longer be trained or saved. A weight that something else holds too, as the embedding holds
    that of a tied `lm_head`, stays there as well.

    Raises:
        ValueError: `can_pack` is false.
    """
    if not can_pack(module):
        raise ValueError(
            "only float32 models on a CPU, with a torch that has oneDNN, can be packed"
        )
    # By name, because a list of the layers would keep all their weights to the end.
    names = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    if has_avx512():
        names = [name for name in names if name == "lm_head"]
    for name in names:
        module.set_submodule(name, PackedLinear(cast(nn.Linear, module.get_submodule(name))))
    # What is left (embeddings, LayerNorms) cannot be trained through packed weights.
    module.requires_grad_(False)
