"""The model's forward pass without its modules: the same operators, called one after the other.

On a CPU each weight that a decode step reads drives from the caches what Python needs to get to the
next one, so that a call costs many times what it costs in a loop that does nothing else. A module
calls modules, which look for their parameters and hooks; and a step has some ten of them per layer.
Here all that is looked up once, and only operators are left to call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all

from mqa_gpt.attention import Attention, is_own, positions_from
from mqa_gpt.cache import KVCache
from mqa_gpt.model import GPT, MLP, Block, MultiQueryAttention, Transformer
from mqa_gpt.packing import PackedInt8Linear, PackedLinear
from mqa_gpt.quantization import Int8Embedding, Int8Linear

PLAIN_FORWARDS: dict[type[nn.Module], Any] = {
    kind: kind.forward
    for kind in (
        *(GPT, Transformer, Block, MultiQueryAttention, MLP),
        *(nn.ModuleList, nn.Embedding, nn.Linear, nn.LayerNorm, nn.Dropout),
        *(Int8Embedding, Int8Linear, PackedLinear, PackedInt8Linear),
    )
}

Forward = Callable[[Tensor, KVCache], Tensor]
Function = Callable[[Tensor], Tensor]


def is_plain(model: GPT) -> bool:
    """Whether its forward pass is what `mqa_gpt.model` says and no more.

    It is not where somebody has put Python code of their own into it: hooks, modules of other
    types, another `forward` or `attend`; nor in training mode, for dropout.
    """
    if hooks_of_all._global_forward_hooks or hooks_of_all._global_forward_pre_hooks:
        return False
    return all(_is_plain(module) for module in model.modules())


def _is_plain(module: nn.Module) -> bool:
    """Whether it is a module of ours as we made it, in eval mode."""
    kind = type(module)
    if kind.forward is not PLAIN_FORWARDS.get(kind) or "forward" in vars(module):
        return False
    if isinstance(module, MultiQueryAttention) and not is_own(module.attend):
        return False
    return not (module.training or module._forward_hooks or module._forward_pre_hooks)


def inline(model: GPT) -> Forward:
    """The model, or a function that does the same sooner: where it `is_plain` and not compiled.

    The function is made of the model's modules of now: make it anew where they, their hooks or
    backends may have changed.

    Returns:
        What takes ids (B, T) and a cache and gives logits (B, T, V), as `GPT.forward` does.
    """
    is_compiled = any(module._compiled_call_impl for module in model.modules())
    if is_compiled or not is_plain(model):
        return model
    transformer, head = model.transformer, model.lm_head.forward
    embed, embed_position = transformer.wte.forward, transformer.wpe.forward
    layers = [_Layer.of(block) for block in cast(list[Block], transformer.h)]
    norm = _norm(transformer.ln_f)

    def forward(ids: Tensor, cache: KVCache) -> Tensor:
        T = ids.shape[1]
        cache.require_room(T)
        start = cache.start
        x = embed(ids) + embed_position(positions_from(start, T, ids.device))  # (B, T, C)
        for layer, of in enumerate(layers):
            q, kv = of.split(of.attn_in(of.norm_1(x)))  # (B, T, H, D), (B, T, G, 2D)
            k, v = cache.append(layer, kv).chunk(2, dim=-1)  # (B, S, G, D) each
            y = of.attend(q, k, v, start, of.scale, 0.0)  # (B, T, H, D)
            x = x + of.attn_out(y.flatten(2))  # (B, T, C)
            x = x + of.mlp_out(of.activate(of.mlp_in(of.norm_2(x))))  # (B, T, C)
        cache.advance(T)
        return head(norm(x))  # (B, T, V)

    return forward


class _Layer(NamedTuple):
    """What a layer calls, in this order; `split`, `attend` and `activate` as in its modules."""

    norm_1: Function
    attn_in: Function
    split: Callable[[Tensor], tuple[Tensor, Tensor]]
    attend: Attention
    scale: float
    attn_out: Function
    norm_2: Function
    mlp_in: Function
    activate: Function
    mlp_out: Function

    @classmethod
    def of(cls, block: Block) -> _Layer:
        attn, mlp = block.attn, block.mlp
        return cls(
            _norm(block.ln_1),
            attn.c_attn.forward,
            attn.split,
            attn.attend,
            attn.scale,
            attn.c_proj.forward,
            _norm(block.ln_2),
            mlp.c_fc.forward,
            mlp.activate,
            mlp.c_proj.forward,
        )


def _norm(norm: nn.LayerNorm) -> Function:
    """`norm.forward`, which would look its parameters up each time."""
    of: tuple[Any, ...] = (norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return lambda x: torch.layer_norm(x, *of)
