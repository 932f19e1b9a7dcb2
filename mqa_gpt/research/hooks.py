"""Hooks on a model for as long as somebody records or patches it.

PyTorch's hooks see what enters and leaves a module, and that is enough for all but four points: q,
k and v are parts of what `c_attn` gives, a head's output is part of what `c_proj` gets. Scores,
probabilities, and keys and values as the heads read them exist inside the attention function only,
which is wrapped where somebody asks for these. A model without a context has neither.

All contexts on a model share its hooks, and each forward pass serves the contexts of the thread
(or asynchronous task) that runs it. Patches come first, in the order in which they were entered;
records see what the model goes on with. After each pass it is checked that all points were reached.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, Token
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mqa_gpt.attention import (
    attention_probabilities,
    attention_scores,
    positions_from,
    weighted_values,
)
from mqa_gpt.cache import KVCache
from mqa_gpt.errors import InputError, shown
from mqa_gpt.fast.int8 import Int8Linear
from mqa_gpt.model import GPT, Block, MultiQueryAttention
from mqa_gpt.research.points import Point, Site

INSIDE_ATTENTION = ("k_read", "v_read", "scores", "probs")


class Probe:
    """What one context does at some points of a model: the base of records and patches."""

    is_patch: ClassVar[bool]

    def __init__(self, model: GPT, points: Iterable[Point]) -> None:
        parts = (model, model.transformer, *model.transformer.h)
        if any(module._compiled_call_impl for module in parts):
            raise InputError("the model is compiled, which ignores new hooks: take it uncompiled")
        self.model = model
        self.runs = 0  # forward passes
        self.is_open = True  # until its context ends
        self.at: dict[Site, list[Point]] = {}
        for point in points:
            self.at.setdefault(point.site, []).append(point)

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
    """

    def __init__(self, model: GPT, probes: Sequence[Probe], given: dict[str, Any]) -> None:
        cache: KVCache | None = given.get("cache")
        start = 0 if cache is None else cache.start
        self.model, self.ids, self.logits_at = model, given["ids"].clone(), given.get("logits_at")
        self.start = start.clone() if isinstance(start, Tensor) else start  # the cache's grows
        self.limits = None if cache is None else cache.limits
        self.labels = None if cache is None else cache.labels
        self.memory = None if cache is None else cache.kv
        self.token: Token[Pass | None] | None = None
        self._patches = [probe for probe in probes if probe.is_patch]
        self._records = [probe for probe in probes if not probe.is_patch]
        self._missing = {site for probe in probes for site in probe.at}
        for probe in probes:
            probe.runs += 1

    @property
    def positions(self) -> Tensor:
        """Of the tokens: (1 or B, T)."""
        return positions_from(self.start, self.ids.shape[1], self.ids.device)

    def wants(self, site: Site) -> bool:
        """Whether a probe has a point there."""
        return self.changes(site) or any(site in probe.at for probe in self._records)

    def changes(self, site: Site) -> bool:
        """Whether a patch has a point there."""
        return any(site in probe.at for probe in self._patches)

    def visit(self, site: Site, x: Tensor) -> Tensor:
        """Show x to the probes; what the model goes on with, x itself if nobody patches it."""
        self._missing.discard(site)
        for probe in self._patches:
            for point in probe.at.get(site, ()):
                x = probe.visit(point, x, self)
        for probe in self._records:
            for point in probe.at.get(site, ()):
                probe.visit(point, x, self)
        return x

    def require_all_visited(self) -> None:
        """InputError if a point was not reached: values would be silently missing or unpatched."""
        if self._missing:
            names = ", ".join(sorted(f"the {kind} of {name}" for name, kind in self._missing))
            raise InputError(
                f"the forward pass did not reach {names}: change modules, backend or attention "
                "before recording or patching, not inside the context"
            )


ACTIVE: ContextVar[tuple[Probe, ...]] = ContextVar("active", default=())
PASS: ContextVar[Pass | None] = ContextVar("pass", default=None)

_HOOKS: dict[GPT, Hooks] = {}  # of the models that are watched now
_LOCK = threading.Lock()


@contextmanager
def watching(probe: Probe) -> Iterator[None]:
    """Let a probe take part in the model's forward passes in this thread."""
    model = probe.model
    with _LOCK:
        hooks = _HOOKS.get(model) or Hooks(model)
        _HOOKS[model] = hooks
        hooks.add(probe)
    ACTIVE.set((*ACTIVE.get(), probe))
    try:
        yield
    finally:
        probe.is_open = False
        ACTIVE.set(tuple(other for other in ACTIVE.get() if other is not probe))
        with _LOCK:
            hooks.remove(probe)
            if not hooks.is_used:
                del _HOOKS[model]


class Hooks:
    """The hooks on one model; those of a site are there while a probe needs them."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self._probes = 0
        self._uses: dict[Site, int] = {}
        self._undo: dict[Site, Callable[[], object]] = {}
        self._ends = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._end, always_call=True),
        ]

    @property
    def is_used(self) -> bool:
        """Whether a probe is left; without one, all hooks are gone."""
        return self._probes > 0

    def add(self, probe: Probe) -> None:
        """Install what a probe needs and is not there yet."""
        for hook in map(_hook_of, probe.at):
            if hook not in self._uses:
                self._uses[hook] = 0
                self._undo[hook] = self._install(hook)
            self._uses[hook] += 1
        self._probes += 1

    def remove(self, probe: Probe) -> None:
        """Remove what only this probe needed."""
        for hook in map(_hook_of, probe.at):
            self._uses[hook] -= 1
            if not self._uses[hook]:
                del self._uses[hook]
                self._undo.pop(hook)()
        self._probes -= 1
        if not self._probes:
            for handle in self._ends:
                handle.remove()

    def _install(self, hook: Site) -> Callable[[], object]:
        """Put the hook in place; returns what removes it."""
        module = module_at(self.model, hook.module)
        if hook.kind == "attend":
            return self._wrap_attend(hook.module, cast(MultiQueryAttention, module))
        # What `register_forward_hook` does, without its handle, whose making takes longer than
        # all the rest.
        is_input = hook.kind == "input"
        hooks = module._forward_pre_hooks if is_input else module._forward_hooks
        key = id(self)
        hooks[key] = partial(self._input if is_input else self._output, hook)
        return partial(hooks.pop, key)

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        probes = self._own_probes()
        given = dict(zip(("ids", "cache", "logits_at"), args, strict=False)) | kwargs
        ids = given.get("ids")
        if not probes or not isinstance(ids, Tensor) or ids.ndim != 2:
            return None
        run = Pass(self.model, probes, given)
        run.token = PASS.set(run)
        if given.get("logits_at") is None or not run.wants(Site("lm_head", "output")):
            run.logits_at = None
            return None
        del given["logits_at"]  # logits are asked for at all positions; `_end` selects
        return (), given

    def _end(self, module: nn.Module, args: Any, output: Any) -> Any:
        run = PASS.get()
        if run is None or run.model is not self.model or run.token is None:
            return None
        PASS.reset(run.token)
        if output is None:  # the pass has raised
            return None
        run.require_all_visited()
        if run.logits_at is None:
            return None
        rows = torch.arange(len(run.logits_at), device=output.device)
        return output[rows, run.logits_at]  # (B, V) or (0, V)

    def _own_probes(self) -> list[Probe]:
        """Of this thread, on this model."""
        return [probe for probe in ACTIVE.get() if probe.model is self.model and probe.is_open]

    def _pass(self) -> Pass | None:
        """The pass that is under way in this thread; None if nobody here watches the model."""
        run = PASS.get()
        if run is not None and run.model is self.model:
            return run
        if self._own_probes():
            raise InputError(
                "a part of the model is called by itself, so the tokens' positions are not known: "
                "call the model, or do so outside of record and patch"
            )
        return None

    def _input(self, site: Site, module: nn.Module, args: Any) -> Any:
        run = self._pass()
        if run is None:
            return None
        x = run.visit(site, args[0])
        return None if x is args[0] else (x, *args[1:])

    def _output(self, site: Site, module: nn.Module, args: Any, output: Any) -> Any:
        run = self._pass()
        if run is None:
            return None
        if not isinstance(output, Tensor):
            raise InputError(f"{site.module} gives {shown(output)}: only tensors can be recorded")
        x = output
        if site.module.endswith("c_proj") and run.wants(heads := Site(site.module, "result")):
            attn = module_at(self.model, site.module.removesuffix(".c_proj"))
            before = head_results(module, args[0], cast(int, attn.n_head))  # (B, T, H, C)
            after = run.visit(heads, before)
            # An edit changes the sum by as much as it changes the parts.
            x = x if after is before else x + (after - before).sum(2)
        x = run.visit(site, x)
        return None if x is output else x

    def _wrap_attend(self, name: str, attn: MultiQueryAttention) -> Callable[[], None]:
        plain = attn.attend
        sites = [Site(name, kind) for kind in INSIDE_ATTENTION]

        def attend(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            start: int | Tensor,
            scale: float,
            dropout_p: float = 0.0,
        ) -> Tensor:
            run = self._pass()
            if run is None or not any(map(run.wants, sites)):
                return plain(q, k, v, start, scale, dropout_p)
            has_grad = torch.is_grad_enabled() and q.requires_grad
            keys, values, scored, weighed = sites
            if run.wants(keys) or run.wants(values):
                heads = q.shape[2]
                seen = [
                    run.visit(keys, _each_head(k, heads)),
                    run.visit(values, _each_head(v, heads)),
                ]
                if has_grad or run.changes(keys) or run.changes(values):
                    k, v = seen  # (B, S, H, D) each
            if run.wants(scored) or run.wants(weighed):
                scores = attention_scores(q, k, start, scale)  # (B, H, T, S)
                scores = run.visit(scored, scores)
                probabilities = run.visit(weighed, attention_probabilities(scores))
                if has_grad or run.changes(scored) or run.changes(weighed):
                    return weighted_values(F.dropout(probabilities, dropout_p), v)
            return plain(q, k, v, start, scale, dropout_p)

        attn.attend = attend

        def undo() -> None:
            if attn.attend is attend:  # else the backend was changed, which passes report
                attn.attend = plain

        return undo


def _hook_of(site: Site) -> Site:
    """Where PyTorch or the attention function is hooked to see a site."""
    kind = "attend" if site.kind in INSIDE_ATTENTION else site.kind
    kind = "output" if kind == "result" else kind
    return site if kind == site.kind else Site(site.module, kind)


def module_at(model: nn.Module, name: str) -> nn.Module:
    """`model.get_submodule(name)`, several times faster."""
    for part in name.split("."):
        model = cast(nn.Module, model._modules[part])
    return model


def _each_head(x: Tensor, heads: int) -> Tensor:
    """K or V (B, S, G, D) as each query head reads it: (B, S, H, D), without a copy if G = 1."""
    B, S, G, D = x.shape
    return x[:, :, :, None].expand(B, S, G, heads // G, D).flatten(2, 3)


def head_results(c_proj: nn.Module, z: Tensor, heads: int) -> Tensor:
    """What each head adds to the residual stream: z (B, T, C), side by side -> (B, T, H, C).

    Raises:
        InputError: the weights of `c_proj` are packed.
    """
    try:
        weight = cast(Tensor, c_proj.weight)  # (C, C)
    except AttributeError as error:
        raise InputError(f"attn.result needs the weights of c_proj: {error}") from error
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
