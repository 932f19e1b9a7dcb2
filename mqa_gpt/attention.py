"""Causal attention with G key/value heads shared by H query heads: the definition, PyTorch's fused
form of it, and the one place that picks a backend.

Every backend is a function

    attend(q, k, v, start, scale, dropout_p) -> (B, T, H, D)

    q        (B, T, H, D)   queries of the T new positions
    k, v     (B, S, G, D)   keys and values of the cached and the new positions
    start    int or (B,)    position of the first new token: one int where all rows agree (a host
                            number lets a backend drop the mask), else int64 per row
    scale    float          what the scores are multiplied by, D^-0.5 as a rule

A key's position is its index s in S. Query t of row b is at position start[b] + t and sees the keys
s <= start[b] + t. The keys after these (padding, unwritten cache) have no influence as long as they
are finite: their weight is 0, but 0 times NaN is NaN. (The kernels of `mqa_kernels` never load
them, so there they may be anything.)
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mqa_gpt.errors import InputError, shown

Attention = Callable[[Tensor, Tensor, Tensor, "int | Tensor", float, float], Tensor]

BACKENDS = ("reference", "sdpa", "triton", "auto")

HAS_TRITON = find_spec("triton") is not None


def positions_from(start: int | Tensor, length: int, device: torch.device) -> Tensor:
    """Positions of `length` tokens from `start`: (1, T) where rows agree, else (B, T); int64."""
    steps = torch.arange(length, device=device)  # (T,)
    return (start + steps)[None] if isinstance(start, int) else start[:, None] + steps


def causal_mask(start: int | Tensor, T: int, S: int, device: torch.device) -> Tensor:
    """True where query t may see slot s: (1, T, S) where rows agree on `start`, else (B, T, S)."""
    query_positions = positions_from(start, T, device)  # (1 or B, T)
    return torch.arange(S, device=device) <= query_positions[..., None]


def attention_scores(q: Tensor, k: Tensor, start: int | Tensor, scale: float) -> Tensor:
    """q k^T scale, and -inf where a key is not visible: (B, H, T, S).

    The K heads are never repeated: queries are grouped as (G, H/G), and the product runs a group's
    H/G heads over its one K head. (`@` would broadcast that head by copying it.)
    """
    B, T, H, D = q.shape
    S, G = k.shape[1], k.shape[2]
    q = q.view(B, T, G, H // G, D)
    # b row, t query, s key, g K/V head, h query head of the group, d element of the head
    scores = torch.einsum("btghd,bsgd->bghts", q, k).flatten(1, 2) * scale  # (B, H, T, S)
    visible = causal_mask(start, T, S, q.device)[:, None]  # (1 or B, 1, T, S)
    return scores.masked_fill(~visible, float("-inf"))


def attention_probabilities(scores: Tensor) -> Tensor:
    """softmax over the keys, in float32 in every model dtype: (B, H, T, S) -> (B, H, T, S)."""
    return scores.softmax(-1, dtype=torch.float32).to(scores.dtype)


def weighted_values(probabilities: Tensor, v: Tensor) -> Tensor:
    """Each query's sum of the values, weighted by its probabilities: (B, T, H, D)."""
    B, H, T, S = probabilities.shape
    G = v.shape[2]
    probabilities = probabilities.view(B, G, H // G, T, S)
    return torch.einsum("bghts,bsgd->btghd", probabilities, v).flatten(2, 3)  # (B, T, H, D)


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, start: int | Tensor, scale: float, dropout_p: float = 0.0
) -> Tensor:
    """softmax(q k^T scale) v in its three steps (Vaswani et al. 2017; Shazeer 2019 for G=1)."""
    probabilities = attention_probabilities(attention_scores(q, k, start, scale))  # (B, H, T, S)
    return weighted_values(F.dropout(probabilities, dropout_p), v)


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, start: int | Tensor, scale: float, dropout_p: float = 0.0
) -> Tensor:
    """The same through `torch.nn.functional.scaled_dot_product_attention`, K/V never repeated.

    One new token (decoding): a group's H/G query heads take the place of query positions in one
    product, so that its keys are read once; being at one position they share one row of the mask.
    Several tokens: as many heads would need H/G copies of each mask row, so each query head gets a
    stride-0 view of its K/V head instead, which costs no memory either.
    """
    B, T, H, D = q.shape
    S, G = k.shape[1], k.shape[2]
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, G, S, D)
    if T == 1:
        q = q.view(B, G, H // G, D)  # (B, G, H/G, D)
        if isinstance(start, int) and start + 1 < S:  # later keys are cut off, not masked
            k, v = k[:, :, : start + 1], v[:, :, : start + 1]
        mask = None if isinstance(start, int) else causal_mask(start, 1, S, q.device)[:, None]
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, scale=scale)
        return y.reshape(B, 1, H, D)

    q = q.transpose(1, 2)  # (B, H, T, D)
    if G < H:
        k = k[:, :, None].expand(B, G, H // G, S, D).flatten(1, 2)  # (B, H, S, D), a view if G=1
        v = v[:, :, None].expand(B, G, H // G, S, D).flatten(1, 2)
    if isinstance(start, int) and start == 0 and S == T:
        y = F.scaled_dot_product_attention(q, k, v, None, dropout_p, is_causal=True, scale=scale)
    else:
        mask = causal_mask(start, T, S, q.device)[:, None]  # (1 or B, 1, T, S)
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, scale=scale)
    return y.transpose(1, 2)  # (B, T, H, D)


# ---------------------------------------------------------------------- which backend computes


def auto_attention(
    q: Tensor, k: Tensor, v: Tensor, start: int | Tensor, scale: float, dropout_p: float = 0.0
) -> Tensor:
    """The fused kernels of `mqa_kernels` for tensors on a CUDA device, else `sdpa_attention`.

    Chosen at each call, because a model may be moved after it is made.
    """
    if _is_fused(q.is_cuda, q.dtype, q.shape[3]):
        from mqa_kernels import attention

        return cast(Tensor, attention(q, k, v, start, scale, dropout_p))
    return sdpa_attention(q, k, v, start, scale, dropout_p)


def _is_fused(is_cuda: bool, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether "auto" takes the kernels, which have neither float64 nor head dims above 256."""
    return HAS_TRITON and is_cuda and dtype != torch.float64 and head_dim <= 256


def select_attention(backend: str, device: torch.device) -> Attention:
    """The attention function of a backend's name on a device.

    Args:
        backend: "reference", "sdpa", "triton", or "auto": triton on CUDA devices, else sdpa.

    Raises:
        InputError: an unknown name, or a backend that cannot run here; "auto" never raises.
    """
    torch_functions = {
        "reference": reference_attention, "sdpa": sdpa_attention, "auto": auto_attention
    }  # fmt: skip
    if backend in torch_functions:
        return torch_functions[backend]
    if backend != "triton":
        raise InputError(f"backend is {shown(backend)}: expected one of {', '.join(BACKENDS)}")
    try:
        from mqa_kernels import attention, runs_on
    except ImportError as error:
        raise InputError(
            f"backend 'triton' cannot run: {error}; install Triton (Linux only), or use 'sdpa'"
        ) from error
    if not runs_on(device):
        raise InputError(
            f"backend 'triton' cannot run on {device}: it needs a CUDA device; use 'sdpa', "
            "'reference' or 'auto'"
        )
    return cast(Attention, attention)


def acting_backend(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The backend that computes: this one, or what "auto" stands for on this device."""
    if backend != "auto":
        return backend
    return "triton" if _is_fused(device.type == "cuda", dtype, head_dim) else "sdpa"


def backend_text(asked: str, acting: str) -> str:
    """A backend in a report: its name, and "auto" if it was chosen by that."""
    return acting if asked == acting else f"{asked} ({acting})"


def is_own(attend: Attention) -> bool:
    """Whether `select_attention` gives this function."""
    if attend in (reference_attention, sdpa_attention, auto_attention):
        return True
    if not HAS_TRITON:
        return False
    from mqa_kernels import attention

    return attend is attention
