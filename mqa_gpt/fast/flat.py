"""The model's forward pass without its modules: the same operators, called one after the other.

On a CPU the weights that a decode step reads evict Python's own data from the caches, so that a
call costs many times what it costs in an idle loop. A module calls modules, which look up
parameters and hooks, about ten of them per layer. Here they are looked up once, and only the
operators are called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all

from mqa_gpt.attention import Attention, is_own, positions_from
from mqa_gpt.cache import KVCache
from mqa_gpt.fast.int8 import Int8Embedding, Int8Linear
from mqa_gpt.fast.packing import PackedInt8Linear, PackedLinear
from mqa_gpt.model import GPT, MLP, Block, MultiQueryAttention, Transformer

Forward = Callable[[Tensor, KVCache], Tensor]
Function = Callable[[Tensor], Tensor]

Kinds = tuple[type[nn.Module], ...]

_LINEAR: Kinds = (nn.Linear, Int8Linear, PackedLinear, PackedInt8Linear)
_EMBEDDING: Kinds = (nn.Embedding, Int8Embedding)
_NORM: Kinds = (nn.LayerNorm,)
_DROPOUT: Kinds = (nn.Dropout,)

# Which modules a module of ours holds, by name, and of which types they may be.
_PLACES: dict[type[nn.Module], dict[str, Kinds]] = {
    GPT: {"transformer": (Transformer,), "lm_head": _LINEAR},
    Transformer: {
        "wte": _EMBEDDING,
        "wpe": (nn.Embedding,),
        "drop": _DROPOUT,
        "h": (nn.ModuleList,),
        "ln_f": _NORM,
    },
    Block: {"ln_1": _NORM, "attn": (MultiQueryAttention,), "ln_2": _NORM, "mlp": (MLP,)},
    MultiQueryAttention: {"c_attn": _LINEAR, "c_proj": _LINEAR, "resid_dropout": _DROPOUT},
    MLP: {"c_fc": _LINEAR, "c_proj": _LINEAR, "dropout": _DROPOUT},
}
_KINDS: Kinds = (*_PLACES, *_LINEAR, *_EMBEDDING, *_NORM, *_DROPOUT, nn.ModuleList)
_FORWARDS: dict[type[nn.Module], Any] = {kind: kind.forward for kind in _KINDS}


def is_plain(model: GPT) -> bool:
    """Whether its forward pass is what `mqa_gpt.model` says and no more.

    It is not where it holds other code: hooks, other modules, another `forward`, `attend` or the
    like; nor in training mode, because of dropout.
    """
    if hooks_of_all._global_forward_hooks or hooks_of_all._global_forward_pre_hooks:
        return False
    modules = list(model.modules())
    attends = {module.attend for module in modules if isinstance(module, MultiQueryAttention)}
    return all(map(_is_plain, modules)) and all(map(is_own, attends))


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is as the model made it, in eval mode, with its own children."""
    kind = type(module)
    if kind.forward is not _FORWARDS.get(kind):
        return False
    if not vars(module).keys().isdisjoint(("forward", "split", "activate")):
        return False
    if module.training or module._forward_hooks or module._forward_pre_hooks:
        return False
    held = module._modules
    if isinstance(module, nn.ModuleList):
        return all(type(child) is Block for child in held.values())
    places = _PLACES.get(kind, {})
    return held.keys() == places.keys() and all(
        type(child) in places[name] for name, child in held.items()
    )


def flat_forward(model: GPT) -> Forward:
    """A function of ids (B, T) and a cache that gives the model's logits (B, T, V).

    Where the model `is_plain` and is not compiled, its modules are not called. Their parts are
    looked up now: get a new function after modules, hooks or attention were replaced. Only what
    `mqa_gpt.research` records or patches may come later, since each call asks `is_watched`.
    """
    is_compiled = any(module._compiled_call_impl for module in model.modules())
    if type(model) is not GPT or is_compiled or not is_plain(model):
        return lambda ids, cache: model(ids, cache=cache)
    flat = without_modules(model)
    return lambda ids, cache: (model if is_watched(model) else flat)(ids, cache)


def is_watched(model: GPT) -> bool:
    """Whether the model's `forward` is wrapped, as it is while it is recorded or patched: a step
    that does not call its modules must ask this before each run."""
    return "forward" in vars(model)


def without_modules(model: GPT) -> Forward:
    """The function of `flat_forward` for any model: it calls the modules' `forward`, `split`,
    `attend` and `activate` as they are now, and no hooks."""
    transformer = model.transformer
    embed, embed_position = transformer.wte.forward, transformer.wpe.forward
    layers = [_Layer.of(block) for block in cast(list[Block], transformer.h)]
    norm, head = transformer.ln_f.forward, model.lm_head.forward

    def forward(ids: Tensor, cache: KVCache) -> Tensor:
        T = ids.shape[1]
        cache.require_room(T)
        start = cache.start
        x = embed(ids) + embed_position(positions_from(start, T, ids.device))  # (B, T, C)
        for layer in layers:
            q, kv = layer.split(layer.c_attn(layer.ln_1(x)))  # (B, T, H, D), (B, T, G, 2D)
            k, v = cache.append(layer.number, kv).chunk(2, dim=-1)  # (B, S, G, D) each
            y = layer.attend(q, k, v, start, layer.scale, 0.0)  # (B, T, H, D)
            x = x + layer.attn_c_proj(y.flatten(2))  # (B, T, C)
            h = layer.activate(layer.c_fc(layer.ln_2(x)))  # (B, T, F)
            x = x + layer.mlp_c_proj(h)  # (B, T, C)
        cache.advance(T)
        return head(norm(x))  # (B, T, V)

    return forward


class _Layer(NamedTuple):
    """What a layer calls, by the names of its modules."""

    number: int
    ln_1: Function
    c_attn: Function
    split: Callable[[Tensor], tuple[Tensor, Tensor]]
    attend: Attention
    scale: float
    attn_c_proj: Function
    ln_2: Function
    c_fc: Function
    activate: Function
    mlp_c_proj: Function

    @classmethod
    def of(cls, block: Block) -> _Layer:
        attn, mlp = block.attn, block.mlp
        return cls(
            number=attn.layer,
            ln_1=block.ln_1.forward,
            c_attn=attn.c_attn.forward,
            split=attn.split,
            attend=attn.attend,
            scale=attn.scale,
            attn_c_proj=attn.c_proj.forward,
            ln_2=block.ln_2.forward,
            c_fc=mlp.c_fc.forward,
            activate=mlp.activate,
            mlp_c_proj=mlp.c_proj.forward,
        )
