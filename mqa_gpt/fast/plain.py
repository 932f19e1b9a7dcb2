"""Whether a model is the one that `mqa_gpt.model` defines, so that faster code may compute it."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as hooks_of_all

from mqa_gpt.attention import is_own
from mqa_gpt.fast.int8 import Int8Embedding, Int8Linear
from mqa_gpt.model import GPT, MLP, Block, MultiQueryAttention, Transformer

Kinds = tuple[type[nn.Module], ...]

_LINEAR: Kinds = (nn.Linear, Int8Linear)
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


def is_plain(model: GPT, watched: bool = False) -> bool:
    """Whether its forward pass is what `mqa_gpt.model` says and no more.

    It is not where it holds other code: hooks, other modules, another `forward`, `attend` or the
    like; nor in training mode, because of dropout.

    Args:
        watched: look through the wraps of `mqa_gpt.research`, at the model without them.
    """
    if hooks_of_all._global_forward_hooks or hooks_of_all._global_forward_pre_hooks:
        return False
    modules = list(model.modules())
    attends = {module.attend for module in modules if isinstance(module, MultiQueryAttention)}
    if watched:
        attends = {getattr(attend, "watches", attend) for attend in attends}
    return all(_is_plain(m, watched) for m in modules) and all(map(is_own, attends))


def _is_plain(module: nn.Module, watched: bool) -> bool:
    """Whether a module is as the model made it, in eval mode, with its own children."""
    kind = type(module)
    if kind.forward is not _FORWARDS.get(kind):
        return False
    own = vars(module)
    is_changed = not own.keys().isdisjoint(("forward", "split", "activate"))
    if is_changed and not (watched and _is_wrapped_only(module)):
        return False
    if module.training or module._forward_hooks or module._forward_pre_hooks:
        return False
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return False
    held = module._modules
    if isinstance(module, nn.ModuleList):
        return all(type(child) is Block for child in held.values())
    places = _PLACES.get(kind, {})
    return held.keys() == places.keys() and all(
        type(child) in places[name] for name, child in held.items()
    )


def _is_wrapped_only(module: nn.Module) -> bool:
    """Whether all that hides its class's methods is a wrap around its own `forward`."""
    own = vars(module)
    inside = getattr(own.get("forward"), "watches", None)
    is_own_forward = getattr(inside, "__func__", None) is type(module).forward
    return is_own_forward and own.keys().isdisjoint(("split", "activate"))


def is_watched(model: GPT) -> bool:
    """Whether the model's `forward` is wrapped, as it is while it is recorded or patched: a step
    that does not call its modules must ask this before each run."""
    return "forward" in vars(model)
