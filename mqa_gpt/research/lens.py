"""The logit lens and direct logit attribution: which part of the model writes the next token.

The logits are a linear function of the last residual stream, once its normalisation is fixed, and
that stream is the sum of what all layers have added. So every partial sum can be read as logits
(nostalgebraist 2020, "interpreting GPT: the logit lens"), and every summand has its share in a
logit (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mqa_gpt.errors import InputError
from mqa_gpt.fast.int8 import Int8Linear
from mqa_gpt.model import GPT, Block
from mqa_gpt.research.record import record


@dataclass(frozen=True)
class Lens:
    """The logits of each layer's residual stream; entry 0 is the embedding, entry i + 1 layer i.

    Attributes:
        top_ids: (L + 1, T) int64, the likeliest token.
        probability: (L + 1, T), of the token that the whole model finds likeliest.
        divergence: (L + 1, T), KL divergence in nats of the model's distribution from the layer's.
    """

    top_ids: Tensor
    probability: Tensor
    divergence: Tensor


@torch.no_grad()
def logit_lens(model: GPT, ids: list[int]) -> Lens:
    """Read the residual stream after the embedding and after each layer as logits.

    Raises:
        InputError: no tokens, or more than the context.
    """
    with record(model, ["transformer.h.*", "transformer.h.0.resid_pre"]) as acts:
        final = model(as_row(model, ids))[0].float().log_softmax(-1)  # (T, V)
    best = final.argmax(-1, keepdim=True)  # (T, 1)
    streams = torch.cat([acts["transformer.h.0.resid_pre"][None], acts["transformer.h.*"]])
    rows = []
    for logits in layer_logits(model, streams[:, 0]):  # (T, V)
        layer = logits.log_softmax(-1)  # (T, V)
        divergence = F.kl_div(layer, final, reduction="none", log_target=True).sum(-1)
        rows.append((layer.argmax(-1), layer.gather(1, best)[:, 0].exp(), divergence))
    top, probability, divergence = (torch.stack(x) for x in zip(*rows, strict=True))
    return Lens(top, probability, divergence)


def layer_logits(model: GPT, streams: Tensor) -> Iterator[Tensor]:
    """The logits (T, V) float32 of residual streams (L, T, C), if the model ended there.

    One layer after the other, since all together may not fit into memory.
    """
    for x in streams:
        yield model.lm_head(model.transformer.ln_f(x)).float()


@dataclass(frozen=True)
class Attribution:
    """The summands of a logit, or of the difference of two, at one position.

    Attributes:
        heads: (L, H), what each head adds.
        mlps: (L,), what each MLP adds.
        biases: (L,), what the bias of each attention output adds.
        embedding: of token and position.
        constant: of the last normalisation's bias.
        total: their sum, the logit itself.
    """

    heads: Tensor
    mlps: Tensor
    biases: Tensor
    embedding: float
    constant: float
    total: float


@torch.no_grad()
def logit_attribution(
    model: GPT, ids: list[int], token: int, *, against: int | None = None, position: int = -1
) -> Attribution:
    """Split the logit of `token` after ids[position] into what each part of the model adds.

    The last normalisation divides by the standard deviation of the whole stream, which is taken as
    it is; all else is linear, so the parts add up to the logit.

    Args:
        against: split the difference to this token's logit; what all tokens share cancels.

    Raises:
        InputError: a token or position that does not exist.
    """
    row = as_row(model, ids)
    if not -len(ids) <= position < len(ids):
        raise InputError(f"position is {position}: there are {len(ids)} tokens")
    for id_ in (token, against or 0):
        if not 0 <= id_ < model.config.vocab_size:
            raise InputError(f"token {id_} is not among {model.config.vocab_size:,}")
    names = ["transformer.h.*.attn.result", "transformer.h.*.mlp", "transformer.h.0.resid_pre"]
    last = f"transformer.h.{model.config.n_layer - 1}"
    with record(model, [*names, last]) as acts:
        model(row)
    heads, mlps = acts[names[0]][:, 0, position], acts[names[1]][:, 0, position]  # (L, H, C)
    layers = cast(list[Block], model.transformer.h)
    biases = torch.stack([layer.attn.c_proj.bias for layer in layers])  # (L, C)
    norm, stream = model.transformer.ln_f, acts[last][0, position]
    direction = unembedding(model, token)  # (C,)
    if against is not None:
        direction = direction - unembedding(model, against)
    scale = (stream.float().var(correction=0) + norm.eps).rsqrt()

    def share(x: Tensor) -> Tensor:
        x = x.float()
        normed = (x - x.mean(-1, keepdim=True)) * scale * norm.weight.float()
        return normed @ direction

    parts = share(heads), share(mlps), share(biases.to(heads))
    embedding = share(acts[names[2]][0, position]).item()
    constant = (norm.bias.float() @ direction).item()
    total = sum(x.sum().item() for x in parts) + embedding + constant
    return Attribution(*parts, embedding, constant, total)


def unembedding(model: GPT, token: int) -> Tensor:
    """The row of `lm_head` for a token: (C,) float32."""
    head: Any = model.lm_head
    row = cast(Tensor, head.weight)[token].float()
    return row * head.weight_scale[token] if isinstance(head, Int8Linear) else row


def as_row(model: GPT, ids: list[int], least: int = 1) -> Tensor:
    """ids as a batch of one; InputError if there are fewer than `least` or more than fit."""
    if not least <= len(ids) <= model.config.n_positions:
        raise InputError(
            f"the text has {len(ids):,} tokens: expected {least} to {model.config.n_positions:,}"
        )
    return torch.tensor([ids], device=model.device)
