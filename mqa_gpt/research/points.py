"""The names of what can be recorded and patched.

Every module's output has the module's name in the checkpoint: `transformer.h.3` is the residual
stream after layer 3, `transformer.h.3.mlp` what its MLP adds. What textbooks name inside a layer,
with shapes in the dimensions of `mqa_gpt.model`:

    transformer.h.3.resid_pre      (B, T, C)     residual stream before the layer
                   .ln_1           (B, T, C)     normalised input of the attention (a module)
                   .attn.q         (B, T, H, D)  queries of the new positions
                   .attn.k, .v     (B, T, G, D)  keys and values of the new positions, as cached
                   .attn.k_read    (B, S, H, D)  all keys as each query head reads them
                   .attn.v_read    (B, S, H, D)  all values likewise
                   .attn.scores    (B, H, T, S)  q k^T scale, -inf where the mask hides a key
                   .attn.probs     (B, H, T, S)  their softmax
                   .attn.z         (B, T, H, D)  each head's weighted sum of the values
                   .attn.result    (B, T, H, C)  what each head adds to the residual stream
                   .attn           (B, T, C)     their sum and the bias (a module)
                   .resid_mid      (B, T, C)     residual stream between the sublayers
                   .ln_2           (B, T, C)     normalised input of the MLP (a module)
                   .mlp.pre        (B, T, F)     MLP before the activation, = .mlp.c_fc
                   .mlp.post       (B, T, F)     after it
                   .mlp            (B, T, C)     what the MLP adds (a module)
                   .resid_post     (B, T, C)     residual stream after the layer, = transformer.h.3
    logits                         (B, T, V)     = lm_head

A segment between dots may be a wildcard: `transformer.h.*.attn.probs`, `transformer.h.[0-3].mlp`.
TransformerLens' names for the same tensors are accepted too: `blocks.3.attn.hook_pattern`,
`blocks.*.hook_resid_pre`. (Its `ln1.hook_normalized` is not: it leaves out gain and bias.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache, lru_cache
from typing import NamedTuple

from torch import nn

from mqa_gpt.errors import InputError, shown
from mqa_gpt.model import GPT

LAYERS = "transformer.h."
INSIDE_ATTENTION = ("k_read", "v_read", "scores", "probs")


class Site(NamedTuple):
    """A place in the forward pass where Python can step in.

    Attributes:
        module: its name.
        kind: "input" or "output" of the module, or the name of something inside attention.
    """

    module: str
    kind: str


WHOLE = Site("", "forward")  # the model itself


class Point(NamedTuple):
    """A tensor that has a name.

    Attributes:
        name: without aliases.
        site: where it is seen.
        part: which part or form of what is seen there; "" for all of it.
        axes: a letter per dimension; N for a module's own width.
        layer: None outside the layers.
    """

    name: str
    site: Site
    part: str
    axes: str
    layer: int | None

    @property
    def position_axis(self) -> int:
        """The axis of positions: the queries' where there are keys too."""
        return self.axes.find("T" if "T" in self.axes else "S")

    @property
    def head_axis(self) -> int | None:
        """The axis of query heads, or of K/V heads; None if there is none."""
        return next((self.axes.index(x) for x in "HG" if x in self.axes), None)


# Inside a layer: name -> module below the layer, kind, part, axes.
_PARTS: dict[str, tuple[str, str, str, str]] = {
    "resid_pre": ("", "input", "", "BTC"),
    "resid_mid": ("ln_2", "input", "shared", "BTC"),
    "attn.q": ("attn.c_attn", "output", "q", "BTHD"),
    "attn.k": ("attn.c_attn", "output", "k", "BTGD"),
    "attn.v": ("attn.c_attn", "output", "v", "BTGD"),
    "attn.k_read": ("attn", "k_read", "", "BSHD"),
    "attn.v_read": ("attn", "v_read", "", "BSHD"),
    "attn.scores": ("attn", "scores", "", "BHTS"),
    "attn.probs": ("attn", "probs", "", "BHTS"),
    "attn.z": ("attn.c_proj", "input", "z", "BTHD"),
    "attn.result": ("attn.c_proj", "result", "", "BTHC"),
    "mlp.post": ("mlp.c_proj", "input", "", "BTF"),
}
_SAME = {"resid_post": "", "mlp.pre": "mlp.c_fc"}  # other names of modules' outputs in a layer

# TransformerLens' names -> ours.
_LENS = {
    "hook_embed": "transformer.wte",
    "embed.hook_out": "transformer.wte",
    "hook_pos_embed": "transformer.wpe",
    "pos_embed.hook_out": "transformer.wpe",
    "ln_final.hook_out": "transformer.ln_f",
    "unembed.hook_out": "lm_head",
}
_LENS_IN_LAYER = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn",
    "hook_mlp_out": "mlp",
    "hook_in": "resid_pre",
    "hook_out": "resid_post",
    "ln1.hook_out": "ln_1",
    "ln2.hook_out": "ln_2",
    "attn.hook_out": "attn",
    "mlp.hook_out": "mlp",
    "attn.hook_q": "attn.q",
    "attn.hook_k": "attn.k",
    "attn.hook_v": "attn.v",
    "attn.hook_attn_scores": "attn.scores",
    "attn.hook_pattern": "attn.probs",
    "attn.hook_z": "attn.z",
    "attn.hook_result": "attn.result",
    "mlp.hook_pre": "mlp.pre",
    "mlp.hook_post": "mlp.post",
}

_WIDTHS = {"c_attn": "N", "c_fc": "F", "lm_head": "V"}  # of modules' outputs; of all others C


@lru_cache
def plain_name(name: str) -> str:
    """A name or pattern in this project's own words."""
    name = {**_LENS, "logits": "lm_head"}.get(name, name)
    if name.startswith("blocks.") and name.count(".") >= 2:
        _, layer, inner = name.split(".", 2)
        if inner not in _LENS_IN_LAYER:
            raise InputError(
                f"{shown(name)} has no equal here{_meant(get_close_matches(inner, _LENS_IN_LAYER))}"
                ": of TransformerLens' names in a layer there are "
                f"{', '.join(_LENS_IN_LAYER)}"
            )
        name = f"{LAYERS}{layer}.{_LENS_IN_LAYER[inner]}"
    if name.startswith(LAYERS) and name.count(".") >= 3:
        layer, inner = name.removeprefix(LAYERS).split(".", 1)
        if inner in _SAME:
            name = f"{LAYERS}{layer}.{_SAME[inner]}".rstrip(".")
    return name


def find_points(model: GPT, pattern: str) -> list[Point]:
    """The points that a name, alias or pattern stands for, layer by layer.

    Raises:
        InputError: none; says which names there are.
    """
    if not isinstance(pattern, str):
        raise InputError(f"a name is {shown(pattern)}: it must be a text such as transformer.h.3")
    name = plain_name(pattern)
    if not name.startswith(LAYERS):
        found = [_module_point(n) for n, m in model.named_modules() if _is_match(n, m, name)]
    else:
        layer, _, inner = name.removeprefix(LAYERS).partition(".")
        layers = _layers(layer, len(model.transformer.h))
        if inner in _PARTS or not inner:
            found = list(_same_in_all(layers, inner))
        else:
            found = [p for i in layers for p in _in_layer(i, model.transformer.h[i], inner)]
    if not found:
        raise InputError(
            f"{shown(pattern)} is not in this model of {model.config.n_layer} layers"
            f"{_meant(nearest_names(model, name))}: names are those of modules, such as "
            "transformer.h.3.mlp or lm_head, and in a layer "
            f"{', '.join([*_PARTS, *_SAME])}"
        )
    return found


def _meant(names: Sequence[str]) -> str:
    return f" (did you mean {' or '.join(names)}?)" if names else ""


def nearest_names(model: GPT, name: str, count: int = 3) -> list[str]:
    """Names of this model that look like one that it does not have, the nearest first.

    The layer stays the one that was asked for, where there is such a layer.
    """
    layer = re.search(r"\d+|\*", name)
    wanted = layer[0] if layer is not None else "*"
    if wanted.isdigit() and int(wanted) >= model.config.n_layer:
        wanted = "*"
    block = model.transformer.h[0]
    inside = [*_PARTS, *_SAME, *(n for n, _ in block.named_modules() if n)]
    known = [n for n, _ in model.named_modules() if n and not n.startswith(LAYERS[:-1])]
    known += ["logits", LAYERS + wanted, *(f"{LAYERS}{wanted}.{part}" for part in inside)]
    # Also what lacks "transformer.h", as in "3.mlp" or "attn.prob".
    short = {known_name.removeprefix(f"{LAYERS}{wanted}."): known_name for known_name in known}
    near = get_close_matches(name, known, count, cutoff=0.75)
    return near or [short[n] for n in get_close_matches(name, short, count, cutoff=0.6)]


@lru_cache
def _layers(pattern: str, count: int) -> tuple[int, ...]:
    """The layers whose number matches."""
    return tuple(i for i in range(count) if fnmatchcase(str(i), pattern))


@lru_cache
def _same_in_all(layers: tuple[int, ...], inner: str) -> tuple[Point, ...]:
    """A point that every layer has, whatever its modules are: of `_PARTS`, or its output ("")."""
    if inner:
        return tuple(_part_point(i, inner) for i in layers)
    return tuple(_module_point(f"{LAYERS}{i}", i) for i in layers)


def _in_layer(i: int, block: nn.Module, inner: str) -> list[Point]:
    """The points of layer i whose name after the layer's number matches."""
    return [_part_point(i, part) for part in _PARTS if matches(part, inner)] + [
        _module_point(f"{LAYERS}{i}.{n}", i)
        for n, module in block.named_modules()
        if _is_match(n, module, inner)
    ]


@cache
def _part_point(i: int, part: str) -> Point:
    below, kind, form, axes = _PARTS[part]
    module = f"{LAYERS}{i}.{below}" if below else f"{LAYERS}{i}"
    return Point(f"{LAYERS}{i}.{part}", Site(module, kind), form, axes, i)


@cache
def _module_point(name: str, layer: int | None = None) -> Point:
    axes = "BT" + _WIDTHS.get(name.rsplit(".", 1)[-1], "C")
    return Point(name, Site(name, "output"), "", axes, layer)


def _is_match(name: str, module: nn.Module, pattern: str) -> bool:
    return bool(name) and not isinstance(module, nn.ModuleList) and matches(name, pattern)


def matches(name: str, pattern: str) -> bool:
    """Whether a name fits a pattern, segment by segment."""
    names, patterns = name.split("."), pattern.split(".")
    return len(names) == len(patterns) and all(map(fnmatchcase, names, patterns))


class Selection:
    """Points that were asked for, in the forms in which a forward pass needs them.

    Attributes:
        asked: the points that each name stands for.
        points: all of them by their own names.
        at: the points at each site.
        wrapped: what has to be wrapped to see them, in this order; the whole model first.
    """

    def __init__(self, asked: Mapping[str, Sequence[Point]]) -> None:
        self.asked = asked
        self.points = {point.name: point for some in asked.values() for point in some}
        self.at: dict[Site, list[Point]] = {}
        for point in self.points.values():
            self.at.setdefault(point.site, []).append(point)
        self.wrapped = tuple(dict.fromkeys((WHOLE, *map(_wrapped_at, self.at))))


def select(model: GPT, names: str | Sequence[str]) -> Selection:
    """The points that the names stand for.

    Raises:
        InputError: not a GPT, or a name that stands for none.
    """
    if not isinstance(model, GPT):
        raise InputError(f"the model is {shown(model)}: expected a GPT, such as LLM.model")
    names = (names,) if isinstance(names, str) else names
    if isinstance(names, bytes) or not isinstance(names, Sequence) or not names:
        raise InputError(f"names are {shown(names)}: expected a name such as transformer.h.3.mlp")
    if all(isinstance(name, str) for name in names):
        known = _select_parts(tuple(names), len(model.transformer.h))
        if known is not None:
            return known
    return Selection({name: find_points(model, name) for name in names})


@lru_cache
def _select_parts(names: tuple[str, ...], count: int) -> Selection | None:
    """The selection, if it is the same for all models of so many layers, whatever their modules."""
    asked = {}
    for name in names:
        layer, _, inner = plain_name(name).removeprefix(LAYERS).partition(".")
        if not plain_name(name).startswith(LAYERS) or (inner and inner not in _PARTS):
            return None
        asked[name] = _same_in_all(_layers(layer, count), inner)
    return Selection(asked) if all(asked.values()) else None


def _wrapped_at(site: Site) -> Site:
    """What is wrapped to see a site: a module's forward pass, or its attention function."""
    return Site(site.module, "attend" if site.kind in INSIDE_ATTENTION else "forward")
