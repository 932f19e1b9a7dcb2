"""Wraps around a model's modules for as long as somebody records or patches it.

What enters and leaves a module is enough for all but four points: q, k and v are parts of what
`c_attn` gives, a head's output is part of what `c_proj` gets. Scores, probabilities, and keys and
values as the heads read them exist inside the attention function only, which is wrapped where
somebody asks for these. A wrap is an attribute of the instance (`forward`, `attend`) that hides the
class's own: it costs a fraction of what PyTorch's hooks cost, and `mqa_gpt.fast.plain` sees that
the model is not plain. A model without a context has none.

All contexts on a model share its wraps, and each forward pass serves the contexts of the thread
(or asynchronous task) that runs it. Patches come first, in the order in which they were entered;
records see what the model goes on with. After each pass it is checked that all points were reached.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mqa_gpt.attention import (
    Attention,
    attention_probabilities,
    attention_scores,
    positions_from,
    weighted_values,
)
from mqa_gpt.cache import KVCache
from mqa_gpt.errors import InputError, shown
from mqa_gpt.fast.int8 import Int8Linear
from mqa_gpt.model import GPT, Block, MultiQueryAttention
from mqa_gpt.research.points import INSIDE_ATTENTION, WHOLE, Point, Selection, Site


class Probe:
    """What one context does at some points of a model: the base of records and patches."""

    is_patch: ClassVar[bool]

    def __init__(self, model: GPT, selection: Selection) -> None:
        parts = (model, model.transformer, *model.transformer.h)
        if any(module._compiled_call_impl for module in parts):
            raise InputError("the model is compiled: take it uncompiled, since that code is fixed")
        self.model = model
        self.runs = 0  # forward passes
        self.is_open = True  # until its context ends
        self.points = selection.points
        self.at = selection.at
        self.wrapped = selection.wrapped

    def visit(self, point: Point, x: Tensor, run: Pass) -> Tensor:
        """Look at, or replace, what is seen at the point's site."""
        raise NotImplementedError


class Pass:
    """One forward pass, as probes know it.

    Attributes:
        ids: (B, T) int64.
        start: position of each row's first token, an int or (B,) int64.
        limits: where rows end, (B,), if shorter rows are padded; else None.
        labels: the engine's rows, else None.
        memory: the keys and values of the cache that is fed; None without one.
        wanted: where a probe has a point.
    """

    def __init__(self, model: GPT, probes: Sequence[Probe], given: dict[str, Any]) -> None:
        cache: KVCache | None = given.get("cache")
        start = 0 if cache is None else cache.start
        self.model = model
        self.start = start.clone() if isinstance(start, Tensor) else start  # the cache's grows
        self.limits = None if cache is None else cache.limits
        self.labels = None if cache is None else cache.labels
        self.memory = None if cache is None else cache.kv
        # Steps of the engine may reuse the buffer of their ids.
        self.ids: Tensor = given["ids"] if self.labels is None else given["ids"].clone()
        self._probes = sorted(probes, key=_is_record)  # patches first
        self.wanted: AbstractSet[Site] = probes[0].at.keys()
        if len(probes) > 1:
            self.wanted = set[Site]().union(*(probe.at for probe in probes))
        self._visited: set[Site] = set()
        for probe in probes:
            probe.runs += 1

    @property
    def positions(self) -> Tensor:
        """Of the tokens: (1 or B, T)."""
        return positions_from(self.start, self.ids.shape[1], self.ids.device)

    def changes(self, site: Site) -> bool:
        """Whether a patch has a point there."""
        return any(site in probe.at for probe in self._probes if probe.is_patch)

    def visit(self, site: Site, x: Tensor) -> Tensor:
        """Show x to the probes; the model continues with what this returns."""
        self._visited.add(site)
        for probe in self._probes:
            for point in probe.at.get(site, ()):
                x = probe.visit(point, x, self)
        return x

    def again(self, labels: Sequence[Any]) -> Pass:
        """The pass as it is repeated in the same memory, of other rows of the engine."""
        other = copy.copy(self)
        other.ids, other.labels = self.ids.clone(), labels
        if isinstance(self.start, Tensor):
            other.start = self.start.clone()
        return other

    def end(self) -> None:
        """Forget the probes: records keep their passes, and a cycle would keep the tensors."""
        self._probes = []

    def require_all_visited(self) -> None:
        """InputError if a point was not reached: values would be silently missing or unpatched."""
        if len(self._visited) < len(self.wanted):
            missing = self.wanted - self._visited
            names = ", ".join(sorted(f"the {kind} of {name}" for name, kind in missing))
            raise InputError(
                f"the forward pass did not reach {names}: change modules, backend or attention "
                "before recording or patching, not inside the context"
            )


ACTIVE: ContextVar[tuple[Probe, ...]] = ContextVar("active", default=())
PASS: ContextVar[Pass | None] = ContextVar("pass", default=None)

_WRAPS: dict[GPT, Wraps] = {}  # of the models that are watched now
_LOCK = threading.Lock()


@contextmanager
def watching(probe: Probe) -> Iterator[None]:
    """Let a probe take part in the model's forward passes in this thread."""
    model = probe.model
    with _LOCK:
        wraps = _WRAPS.get(model) or Wraps(model)
        wraps.add(probe)
        _WRAPS[model] = wraps
    ACTIVE.set((*ACTIVE.get(), probe))
    try:
        yield
    finally:
        probe.is_open = False
        ACTIVE.set(tuple(other for other in ACTIVE.get() if other is not probe))
        with _LOCK:
            wraps.remove(probe)
            if not wraps.is_used:
                del _WRAPS[model]


class Wraps:
    """The wraps around one model's parts; one is there while a probe needs it."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self._covers: dict[Site, _Cover] = {}  # by what is wrapped

    @property
    def is_used(self) -> bool:
        """Whether a probe is left; without one, all wraps are gone."""
        return bool(self._covers)

    def add(self, probe: Probe) -> None:
        """Wrap what a probe needs and is not wrapped yet."""
        covers, done = self._covers, []
        try:
            for part in probe.wrapped:
                cover = covers.get(part)
                if cover is None:
                    cover = covers[part] = self._cover(part)
                cover.uses += 1
                done.append(part)
        except BaseException:
            self._release(done)
            raise

    def remove(self, probe: Probe) -> None:
        """Unwrap what only this probe needed."""
        self._release(probe.wrapped)

    def _release(self, parts: Iterable[Site]) -> None:
        for part in parts:
            cover = self._covers[part]
            cover.uses -= 1
            if not cover.uses:
                del self._covers[part]
                cover.remove()

    def _cover(self, part: Site) -> _Cover:
        """Put a wrap in place."""
        if part is WHOLE:
            return _Cover(self.model, part, self._whole)
        module = module_at(self.model, part.module)
        return _Cover(module, part, self._attend if part.kind == "attend" else self._module)

    def _whole(self, _: str, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The model's forward pass, in which its parts can ask what pass they are in."""

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            probes = self._own_probes()
            given = dict(zip(("ids", "cache", "logits_at"), args, strict=False)) | kwargs
            ids = given.get("ids")
            if not probes or not isinstance(ids, Tensor) or ids.ndim != 2:
                return plain(*args, **kwargs)
            run = Pass(self.model, probes, given)
            at = given.pop("logits_at", None)
            token = PASS.set(run)
            try:
                if at is None or Site("lm_head", "output") not in run.wanted:
                    output = plain(*args, **kwargs)
                else:  # all logits are asked for
                    rows = torch.arange(len(at), device=at.device)
                    output = plain(**given)[rows, at]  # (B, V) or (0, V)
            finally:
                PASS.reset(token)
                run.end()
            run.require_all_visited()
            return output

        forward.recorders = self.recorders  # type: ignore[attr-defined]
        return forward

    def recorders(self) -> list[Probe] | None:
        """Who records in this thread, for `WatchedReplay`; None if there is a patch."""
        probes = self._own_probes()
        return None if any(probe.is_patch for probe in probes) else probes

    def _module(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        """A module whose input and output are shown."""
        model = self.model
        before, heads, after = _around(name)

        def forward(*args: Any, **kwargs: Any) -> Any:
            run = PASS.get()
            if run is None or run.model is not model:
                self._require_pass()
                return plain(*args, **kwargs)
            if before in run.wanted:
                args = (run.visit(before, args[0]), *args[1:])
            output = plain(*args, **kwargs)
            if heads in run.wanted:
                attn = cast(MultiQueryAttention, module_at(model, name.removesuffix(".c_proj")))
                parts = head_results(attn.c_proj, args[0], attn.n_head)  # (B, T, H, C)
                changed = run.visit(heads, parts)
                # An edit changes the sum by as much as it changes the parts.
                output = output if changed is parts else output + (changed - parts).sum(2)
            if after not in run.wanted:
                return output
            if not isinstance(output, Tensor):
                raise InputError(f"{name} gives {shown(output)}: only tensors can be recorded")
            return run.visit(after, output)

        return forward

    def _attend(self, name: str, plain: Attention) -> Attention:
        """An attention function whose inside is shown."""
        keys, values, scored, weighed = sites = [Site(name, kind) for kind in INSIDE_ATTENTION]

        def attend(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            start: int | Tensor,
            scale: float,
            dropout_p: float = 0.0,
        ) -> Tensor:
            run = PASS.get()
            if run is None or run.model is not self.model or run.wanted.isdisjoint(sites):
                self._require_pass()
                return plain(q, k, v, start, scale, dropout_p)
            has_grad = torch.is_grad_enabled() and q.requires_grad
            if keys in run.wanted or values in run.wanted:
                heads = q.shape[2]
                seen_k = run.visit(keys, each_head(k, heads))  # (B, S, H, D)
                seen_v = run.visit(values, each_head(v, heads))
                if has_grad or run.changes(keys) or run.changes(values):
                    k, v = seen_k, seen_v
            if scored in run.wanted or weighed in run.wanted:
                scores = attention_scores(q, k, start, scale)  # (B, H, T, S)
                scores = run.visit(scored, scores)
                probabilities = run.visit(weighed, attention_probabilities(scores))
                if has_grad or run.changes(scored) or run.changes(weighed):
                    return weighted_values(F.dropout(probabilities, dropout_p), v)
            return plain(q, k, v, start, scale, dropout_p)

        return attend

    def _own_probes(self) -> list[Probe]:
        """Of this thread, on this model."""
        return [probe for probe in ACTIVE.get() if probe.model is self.model and probe.is_open]

    def _require_pass(self) -> None:
        """InputError if somebody in this thread watches the model, but no pass is under way."""
        run = PASS.get()
        if self._own_probes() and (run is None or run.model is not self.model):
            raise InputError(
                "a part of the model is called by itself, so the tokens' positions are not known: "
                "call the model, or do so outside of record and patch"
            )


@cache
def _around(name: str) -> tuple[Site, Site, Site]:
    """The sites of a module: what it gets, what its heads add, what it gives."""
    return Site(name, "input"), Site(name, "result"), Site(name, "output")


def _is_record(probe: Probe) -> bool:
    return not probe.is_patch


class _Cover:
    """A wrap that hides an attribute of an instance or its class.

    Args:
        owner: the module.
        part: its name, and the attribute's.
        make: gives the wrap, from the module's name and what the wrap hides.
    """

    __slots__ = ("before", "name", "own", "uses", "wrap")

    def __init__(
        self, owner: nn.Module, part: Site, make: Callable[[str, Callable[..., Any]], Any]
    ) -> None:
        module, self.name = part
        self.uses = 0
        self.own = own = vars(owner)  # `__setattr__` would first ask what kind of thing this is
        self.before = own.get(self.name)  # None: only the class has it
        plain = self.before or getattr(owner, self.name)
        self.wrap = own[self.name] = make(module, plain)
        self.wrap.watches = plain  # for `is_plain`

    def remove(self) -> None:
        """Bring back what was hidden."""
        if self.own.get(self.name) is not self.wrap:
            return  # replaced inside the context, which passes have reported
        if self.before is None:
            del self.own[self.name]
        else:
            self.own[self.name] = self.before


def module_at(model: nn.Module, name: str) -> nn.Module:
    """`model.get_submodule(name)`, several times faster."""
    for part in _path(name):
        model = model._modules[part]  # type: ignore[assignment]  # a KeyError if there is none
    return model


@cache
def _path(name: str) -> tuple[str, ...]:
    return tuple(name.split("."))


def each_head(x: Tensor, heads: int) -> Tensor:
    """K or V (B, S, G, D) as each query head reads it: (B, S, H, D), without a copy if G = 1."""
    B, S, G, D = x.shape
    return x[:, :, :, None].expand(B, S, G, heads // G, D).flatten(2, 3)


def head_results(c_proj: nn.Module, z: Tensor, heads: int) -> Tensor:
    """What each head adds to the residual stream: z (B, T, C), side by side -> (B, T, H, C)."""
    weight = cast(Tensor, c_proj.weight)  # (C, C)
    if isinstance(c_proj, Int8Linear):
        weight = (weight * c_proj.weight_scale[:, None]).to(z.dtype)
    z = z.view(*z.shape[:-1], heads, -1)  # (B, T, H, D)
    return torch.einsum("bthd,chd->bthc", z, weight.view(len(weight), heads, -1))


def attention_of(model: GPT, layer: int) -> MultiQueryAttention:
    """A layer's attention module."""
    return cast(Block, model.transformer.h[layer]).attn


def part_of(part: str, x: Tensor, attn: MultiQueryAttention | None) -> Tensor:
    """A point's form of what is seen at its site, as a view."""
    if part in ("", "shared"):
        return x
    assert attn is not None
    if part == "z":
        return x.view(*x.shape[:-1], attn.n_head, attn.head_dim)  # (B, T, H, D)
    q, kv = attn.split(x)  # (B, T, H, D), (B, T, G, 2D)
    k, v = kv[..., : attn.head_dim], kv[..., attn.head_dim :]  # (B, T, G, D) each
    return {"q": q, "k": k, "v": v}[part]


def with_part(part: str, x: Tensor, new: Tensor, attn: MultiQueryAttention | None) -> Tensor:
    """x with the point's form of it replaced: a copy, but for a stream that others share."""
    if not part:
        return new
    if part == "shared":  # the block adds the MLP's output to the tensor that ln_2 gets
        return x.copy_(new)
    x = x.clone()
    part_of(part, x, attn).copy_(new)
    return x
