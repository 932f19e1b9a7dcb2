"""What the compiled kernels are run on: public functions, judged by the error rule.

Every function here runs with a `Device` active, whose launches are interpreted. Memory that is not
written holds NaN, and so do unused slots of the cache. Dimensions as in `mqa_gpt.model`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mqa_kernels import (
    attention,
    int8_linear,
    linear_residual,
    norm_argmax,
    norm_linear,
    norm_qkv_to_cache,
    reference,
    tuning,
)
from tests.kernels.error_rule import assert_as_accurate
from tests.ptx.device import Device

EPS = 1e-5
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def run(name: str, arguments: dict[str, Any], **options: Any) -> list[str]:
    """Run a case by name on a device with these options. Returns the kernels launched."""
    device = Device(**options)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    try:
        with device.active():
            CASES[name](**arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    return device.launched


def randoms(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for shape in shapes]


def weight_and_scale(
    N: int, K: int, dtype: torch.dtype, int8: bool
) -> tuple[Tensor, Tensor | None]:
    """A weight (N, K); in int8 with the scales (N,) of its rows."""
    weight = torch.randn(N, K) * K**-0.5
    if not int8:
        return weight.to(dtype), None
    scale = weight.abs().amax(1) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    """In float64; integers stay as they are."""
    return [x.double() if x is not None and x.is_floating_point() else x for x in tensors]


@contextmanager
def tiles_of(N: int | None) -> Iterator[None]:
    """Use the tiles that are shipped for N outputs, whatever the number of outputs is."""
    shipped = tuning.linear_tiles

    def chosen(dtype: torch.dtype, rows: int, outputs: int, *rest: Any) -> tuning.LinearTiles:
        return shipped(dtype, rows, N or outputs, *rest)

    with patch("mqa_kernels.fused_ops.linear_tiles", chosen):
        yield


def linear(
    rows: int, K: int, N: int, dtype: torch.dtype = BF16, activation: str | None = "gelu",
    int8: bool = False, bias: bool = True, shipped: int | None = None,
) -> None:  # fmt: skip
    """norm_linear; with activation None linear_residual."""
    x, b, gain, offset, residual = randoms(dtype, (rows, K), (N,), (K,), (K,), (rows, N))
    b = b if bias else None
    weight, scale = weight_and_scale(N, K, dtype, int8)
    if activation is None:
        inputs = [x, weight, b, residual, scale]
        function, formula = linear_residual, reference.linear_residual
    else:
        inputs = [x, gain, offset, EPS, weight, b, activation, scale]
        function, formula = norm_linear, reference.norm_linear
    with tiles_of(shipped):
        out = function(*inputs)
    exact = formula(*[wide(item)[0] if isinstance(item, Tensor) else item for item in inputs])
    assert_as_accurate(out, formula(*inputs), exact)


def wide_int8(rows: int, K: int, N: int, dtype: torch.dtype = BF16) -> None:
    """int8_linear, of more rows than the fused functions take."""
    x, bias = randoms(dtype, (rows, K), (N,))
    weight, scale = weight_and_scale(N, K, dtype, True)
    plain = F.linear(x, reference.dequantized(weight, scale, dtype), bias)
    exact = F.linear(x.double(), weight * scale.double()[:, None], bias.double())
    assert_as_accurate(int8_linear(x, weight, scale, bias), plain, exact)


def qkv(
    B: int, T: int, H: int, G: int, D: int, lengths: list[int], dtype: torch.dtype = BF16,
    int8: bool = False, max_length: int = 9, shipped: int | None = None,
) -> None:  # fmt: skip
    """norm_qkv_to_cache: the queries, the slots that are written, and those that are not."""
    C, N = H * D, H * D + 2 * G * D
    x, bias, gain, offset = randoms(dtype, (B * T, C), (N,), (C,), (C,))
    weight, scale = weight_and_scale(N, C, dtype, int8)
    held = torch.tensor(lengths)
    slots = torch.full((B, max_length, G, 2 * D), float("nan")).to(dtype)
    inputs = [x, gain, offset, EPS, weight, bias]
    with tiles_of(shipped):
        q = norm_qkv_to_cache(*inputs, slots, held, scale)
    written = torch.zeros(B, max_length, dtype=torch.bool)
    for b, length in enumerate(lengths):
        written[b, max(length, 0) : max(length + T, 0)] = True
    assert torch.equal(written, ~slots.isnan().flatten(2).any(-1))
    wide_inputs = [wide(item)[0] if isinstance(item, Tensor) else item for item in inputs]
    plain_slots, exact_slots = slots.clone(), slots.double()
    plain = reference.norm_qkv_to_cache(*inputs, plain_slots, held, scale)
    exact = reference.norm_qkv_to_cache(*wide_inputs, exact_slots, held, scale)
    assert_as_accurate(q, plain, exact)
    if written.any():
        assert_as_accurate(slots[written], plain_slots[written], exact_slots[written])


def argmax(
    rows: int, C: int, V: int, dtype: torch.dtype = BF16, int8: bool = False,
    shipped: int | None = None,
) -> None:  # fmt: skip
    """norm_argmax: the token's logit is at most twice plain PyTorch's error below the best."""
    x, gain, offset = randoms(dtype, (rows, C), (C,), (C,))
    weight, scale = weight_and_scale(V, C, dtype, int8)
    with tiles_of(shipped):
        ids, values = norm_argmax(x, gain, offset, EPS, weight, scale)
    plain = reference.norm_linear(x, gain, offset, EPS, weight, weight_scale=scale)
    logits = reference.norm_linear(
        *wide(x, gain, offset), EPS, *wide(weight), weight_scale=wide(scale)[0]
    )
    allowed = 2 * (plain.double() - logits).abs().max() + 1e-5
    chosen = logits.gather(1, ids[:, None])[:, 0]
    assert ((logits.amax(1) - chosen) <= allowed).all()
    assert ((values.double() - chosen).abs() <= allowed).all()


# --- attention ---------------------------------------------------------------------------------


def philox(seed: int, counters: list[np.ndarray]) -> np.ndarray:
    """First 32 bits of Philox 4x32-10 (Salmon et al. 2011, section 3)."""
    low = np.uint64(0xFFFFFFFF)
    c = [
        np.broadcast_to(x, np.broadcast_shapes(*(x.shape for x in counters))).astype("u8")
        for x in counters
    ]
    keys = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (b >> np.uint64(32)) ^ c[1] ^ np.uint64(keys[0]), b & low,
            (a >> np.uint64(32)) ^ c[3] ^ np.uint64(keys[1]), a & low,
        ]  # fmt: skip
        keys = [(keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[0].astype("u4")


def kept_by_dropout(seed: int, p: float, B: int, T: int, H: int, S: int, left: list[int]) -> Tensor:
    """(B, T, H, S): which probabilities are kept, by the counters of `tiles.dropout_keeps`."""
    b, t, h, s = np.ogrid[:B, :T, :H, :S]
    key = s - np.array(left).reshape(B, 1, 1, 1)
    zero = np.zeros((1, 1, 1, 1), int)
    bits = philox(seed, [key & 0xFFFFFFFF, t, b * H + h, zero]).view("i4")
    uniform = np.where(bits < 0, ~bits, bits) * np.float32(4.6566127342e-10)
    return torch.from_numpy(uniform >= np.float32(p))


def attention_case(
    B: int, T: int, S: int, H: int, G: int, D: int, start: list[int], dtype: torch.dtype = BF16,
    lengths: list[int] | None = None, left: list[int] | None = None, p: float = 0.0,
    backward: bool = True,
) -> None:  # fmt: skip
    """attention with its log-sum-exp and, with `backward`, its gradients. Slots that no query sees
    hold NaN."""
    q = torch.randn(B, T, H + 2, D).to(dtype)[:, :, :H]  # views of wider rows, as in the model
    kv = torch.randn(B, S, G, 2 * D).to(dtype)
    new = lengths or [T] * B
    for b in range(B):
        kv[b, start[b] + new[b] :] = kv[b, : (left or [0] * B)[b]] = float("nan")
    k, v = kv.chunk(2, -1)
    do = torch.randn(B, T, H, D).to(dtype)
    seed = torch.tensor([0x1234_5678_9ABC]) if p else None
    leaves = [x.detach().requires_grad_(backward) for x in (q, k, v)]
    out, lse = attention(
        *leaves, torch.tensor(start), dropout_p=p, seed=seed, return_lse=True,
        lengths=None if lengths is None else torch.tensor(lengths),
        left_padding=None if left is None else torch.tensor(left),
    )  # fmt: skip
    ours = [out.detach()]
    if backward:
        ours += torch.autograd.grad(out, leaves, do)

    visible = reference.visible_slots(
        q, k, torch.tensor(start), torch.tensor(new), torch.tensor(left or [0] * B)
    )
    factors: Tensor | float = 1.0
    if seed is not None:
        factors = kept_by_dropout(int(seed), p, B, T, H, S, left or [0] * B) / (1 - p)
    inputs = [x.nan_to_num(0.0) for x in (q, k, v)]

    def answers(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = reference.attention(*leaves, visible, D**-0.5, factors)
        return [out.detach(), *torch.autograd.grad(out, leaves, do.to(dtype))]

    exact = answers(torch.float64)
    for i, (mine, plain) in enumerate(zip(ours, answers(dtype), strict=False)):
        assert_as_accurate(mine, plain, exact[i], factor=2 if i == 0 else 3)

    sees = visible.any(-1)[..., None]  # (B, T, 1); the others' log-sum-exp is undefined
    plain_lse, exact_lse = (  # of scores that are not rounded
        reference.log_sum_exp(*(x.to(wider) for x in inputs[:2]), visible, D**-0.5)
        for wider in (torch.float32, torch.float64)
    )
    assert_as_accurate(*(x.where(sees, 0.0) for x in (lse, plain_lse, exact_lse)))


CASES: dict[str, Callable[..., None]] = {
    "linear": linear,
    "int8_linear": wide_int8,
    "qkv": qkv,
    "argmax": argmax,
    "train": attention_case,
    "decode": partial(attention_case, backward=False),
}
