"""Checks of lesson 6, looking inside."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from checks import checker
from mqa_gpt import LLM
from mqa_gpt.research import heads, record
from mqa_gpt.research.lens import logit_attribution, unembedding

TEXT = "def copy(source, target):\n    for item in"


@cache
def _demo() -> LLM:
    return LLM.load(dtype="float32")


@cache
def _ids() -> list[int]:
    return _demo().tokenizer.encode(TEXT)


@cache
def _patterns() -> Tensor:
    """(L, H, T, T)"""
    return heads.attention_patterns(_demo().model, _ids())


def _close(got: object, right: Tensor, tolerance: float = 1e-4) -> bool:
    is_like = isinstance(got, Tensor) and got.shape == right.shape
    return is_like and torch.allclose(got.float(), right, atol=tolerance)


def _shape_hint(got: object, right: Tensor) -> str | None:
    if isinstance(got, Tensor) and got.shape == right.shape:
        return None
    what = f"shape {list(got.shape)}" if isinstance(got, Tensor) else type(got).__name__
    return f"it gives {what}: expected a tensor of shape {list(right.shape)}"


def _previous_token_scores(f: Callable[[Tensor], Tensor]) -> str | None:
    patterns = _patterns()
    for one in (patterns, patterns[:2, :3, :6, :6]):
        got, right = f(one), heads.previous_token_scores(one)
        if hint := _shape_hint(got, right):
            return hint
        if _close(got, right):
            continue
        T = one.shape[-1]
        others = {
            "that is the attention to the token itself: take the diagonal below": 0,
            "that is the diagonal above, which the mask hides: query t, key t - 1": 1,
        }
        for hint, offset in others.items():
            if _close(got, one.diagonal(offset, dim1=-2, dim2=-1).mean(-1)):
                return hint
        if _close(got, right * (T - 1) / T):
            return f"divide by the {T - 1} positions that have a token before them, not by {T}"
        return "query t gives key t - 1 the weight patterns[..., t, t - 1]; take its mean over t"
    return None


def _overlap(f: Callable[[Tensor], Tensor]) -> str | None:
    right = heads.kv_sharing(_demo().model, _ids()).overlap  # (L, H, H)
    for pattern, one in zip(_patterns(), right, strict=True):
        got = f(pattern)
        if hint := _shape_hint(got, one):
            return hint
        if _close(got, one):
            continue
        if not torch.allclose(got.diagonal().float(), torch.ones(len(one)), atol=1e-4):
            return (
                f"a head has {got[0, 0].item():.3f} in common with itself, and it should be 1: sum "
                "over the keys, then take the mean over the positions"
            )
        return "take the smaller of the two probabilities key by key, before you sum"
    return None


def _head_shares(f: Callable[[Tensor, Tensor, nn.Module, Tensor], Tensor]) -> str | None:
    model, ids = _demo().model, _ids()
    names = ["transformer.h.*.attn.result", f"transformer.h.{model.config.n_layer - 1}"]
    with torch.no_grad(), record(model, names) as acts:
        model(torch.tensor([ids]))
    for position in (-1, 2):
        for token in (5, 300):
            results, stream = acts[names[0]][:, 0, position], acts[names[1]][0, position]
            row = unembedding(model, token)
            right = logit_attribution(model, ids, token, position=position).heads
            got = f(results, stream, model.transformer.ln_f, row)
            if hint := _shape_hint(got, right):
                return hint
            if not _close(got, right, 1e-3):
                return _share_hint(got, results, stream, model.transformer.ln_f, row)
    return None


def _share_hint(got: Tensor, results: Tensor, stream: Tensor, ln_f: nn.Module, row: Tensor) -> str:
    centred = results - results.mean(-1, keepdim=True)
    scale = (stream.var(correction=0) + ln_f.eps).rsqrt()
    own = (results.var(-1, correction=0, keepdim=True) + ln_f.eps).rsqrt()
    wrong = {
        "divide by the deviation of the whole stream, not of the head's own part": centred
        * own
        * ln_f.weight,
        "the weight of ln_f is missing": centred * scale,
        "subtract the mean of each head's part": results * scale * ln_f.weight,
        "ln_f's bias belongs to no head: leave it out": centred * scale * ln_f.weight + ln_f.bias,
        "call no ln_f on a part: it would divide by the part's own deviation": centred
        * own
        * ln_f.weight
        + ln_f.bias,
        "divide by the square root of the variance, not by the variance": centred
        * scale**2
        * ln_f.weight,
    }
    for hint, x in wrong.items():
        if _close(got, x @ row, 1e-3):
            return hint
    return "the shape is right and the values are not: follow the formula from left to right"


check = checker(
    previous_token_scores=(
        _previous_token_scores,
        "A high score in an early layer is half of an induction circuit.",
    ),
    overlap=(
        _overlap,
        "Where two heads overlap little, one shared key serves two different questions.",
    ),
    head_shares=(
        _head_shares,
        "With the MLPs, the embedding and the biases, the shares add up to the logit.",
    ),
)
