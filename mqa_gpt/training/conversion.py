"""Multi-head attention to multi-query attention, and back.

A multi-head model has a key and a value head per query head; a multi-query model has one of each.
Ainslie et al. (2023, "GQA") take the mean of the heads, or the first one, and train a little more.
But heads of a trained model use their D dimensions in bases of their own, and a mean of vectors in
different bases is noise. Positions are added to the embeddings here, so nothing fixes these bases:
for every invertible D x D matrix R a head computes the same with

    keys R^-1 k, queries R^T q       since  (R^T q) . (R^-1 k) = q . k
    values R^-1 v, output o R        with   o (C, D) the head's columns of c_proj

So heads are aligned first: R_h is chosen such that R_h^-1 k_h is about the same k for all h, and
that k replaces them all. What is lost is the part of a head's keys outside of the shared ones. How
much its scores change is a least-squares problem with a closed solution (`shared_head`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from mqa_gpt.checkpoints.load import empty_model
from mqa_gpt.checkpoints.match import own_weights
from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import InputError
from mqa_gpt.fast.int8 import is_quantized, tie_head
from mqa_gpt.model import GPT, MultiQueryAttention
from mqa_gpt.tokenizer import Tokenizer
from mqa_gpt.training.loss import next_token_loss
from mqa_gpt.training.qkv import join_qkv, split_qkv

Method = Literal["aligned", "mean", "first"]
METHODS: tuple[Method, ...] = get_args(Method)

LEAST_TEXT = 10  # tokens per dimension of the model, of which "aligned" makes a better head
RIDGE = 1e-3  # added to the diagonal of covariances, as a share of its mean


class Heads(NamedTuple):
    """The weights of an attention layer, head by head, float64; the bias is the last column.

    Attributes:
        q: (H, D, C + 1) queries.
        k, v: (G, D, C + 1) keys and values.
        o: (H, C, D) the part of `c_proj` that reads the head.
        bias: (C,) of `c_proj`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    bias: Tensor


class Moments(NamedTuple):
    """Mean (C,) and covariance (C, C) of what a layer's attention reads; float64."""

    mean: Tensor
    covariance: Tensor


# ------------------------------------------------------------------------------------- conversions


def to_mha(model: GPT) -> GPT:
    """A model with a key/value head per query head that computes what a multi-query model does.

    Each head gets a copy of the one head; the logits are equal up to rounding. The result is in
    evaluation mode, as are those of `to_mqa`.

    Raises:
        InputError: the model has 8-bit weights.
    """
    copies = model.config.n_head

    def convert(heads: Heads, _: int) -> Heads:
        if len(heads.k) == copies:
            return heads
        return heads._replace(k=heads.k.expand(copies, -1, -1), v=heads.v.expand(copies, -1, -1))

    return _converted(model, convert, multi_query=False)


def to_mqa(model: GPT, method: Method = "aligned", batches: Sequence[Tensor] = ()) -> GPT:
    """A multi-query model near a multi-head one; further training brings it nearer.

    Args:
        model: with a key/value head per query head. A multi-query one is copied.
        method: how many heads become one. "mean" and "first" are those of the GQA paper; "aligned"
            is described at the top of this file.
        batches: (B, T) int64 ids of typical text each, some ten thousand tokens in all, for
            "aligned": what heads see there counts, instead of all directions alike, and `c_proj` is
            fitted to the outputs of the original attention.

    Raises:
        InputError: the model has 8-bit weights; or ids are given to another method, or fewer than
            ten per dimension of the model, with which "aligned" would be worse than without.
    """
    if method != "aligned" and len(batches):
        raise InputError(f"method is {method!r}, which reads no text: leave the text out")
    if model.config.multi_query:
        return _converted(model, lambda heads, _: heads, multi_query=True)
    if method == "mean":
        return _converted(model, lambda heads, _: _pooled(heads), multi_query=True)
    if method == "first":
        return _converted(
            model, lambda heads, _: heads._replace(k=heads.k[:1], v=heads.v[:1]), multi_query=True
        )
    tokens, C = sum(ids.numel() for ids in batches), model.config.n_embd
    if batches and tokens < LEAST_TEXT * C:
        raise InputError(
            f"{tokens:,} tokens are too few for n_embd {C:,}: give at least {LEAST_TEXT * C:,}, or "
            "leave the text out"
        )
    moments = measure_moments(model, batches) if batches else assume_moments(model)
    converted = _converted(
        model, lambda heads, layer: merge(heads, moments[layer]), multi_query=True
    )
    if batches:
        fit_outputs(converted, model, batches)
    return converted


def _pooled(heads: Heads) -> Heads:
    """With the mean of all key and of all value heads."""
    return heads._replace(k=heads.k.mean(0, keepdim=True), v=heads.v.mean(0, keepdim=True))


@torch.no_grad()
def _converted(model: GPT, convert: Callable[[Heads, int], Heads], *, multi_query: bool) -> GPT:
    """A copy of a model whose attention layers are converted, given heads and the layer's index."""
    if is_quantized(model):
        raise InputError("the model's weights are 8-bit integers: load it without quantize")
    config = dataclasses.replace(model.config, multi_query=multi_query)
    state = {name: tensor.clone() for name, tensor in own_weights(model).items()}
    for layer, attention in enumerate(attention_layers(model)):
        weights = write_heads(convert(read_heads(attention, model.config), layer), config)
        for name, tensor in weights.items():
            state[f"transformer.h.{layer}.attn.{name}"] = tensor.to(
                model.device, model.dtype, copy=True
            )
    converted = empty_model(config)
    converted.load_state_dict(state, assign=True, strict=False)  # a tied head has no entry
    if config.tie_word_embeddings:
        tie_head(converted)
    return converted.eval()


def attention_layers(model: GPT) -> list[MultiQueryAttention]:
    """The attention of each block, from the first to the last."""
    return [module for module in model.modules() if isinstance(module, MultiQueryAttention)]


def read_heads(attention: MultiQueryAttention, config: GPTConfig) -> Heads:
    """The weights of a layer, head by head, on the CPU."""
    D, C = config.head_dim, config.n_embd
    linear = attention.c_attn
    rows = torch.cat([linear.weight, linear.bias[:, None]], 1).double().cpu()  # (C + 2GD, C + 1)
    q, k, v = (part.reshape(-1, D, C + 1) for part in split_qkv(rows, config))
    o = attention.c_proj.weight.double().cpu().view(C, -1, D).transpose(0, 1)  # (H, C, D)
    return Heads(q, k, v, o, attention.c_proj.bias.double().cpu())


def write_heads(heads: Heads, config: GPTConfig) -> dict[str, Tensor]:
    """The inverse of `read_heads`: the layer's weights by their names in it."""
    q, k, v = (part.flatten(0, 1) for part in (heads.q, heads.k, heads.v))
    rows = join_qkv(q, k, v, config)  # (C + 2GD, C + 1)
    return {
        "c_attn.weight": rows[:, :-1].contiguous(),
        "c_attn.bias": rows[:, -1].contiguous(),
        "c_proj.weight": heads.o.transpose(0, 1).flatten(1),
        "c_proj.bias": heads.bias,
    }


# --------------------------------------------------------------------------------------- alignment


def merge(heads: Heads, moments: Moments) -> Heads:
    """One key and one value head for all, with queries and `c_proj` in their bases.

    A constant added to all keys changes no softmax, and a constant added to all values is one of
    the output. So what attention reads counts by its deviation from its mean.
    """
    mean, covariance = moments
    wk, wv = heads.k[..., :-1], heads.v[..., :-1]  # (H, D, C)
    read = torch.cat([mean, mean.new_ones(1)])  # (C + 1,) the mean with its 1 for the bias
    second = torch.outer(read, read)
    second[:-1, :-1] += covariance
    of_queries = heads.q @ second @ heads.q.mT  # (H, D, D) = E[q q^T]
    k, to_k = shared_head(wk, of_queries, covariance)
    v, to_v = shared_head(wv, heads.o.mT @ heads.o, covariance)
    constant = (heads.o @ (heads.v @ read)[..., None]).sum(0)[:, 0]  # (C,) of the mean value
    zero = k.new_zeros(len(k), 1)
    return Heads(
        q=to_k.mT @ heads.q,
        k=torch.cat([k, zero], 1)[None],
        v=torch.cat([v, -(v @ mean)[:, None]], 1)[None],
        o=heads.o @ to_v,
        bias=heads.bias + constant,
    )


def shared_head(heads: Tensor, importance: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """One linear map K that stands for several K_h, and the R_h with K_h x about R_h K x.

    It makes sum_h E[(u_h^T (K_h - R_h K) x)^2] smallest over all K and R_h, where x has the given
    covariance and u_h the given second moments: for keys the queries that meet them, for values the
    rows of c_proj that read them. With S the root of the covariance and P_h = E[u_h u_h^T], the
    rows of K S are the first D eigenvectors of sum_h S K_h^T P_h K_h S (Eckart and Young 1936), and
    each R_h is the regression of K_h x on K x.

    Args:
        heads: (H, D, C) the K_h.
        importance: (H, D, D) the P_h.
        covariance: (C, C) of x.

    Returns:
        K (D, C), its elements as large as those of the heads, and R_h (H, D, D).
    """
    D, C = heads.shape[1:]
    covariance = covariance + RIDGE * covariance.trace() / C * torch.eye(C, dtype=heads.dtype)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.sqrt() @ vectors.T
    error = root @ (heads.mT @ importance @ heads).sum(0) @ root  # (C, C)
    chosen = torch.linalg.eigh(error).eigenvectors[:, -D:].flip(1)  # (C, D)
    shared = torch.linalg.solve(root, chosen).T  # (D, C); shared covariance shared^T = 1
    to_shared = heads @ covariance @ shared.T  # (H, D, D)
    scale = (heads.square().mean() / shared.square().mean()).sqrt()
    return shared * scale, to_shared / scale


def assume_moments(model: GPT) -> list[Moments]:
    """Each layer's moments as its LayerNorm makes them if all directions before it are alike."""
    norms = [cast(nn.LayerNorm, block.ln_1) for block in model.transformer.h]
    return [
        Moments(
            norm.bias.detach().double().cpu(), norm.weight.detach().double().cpu().square().diag()
        )
        for norm in norms
    ]


@torch.no_grad()
def measure_moments(model: GPT, batches: Iterable[Tensor]) -> list[Moments]:
    """Each layer's moments over batches of ids."""
    C, layers = model.config.n_embd, len(model.transformer.h)
    sums = torch.zeros(layers, C + 1, C + 1, dtype=torch.float64)  # with a 1 beside each x

    def see(layer: int, x: Tensor, _: Tensor) -> None:
        ones = torch.cat([x, torch.ones_like(x[..., :1])], -1).flatten(0, 1)  # (BT, C + 1)
        sums[layer] += _gram(ones, ones)

    _watch_attention(model, batches, see)
    sums = sums / sums[:, -1:, -1:]  # by the number of tokens
    return [Moments(s[-1, :-1], s[:-1, :-1] - torch.outer(s[-1, :-1], s[-1, :-1])) for s in sums]


@torch.no_grad()
def fit_outputs(converted: GPT, original: GPT, batches: Iterable[Tensor]) -> None:
    """Fit `c_proj` of each layer so that its attention gives what the original's gives for the same
    input, by least squares over batches of ids; in place.
    """
    C, layers = original.config.n_embd, attention_layers(converted)
    left = torch.zeros(len(layers), C + 1, C + 1, dtype=torch.float64)
    right = torch.zeros(len(layers), C + 1, C, dtype=torch.float64)

    def see(layer: int, x: Tensor, output: Tensor) -> None:
        seen: list[Tensor] = []
        hook = layers[layer].c_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        layers[layer](x, 0, None)
        hook.remove()
        read = torch.cat([seen[0], torch.ones_like(x[..., :1])], -1).flatten(0, 1)  # (BT, C + 1)
        left[layer] += _gram(read, read)
        right[layer] += _gram(read, output.flatten(0, 1))

    _watch_attention(original, batches, see)
    for attention, a, b in zip(layers, left, right, strict=True):
        linear = attention.c_proj
        now = torch.cat([linear.weight.T, linear.bias[None]]).double().cpu()  # (C + 1, C)
        ridge = RIDGE * a.trace() / len(a) * torch.eye(len(a), dtype=a.dtype)
        fitted = torch.linalg.solve(a + ridge, b + ridge @ now)  # drawn to what it is now
        linear.weight.copy_(fitted[:-1].T)
        linear.bias.copy_(fitted[-1])


def text_batches(texts: Iterable[str], tokenizer: Tokenizer, config: GPTConfig) -> list[Tensor]:
    """Texts as ids for `to_mqa`: each one's windows of at most 512 tokens, (1, T) int64 each.

    Raises:
        InputError: there are texts, but none has two tokens.
    """
    length = min(512, config.n_positions)
    ids = [torch.tensor(tokenizer.encode(text)) for text in texts]
    windows = [window for row in ids for window in torch.split(row, length) if len(window) > 1]
    if ids and not windows:
        raise InputError("the text has no two tokens: give more, or leave it out")
    return [window[None] for window in windows]


@torch.no_grad()
def mean_loss(model: GPT, batches: Iterable[Tensor]) -> float:
    """The mean next-token loss over batches of ids, nats per token."""
    total, tokens = 0.0, 0
    for ids in batches:
        hidden = model.transformer(ids[:, :-1].to(model.device))
        loss = next_token_loss(hidden, model.lm_head.weight, ids[:, 1:].to(model.device))
        total += loss.sum.item()
        tokens += ids[:, 1:].numel()
    return total / tokens


def _gram(a: Tensor, b: Tensor) -> Tensor:
    return (a.double().T @ b.double()).cpu()


def _watch_attention(
    model: GPT, batches: Iterable[Tensor], see: Callable[[int, Tensor, Tensor], None]
) -> None:
    """Run a model and show each layer's index, what its attention reads (B, T, C), and writes."""

    def hook(layer: int) -> Callable[[Any, Any, Tensor], None]:
        return lambda _, args, output: see(layer, args[0], output)

    was_training = model.training
    model.eval()
    hooks = [
        attention.register_forward_hook(hook(i))
        for i, attention in enumerate(attention_layers(model))
    ]
    try:
        for ids in batches:
            model.transformer(ids.to(model.device))
    finally:
        for handle in hooks:
            handle.remove()
        model.train(was_training)
