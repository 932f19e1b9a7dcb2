"""What attention heads look at, and what it costs that they share one key and value.

Two kinds of heads make a model copy (Olsson et al. 2022, "In-context Learning and Induction
Heads"): one attends to the previous token, the other to the token after an earlier occurrence of
the current one. An infilling model also has to find the part of the prompt it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import InputError
from mqa_gpt.fim import infill_prompt
from mqa_gpt.model import GPT
from mqa_gpt.research.lens import as_row
from mqa_gpt.research.record import record
from mqa_gpt.tokenizer import Tokenizer

PROBS = "transformer.h.*.attn.probs"
REGIONS = ("prefix", "suffix", "middle", "control")


@torch.no_grad()
def attention_patterns(model: GPT, ids: Sequence[int]) -> Tensor:
    """The attention probabilities of all heads: (L, H, T, T)."""
    with record(model, PROBS) as acts:
        model(as_row(model, list(ids)))
    return acts[PROBS][:, 0]


def previous_token_scores(patterns: Tensor) -> Tensor:
    """How much of its attention each head spends on the previous token: (L, H, T, T) -> (L, H).

    Raises:
        InputError: fewer than two tokens.
    """
    if patterns.shape[-1] < 2:
        raise InputError("the text has no previous token: expected at least 2 tokens")
    return patterns.diagonal(-1, dim1=-2, dim2=-1).mean(-1)


@torch.no_grad()
def induction_scores(model: GPT, *, length: int = 64, rows: int = 4, seed: int = 0) -> Tensor:
    """How much attention each head spends on what followed the current token before: (L, H).

    Measured on random tokens that are repeated once, so nothing else can be learned from them.

    Args:
        length: tokens before they are repeated.
        rows: random texts.
    """
    if not 2 <= length <= model.config.n_positions // 2:
        raise InputError(
            f"length is {length}: expected 2 to {model.config.n_positions // 2}, half the context"
        )
    generator = torch.Generator().manual_seed(seed)
    half = torch.randint(model.config.vocab_size, (rows, length), generator=generator)
    with record(model, PROBS) as acts:
        model(torch.cat([half, half], 1).to(model.device))
    # From the second occurrence at t, the token after the first one is length - 1 back.
    copied = acts[PROBS].diagonal(1 - length, dim1=-2, dim2=-1)  # (L, B, H, length + 1)
    return copied[..., 1:].mean((1, 3))


def hole_shares(
    model: GPT, tokenizer: Tokenizer, prefix: str, middle: str, suffix: str, mode: str = "psm"
) -> dict[str, Tensor]:
    """How much attention each head spends on each part of an infilling prompt, (L, H) each.

    Averaged over the positions from which the middle is predicted: that of the token before it, and
    all its tokens but the last. The shares of one head add up to 1.

    Args:
        mode: "psm" or "spm".

    Returns:
        By "prefix", "suffix", "middle", and "control" for the control tokens.
    """
    prompt = infill_prompt(tokenizer, prefix, suffix, mode=mode)
    written = tokenizer.encode(middle, special_tokens=False)
    if not written:
        raise InputError("the middle is empty: there is nothing from which to look at the rest")
    parts = regions(tokenizer, prompt) + ["middle"] * len(written)
    patterns = attention_patterns(model, [*prompt, *written])
    queries = patterns[:, :, len(prompt) - 1 : -1].mean(2)  # (L, H, T)
    is_in = {name: torch.tensor([part == name for part in parts]) for name in REGIONS}
    return {name: queries[..., at.to(queries.device)].sum(-1) for name, at in is_in.items()}


def regions(tokenizer: Tokenizer, prompt: list[int]) -> list[str]:
    """Which part of an infilling prompt each token belongs to: one of `REGIONS` but "middle"."""
    fim = tokenizer.fim
    assert fim is not None  # the prompt was made with it
    # In SPM both come first, and the prefix follows <middle>.
    after = {fim.prefix: "prefix", fim.suffix: "suffix", fim.middle: "prefix"}
    parts, current = [], "prefix"
    for id_ in prompt:
        current = after.get(id_, current)
        parts.append("control" if id_ in after else current)
    return parts


@dataclass(frozen=True)
class Sharing:
    """How alike the heads of a layer are, and how much room their keys and values take.

    Attributes:
        overlap: (L, H, H), the attention that two heads have in common, averaged over positions:
            the sum over keys of the smaller of their probabilities; 1 if they look at the same.
        key_rank, value_rank: (L, G), the effective rank of a K/V head's keys and values, from 1 to
            D (Roy and Vetterli 2007): exp of the entropy of the normalised singular values.
        all_key_rank, all_value_rank: (L,), that of all K/V heads side by side, up to `most_rank`.
    """

    overlap: Tensor
    key_rank: Tensor
    value_rank: Tensor
    all_key_rank: Tensor
    all_value_rank: Tensor


@torch.no_grad()
def kv_sharing(model: GPT, ids: Sequence[int]) -> Sharing:
    """Measure on a text what the heads of each layer share, in a model with one K/V head or many.

    With one K/V head its effective rank says how much of the head dim is in use; with many, the
    rank of all of them says what one head would have to hold.

    Raises:
        InputError: fewer than two tokens, or more than the context.
    """
    names = [PROBS, "transformer.h.*.attn.k", "transformer.h.*.attn.v"]
    with record(model, names) as acts:
        model(as_row(model, list(ids), least=2))
    patterns = acts[PROBS][:, 0]  # (L, H, T, T)
    overlap = torch.stack(
        [
            torch.stack([torch.minimum(layer, head).sum(-1).mean(-1) for head in layer])
            for layer in patterns
        ]
    )  # (L, H, H)
    keys, values = (acts[name][:, 0].transpose(1, 2).float() for name in names[1:])  # (L, G, T, D)
    beside = [x.transpose(1, 2).flatten(2) for x in (keys, values)]  # (L, T, G D)
    ranks = map(effective_rank, (keys, values, *beside))
    return Sharing(overlap, *ranks)


def most_rank(config: GPTConfig, T: int) -> int:
    """The largest rank of all K/V heads side by side on T tokens, whose mean is subtracted."""
    return min(config.n_kv_head * config.head_dim, T - 1)


def effective_rank(x: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of matrices (..., T, D): (...)."""
    share = torch.linalg.svdvals(x.float() - x.float().mean(-2, keepdim=True))
    share = share / share.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1).exp()
