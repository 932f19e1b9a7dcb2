"""Initial weights that hold an induction circuit, built by hand.

Programs repeat themselves: what followed a token once is likely to follow it again. Transformers
learn to copy with two heads in two successive layers (Olsson et al. 2022, "In-context Learning and
Induction Heads"). The first writes to every position which token came before it; the second attends
to positions whose previous token is the current one, and copies the token there. Training discovers
this after hundreds of millions of tokens. A run that sees fewer may start with the two heads, which
are then trained like all other parameters.

The circuit divides the channels of the residual stream (C wide, D per head):

    0 ... C/2            position: sines, then cosines
    C/2 ... C/2 + D      WORD: a part of the token's embedding
    C/2 + D ... C/2 + 2D PREVIOUS: the WORD of the token before, once layer 0 has written it
"""

from __future__ import annotations

import math

import torch

from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import ConfigError
from mqa_gpt.model import GPT, MLP, MultiQueryAttention

POSITION_SHARPNESS = 1.8  # scales layer 0's queries and keys
WORD_SHARPNESS = 2.0  # scales layer 1's queries and keys
COPY_STRENGTH = 0.5  # scales what layer 1 writes


def require_room(config: GPTConfig) -> None:
    """Raise ConfigError unless a model of these sizes has room for the circuit."""
    C, D = config.n_embd, config.head_dim
    if not config.multi_query or config.n_layer < 2 or D % 2 or C < 4 * D or C % 4:
        raise ConfigError(
            "model.induction is true, which needs multi_query, two layers, an even width of heads, "
            "and an n_embd that is a multiple of 4 and at least 4 heads wide"
        )


@torch.no_grad()
def start_from_induction(model: GPT) -> None:
    """Write an induction circuit into head 0 of a new model's layers 0 and 1, in place.

    Everything else that writes to the residual stream starts at zero, or it would drown the
    circuit.

    Raises:
        ConfigError: as `require_room`.
    """
    config = model.config
    require_room(config)
    C, D = config.n_embd, config.head_dim
    std = config.initializer_range
    for module in model.modules():
        if isinstance(module, MultiQueryAttention | MLP):
            module.c_proj.weight.zero_()
    first, second, *_ = (m for m in model.modules() if isinstance(m, MultiQueryAttention))

    # Positions: sinusoids of C/4 wavelengths from 2 to 2 n_positions (Vaswani et al. 2017, section
    # 3.5). Looking back by a fixed distance rotates each of them by a fixed angle.
    positions, half = model.transformer.wpe.weight, C // 2
    frequencies = math.pi * config.n_positions ** -torch.linspace(0, 1, C // 4)  # (C/4,)
    angles = torch.arange(config.n_positions)[:, None] * frequencies  # (n_positions, C/4)
    positions.zero_()
    positions[:, :half] = 2 * std * torch.cat([angles.sin(), angles.cos()], dim=1)
    model.transformer.wte.weight[:, :half] /= 2
    word = half + torch.arange(D)
    previous = word + D

    # Layer 0: the query is the position rotated back by one, the key the position itself. The D/2
    # shortest wavelengths separate neighbours.
    n = D // 2
    wave = torch.arange(n)
    sines, cosines = wave, C // 4 + wave  # channels
    query, key, value, out = _head_0(first)
    turn_cos, turn_sin = frequencies[:n].cos(), frequencies[:n].sin()
    query[wave, sines], query[wave, cosines] = turn_cos, -turn_sin  # sin(wt - w)
    query[n + wave, cosines], query[n + wave, sines] = turn_cos, turn_sin  # cos(wt - w)
    key[wave, sines] = key[n + wave, cosines] = 1.0
    query *= POSITION_SHARPNESS
    key *= POSITION_SHARPNESS
    channel = torch.arange(D)
    value[channel, word] = 1.0
    out[previous, channel] = std

    # Layer 1: where the previous token is the current one, copy the token.
    query, key, value, out = _head_0(second)
    query[channel, word] = WORD_SHARPNESS
    key[channel, previous] = WORD_SHARPNESS
    value[channel, word] = 1.0
    out[word, channel] = COPY_STRENGTH


def _head_0(attention: MultiQueryAttention) -> tuple[torch.Tensor, ...]:
    """Head 0's query weights (D, C), the shared key's and value's (D, C), and head 0's columns of
    c_proj (C, D): views, filled with zeros."""
    D, C = attention.head_dim, attention.c_proj.weight.shape[0]
    weight = attention.c_attn.weight
    views = weight[:D], weight[C : C + D], weight[C + D :], attention.c_proj.weight[:, :D]
    for view in views:
        view.zero_()
    return views
