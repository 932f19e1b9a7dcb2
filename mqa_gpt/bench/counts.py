"""The operations and bytes that a pass through the model needs: the only place that counts them.

Operations are the multiplications and additions of matrix products. Of attention only the scores
that causality leaves are counted. Bytes are those that have to be read or written once.
`mqa-gpt inspect --explain` shows them by part (`mqa_gpt.bench.anatomy`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from mqa_gpt.cache import cache_bytes
from mqa_gpt.config import GPTConfig

BACKWARD = 2.5  # products of attention's backward pass over those of its forward pass: 5 over 2


def attention_flops(B: int, T: int, S: int, H: int, D: int) -> int:
    """Operations of causal attention: the last T of S positions are the queries."""
    scores = T * (S - T) + T * (T + 1) // 2  # of one head
    return 4 * B * H * D * scores


def linear_sizes(config: GPTConfig) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each linear layer in a block."""
    C, F = config.n_embd, config.inner_size
    return {
        "attn.c_attn": (C, C + 2 * config.n_kv_head * config.head_dim),
        "attn.c_proj": (C, C),
        "mlp.c_fc": (C, F),
        "mlp.c_proj": (F, C),
    }


def prefill_flops(config: GPTConfig, batch: int, T: int) -> int:
    """Operations of reading prompts of T tokens; the head projects the last position alone."""
    weights = sum(inputs * outputs for inputs, outputs in linear_sizes(config).values())
    attention = attention_flops(1, T, T, config.n_head, config.head_dim)
    head = 2 * config.n_embd * config.vocab_size
    return batch * (config.n_layer * (2 * T * weights + attention) + head)


def training_flops(config: GPTConfig, T: int, *, causal: bool) -> float:
    """Operations per token of a training step, forward and backward, in sequences of T tokens.

    The backward pass makes two products for each of the forward pass. With N weights in matrix
    products, the head included, that is 6 N + 12 L C T, as PaLM counts (Chowdhery et al. 2022,
    appendix B); what is computed again to save memory does not count.

    Args:
        causal: count of attention only the scores that causality leaves, 6 N + 6 L C (T + 1).
    """
    weights = sum(inputs * outputs for inputs, outputs in linear_sizes(config).values())
    products = config.n_layer * weights + config.n_embd * config.vocab_size
    if causal:
        attention = attention_flops(1, T, T, config.n_head, config.head_dim) / T
    else:
        attention = 4 * config.n_embd * T
    return 3 * (2 * products + config.n_layer * attention)


def weight_bytes(config: GPTConfig, itemsize: int) -> int:
    """Bytes of the weights that a forward pass reads, `itemsize` bytes each.

    Embeddings do not count, since each token reads one row of them, but the head does, even where
    it is the token embedding.
    """
    parts = config.parameters_by_part
    read = config.parameters - parts["position embedding"]
    if not config.tie_word_embeddings:
        read -= parts["token embedding"]
    return read * itemsize


def decode_bytes(
    config: GPTConfig, batch: int, steps: Sequence[int], weight_itemsize: int, dtype: torch.dtype
) -> int:
    """Bytes that decode steps read: the weights once per step, and K and V of every row.

    Args:
        steps: for each step the positions a row attends to, its own included.
        dtype: of the cache.
    """
    weights = len(steps) * weight_bytes(config, weight_itemsize)
    return weights + cache_bytes(config, dtype, batch, sum(steps))


def model_bytes(config: GPTConfig, dtype: torch.dtype, *, int8: bool = False) -> int:
    """Bytes of all parameters in memory.

    Args:
        dtype: of what is not quantized.
        int8: whether linear layers and the token embedding are 8-bit integers with a float32 scale
            per row, as `mqa_gpt.fast.int8` keeps them.
    """
    if not int8:
        return config.parameters * dtype.itemsize
    C, V, L, sizes = config.n_embd, config.vocab_size, config.n_layer, linear_sizes(config)
    matrices = 1 if config.tie_word_embeddings else 2  # (V, C) each
    quantized = L * sum(inputs * outputs for inputs, outputs in sizes.values()) + matrices * V * C
    rows = L * sum(outputs for _, outputs in sizes.values()) + matrices * V
    return quantized + 4 * rows + (config.parameters - quantized) * dtype.itemsize


class Work(NamedTuple):
    """What a part of the model does in a forward pass, all layers together.

    Attributes:
        itemsize: bytes of one of its weights.
        parameters: that belong to it; a tied head's belong to the embedding.
    """

    bytes: int
    flops: int
    itemsize: int = 4
    parameters: int = 0

    @property
    def intensity(self) -> float:
        """Arithmetic intensity: operations for each byte that is moved."""
        return self.flops / self.bytes if self.bytes else 0.0


def whole(parts: Iterable[Work]) -> Work:
    """The work of parts together."""
    all_parts = list(parts)
    return Work(
        sum(part.bytes for part in all_parts),
        sum(part.flops for part in all_parts),
        parameters=sum(part.parameters for part in all_parts),
    )


def work_by_part(
    config: GPTConfig,
    batch: int,
    context: int,
    dtype: torch.dtype,
    *,
    itemsize: int,
    is_prefill: bool,
) -> dict[str, Work]:
    """The least work of each part: weights and inputs read once, outputs written once.

    Embeddings, residual sums and argmax count as bytes only, the scales of 8-bit weights not at
    all. Every row has positions of its own.

    Args:
        context: positions in the cache, the new token's included; in a prefill the prompt's tokens.
        dtype: of everything but the weights of linear layers.
        itemsize: bytes of one of these.
        is_prefill: whether whole prompts are read instead of one token per row.

    Returns:
        The parts in the order in which a token passes them.
    """
    C, F, V, L = config.n_embd, config.inner_size, config.vocab_size, config.n_layer
    kv = 2 * config.n_kv_head * config.head_dim
    size = dtype.itemsize
    T = context if is_prefill else 1
    rows = batch * T

    def linear(name: str) -> Work:
        inputs, outputs = linear_sizes(config)[name]
        weights = itemsize * inputs * outputs + size * outputs
        moved = L * (weights + size * rows * (inputs + outputs))
        parameters = L * (inputs * outputs + outputs)
        return Work(moved, L * 2 * rows * inputs * outputs, itemsize, parameters)

    def pointwise(numbers: int, layers: int = L) -> Work:
        return Work(layers * rows * numbers * size, 0)

    def norms(count: int) -> Work:
        parameters = count * 2 * C
        return Work(size * (count * rows * 2 * C + parameters), 0, parameters=parameters)

    attention = Work(
        cache_bytes(config, dtype, batch, context) + pointwise(2 * C).bytes,
        L * attention_flops(batch, T, context, config.n_head, config.head_dim),
    )
    sums = pointwise(3 * C, 1).bytes + pointwise(6 * C).bytes
    head = itemsize * C * V + size * batch * (C + V)
    embeddings = (V + config.n_positions) * C
    return {
        "wte, wpe": Work(pointwise(4 * C, 1).bytes, 0, parameters=embeddings),
        "ln_1, ln_2": norms(2 * L),
        "attn.c_attn": linear("attn.c_attn"),
        "split": Work(0, 0),
        "cache": pointwise(2 * kv),
        "attention": attention,
        "attn.c_proj": linear("attn.c_proj"),
        "mlp.c_fc": linear("mlp.c_fc"),
        "GELU": pointwise(2 * F),
        "mlp.c_proj": linear("mlp.c_proj"),
        "ln_f": norms(1),
        "lm_head": Work(
            head, 2 * batch * C * V, itemsize, 0 if config.tie_word_embeddings else V * C
        ),
        "rest": Work(sums + batch * V * size, 0),  # residual and other sums, views, argmax
    }
