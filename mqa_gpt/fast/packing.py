"""Packed weights: a layout that brings inference on a CPU closer to the speed of its memory.

A matrix product with few rows reads each weight once and does little with it, so its time is the
time to read the weights. PyTorch's product with the plain row-major layout reads far below the
speed of most CPUs' memory. oneDNN's product with its blocked layout, in which the weights of one
vector instruction are adjacent, comes close to it. On AMD processors with AVX-512 oneDNN's kernel
for four rows reads faster than those for one and two, so one or two rows are repeated to make four.

bfloat16 weights are packed where the processor has AVX512-BF16 (not measured on Intel's). 8-bit
weights (`mqa_gpt.fast.int8`) are packed too, for products of 8-bit integers: FBGEMM's, or
oneDNN's where those are faster.

On Intel processors with AVX-512 a float32 product with one or two rows reads the plain layout just
as fast; a packed layer is slower for these, and faster from about four rows on. A single prompt is
the common case, so only the head is packed there, which gains from the third row on and loses
nothing before. `python -m benchmarks.cpu.products` measures a processor.
"""

from __future__ import annotations

import platform
import warnings
import weakref
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from mqa_gpt.fast.int8 import Int8Linear
from mqa_gpt.machine import cpu_name

UNPACKED = "load the model with GPT.from_pretrained, which leaves its weights as they are"


class _Packed(nn.Module):
    """A layer without a plain weight: it cannot be read, edited, trained, converted or saved."""

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "weight_scale"):
            raise AttributeError(f"packed weights cannot be read or edited: {UNPACKED}")
        return super().__getattr__(name)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"packed weights cannot be saved: {UNPACKED}")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError(f"packed weights cannot be copied or pickled: {UNPACKED}")

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        return _refuse_to_convert()

    def _refuse_gradients(self, x: Tensor) -> None:
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(f"packed weights have no gradients: {UNPACKED}")


class PackedLinear(_Packed):
    """`nn.Linear` for inference, with its weight in oneDNN's blocked layout only.

    Computes the same sums in another order, so results differ from `nn.Linear` by rounding.

    Args:
        linear: what is packed, float32 or bfloat16.
        repeat_to: repeat the rows of x up to this many, if they fit in at least twice; None for
            four where `few_rows_are_slow`, else one.
    """

    def __init__(self, linear: nn.Linear, repeat_to: int | None = None) -> None:
        super().__init__()
        self.bias = None if linear.bias is None else linear.bias.detach()
        # None: blocks for any number of rows.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self._repeat_to = (4 if few_rows_are_slow() else 1) if repeat_to is None else repeat_to

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N), without gradients."""
        self._refuse_gradients(x)
        copies = self._repeat_to // max(x.shape[:-1].numel(), 1)
        if copies < 2:
            return self._product(x)
        # oneDNN takes longer over rows that share their memory.
        return self._product(x.expand(copies, *x.shape).contiguous())[0]

    def _product(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.default(
            x, self._packed, self.bias, "none", [], ""
        )


class PackedInt8Linear(_Packed):
    """`Int8Linear` for inference, as a product of 8-bit integers, by FBGEMM or by oneDNN.

    The rows of x are rounded to integers too: x is close to t r, with one scale t per row, so that
    a row's result does not depend on the other rows (`LLM.int8()`, Dettmers et al. 2022, section
    2, without its outlier columns). This rounding jumps: where float32 sums run in another order,
    as in a step over several tokens, the last bit of a number may tip an integer. So with
    speculation or in a batch, a choice between near equals may differ more often than in float32.

    Args:
        linear: what is packed.
        fbgemm: whether by FBGEMM; None for the one that decodes faster.

    Raises:
        ValueError: by FBGEMM, which this torch does not have.
    """

    def __init__(self, linear: Int8Linear, fbgemm: bool | None = None) -> None:
        super().__init__()
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        fbgemm = fbgemm_is_faster() if fbgemm is None else fbgemm
        if fbgemm and not has_fbgemm():
            raise ValueError("this torch has no 8-bit products by FBGEMM: leave fbgemm out")
        product = _FBGEMMProduct if fbgemm else _OneDNNProduct
        largest = 127 if _holds_8_bits(product) else 63
        self._product = product(linear.weight.detach(), linear.weight_scale, largest)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, ..., K) -> (B, ..., N) in the dtype of x, without gradients."""
        self._refuse_gradients(x)
        rows = x.float()
        top = rows.abs().amax(-1, keepdim=True)  # (..., 1), is t times the largest integer
        y = self._product(rows, top)  # (..., N)
        y = y * top if self.bias is None else torch.addcmul(self.bias, y, top)  # (..., N)
        return y.to(x.dtype)


# Both libraries take rows of unsigned integers only (oneDNN is slow for others), so zero is in the
# middle of their range. A row of zeros gives arbitrary integers, which are multiplied by 0.


class _OneDNNProduct:
    """rows / top rounded, times the weights, by oneDNN."""

    def __init__(self, weight: Tensor, scale: Tensor, largest: int) -> None:
        self._largest = largest
        self._packed = torch.ops.onednn.qlinear_prepack(weight, None)
        self._scale = scale / largest  # (N,)
        # The conversion to integers truncates, hence the half.
        self._middle = torch.tensor(largest + 1.5, dtype=torch.float32, device=weight.device)

    def __call__(self, rows: Tensor, top: Tensor) -> Tensor:
        """rows (..., K) and the largest of each (..., 1) -> (..., N) float32."""
        integers = torch.add(self._middle, rows / top, alpha=self._largest)  # (..., K)
        return torch.ops.onednn.qlinear_pointwise.default(
            integers.to(torch.uint8), 1.0, self._largest + 1, self._packed, self._scale, None, None,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip


class _FBGEMMProduct:
    """rows / top rounded, times the weights, by FBGEMM, which rounds the rows itself.

    Its operators come with PyTorch's quantized tensors, which are deprecated: where a PyTorch no
    longer has them, `fbgemm_is_faster` is false.
    """

    def __init__(self, weight: Tensor, scale: Tensor, largest: int) -> None:
        self._step, self._zero = 1 / largest, largest + 1
        self._run = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* are deprecated", UserWarning)
            quantized = torch._make_per_channel_quantized_tensor(
                weight, scale.double(), torch.zeros_like(scale, dtype=torch.long), 0
            )
            self._packed = torch.ops.quantized.linear_prepack(quantized, None)

    def __call__(self, rows: Tensor, top: Tensor) -> Tensor:
        """rows (..., K) and the largest of each (..., 1) -> (..., N) float32."""
        return self._run(rows / top, self._step, self._zero, self._packed)


@cache
def _holds_8_bits(product: type[_FBGEMMProduct | _OneDNNProduct]) -> bool:
    """Whether a library adds products of the largest 8-bit integers without overflow.

    Without VNNI it adds two of them in 16 bits, where products of 7-bit rows fit and those of 8-bit
    rows do not.
    """
    ones = torch.ones(1, 64, dtype=torch.float32, device="cpu")
    run = product((127 * ones).to(torch.int8), ones[0, :1], 127)
    return abs(run(ones, ones[:, :1]).item() / (64 * 127) - 1) < 0.01


def can_pack(module: nn.Module) -> bool:
    """Whether `pack` can be called: weights of a dtype and on a device that have products for it.

    That is float32, 8 bits, or, with AVX512-BF16, bfloat16, on a CPU.
    """
    return any(_is_packable(layer) for layer in module.modules())


def is_packed(module: nn.Module) -> bool:
    """Whether `pack` has replaced a layer of it."""
    return any(isinstance(layer, _Packed) for layer in module.modules())


def packed_names(
    module: nn.Module, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> list[str]:
    """The names of the layers that `pack` replaces, or would in this dtype on this device."""
    plain_is_fast = reads_plain_layout_fast()
    return [
        name
        for name, layer in module.named_modules()
        if _is_packable(layer, dtype, device)
        and (name == "lm_head" or not plain_is_fast or _weight_dtype(layer, dtype) != torch.float32)
    ]


def packing_bytes(module: nn.Module, dtype: torch.dtype, device: torch.device) -> int:
    """The memory that `pack` needs besides the plain weights, in this dtype on this device.

    One layer at a time holds its weight twice, plain and packed, and with FBGEMM, which takes a
    quantized tensor, a third time. A tied head, packed last, keeps its plain weight.
    """
    layers = [module.get_submodule(name) for name in packed_names(module, dtype, device)]
    int8_bytes = 2 if fbgemm_is_faster() else 1
    return max(
        (
            layer.weight.numel() * (int8_bytes if isinstance(layer, Int8Linear) else dtype.itemsize)
            for layer in cast(list[nn.Linear | Int8Linear], layers)
        ),
        default=0,
    )


def reads_plain_layout_fast() -> bool:
    """Whether one row's product is as fast with a plain float32 weight as with a packed one here.

    True where MKL, Intel's library, computes with AVX-512: on Intel processors only.
    """
    return _has_avx512() and "intel" in cpu_name().lower()


def few_rows_are_slow() -> bool:
    """Whether a packed product with one or two rows takes longer than one with four rows here.

    On AMD's Zen 4 one row takes 1.0 to 1.2 times as long as four, two rows 1.1 to 1.4 times. Not
    measured on Intel processors.
    """
    return _has_avx512() and "intel" not in cpu_name().lower()


def _has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def fbgemm_is_faster() -> bool:
    """Whether 8-bit products of a decode step are faster with FBGEMM than with oneDNN here.

    True where torch has FBGEMM, except on processors with tiles (AMX), which only oneDNN uses. A
    prefill, whose products have many rows, is up to a third slower with FBGEMM.
    """
    return has_fbgemm() and not torch.cpu._is_amx_tile_supported()


def has_fbgemm() -> bool:
    """Whether torch has FBGEMM's products of 8-bit integers and chooses them."""
    names = ("linear_prepack", "linear_with_input_q_dq_qweight_dq_output_fp32")
    return (
        torch.backends.quantized.engine in ("x86", "fbgemm")
        and hasattr(torch, "_make_per_channel_quantized_tensor")
        and all(hasattr(torch.ops.quantized, name) for name in names)
    )


def _is_packable(
    layer: nn.Module, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> bool:
    """Whether a layer has a packed form, by its own dtype and device or by these."""
    if isinstance(layer, Int8Linear):
        return _has_int8_products(device or layer.weight.device)
    return isinstance(layer, nn.Linear) and _has_products(
        _weight_dtype(layer, dtype), device or layer.weight.device
    )


def _weight_dtype(layer: nn.Module, dtype: torch.dtype | None = None) -> torch.dtype:
    """The dtype of a linear layer's weight, or its dtype in a model of this dtype."""
    own = cast(nn.Linear | Int8Linear, layer).weight.dtype
    return own if dtype is None or isinstance(layer, Int8Linear) else dtype


def _pack_layer(layer: nn.Module) -> _Packed:
    packed: _Packed
    if isinstance(layer, Int8Linear):
        packed = PackedInt8Linear(layer)
    else:
        packed = PackedLinear(cast(nn.Linear, layer))
    return packed.eval()


def _has_products(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch has oneDNN's packed products of this dtype there."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    if dtype == torch.bfloat16 and not _multiplies_bfloat16():
        return False
    return dtype in (torch.float32, torch.bfloat16) and _has_operators(
        device, torch.ops.mkldnn, names
    )


def _multiplies_bfloat16() -> bool:
    """Whether the processor does, and oneDNN, which can be told not to, uses it."""
    return (
        torch.cpu._is_avx512_bf16_supported()
        and hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _has_int8_products(device: torch.device) -> bool:
    """Whether torch has oneDNN's packed products of 8-bit integers there."""
    names = ("qlinear_prepack", "qlinear_pointwise")
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")  # elsewhere they are not fast
    return is_x86 and _has_operators(device, torch.ops.onednn, names)


def _has_operators(device: torch.device, namespace: Any, names: tuple[str, ...]) -> bool:
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return device.type == "cpu" and available and all(hasattr(namespace, name) for name in names)


def pack(module: nn.Module) -> None:
    """Replace the linear layers inside `module` by their packed forms, one after the other.

    All of them, or in float32 only `lm_head` where `reads_plain_layout_fast`. Their plain weights
    are freed, so the model can no longer be trained or saved. A weight that is shared, as a tied
    `lm_head` shares that of the embedding, also stays where it is.

    Raises:
        ValueError: `can_pack` is false.
    """
    if not can_pack(module):
        raise ValueError(
            "only models on a CPU can be packed, with a torch that has oneDNN: in float32, in 8 "
            "bits or, with AVX512-BF16, in bfloat16"
        )
    # By name, because a list of the layers would keep all their weights in memory.
    for name in packed_names(module):
        module.set_submodule(name, _pack_layer(module.get_submodule(name)))
    # What is left (embeddings, LayerNorms) cannot be trained through packed weights.
    module.requires_grad_(False)
    # Refused here too, before `train` or `to` has reached the layers that are not packed.
    vars(module).update(train=partial(_train, weakref.ref(module)), _apply=_refuse_to_convert)


def _train(module: weakref.ref[nn.Module], mode: bool = True) -> nn.Module:
    """`nn.Module.train` of a module with packed layers, which does not keep it alive."""
    if mode:
        raise RuntimeError(f"packed weights cannot be trained: {UNPACKED}")
    found = module()
    assert found is not None  # it is being called
    return nn.Module.train(found, mode)


def _refuse_to_convert(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError(f"packed weights cannot be moved or converted: {UNPACKED}")
