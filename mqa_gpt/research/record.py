"""record: the tensors of a model's forward passes, by name.

    with record(model, ["transformer.h.*.attn.probs", "transformer.h.3"]) as acts:
        logits = model(ids)
    acts["transformer.h.*.attn.probs"]  # (L, B, H, T, S)
    acts["transformer.h.3"]             # (B, T, C)

The names are those of `mqa_gpt.research.points`. Recording does not change what the model computes,
bit for bit, but for the rounding in two cases: where logits are asked for, a prefill computes them
at all positions, not only at the last; and in a pass under autograd, attention is computed from the
recorded `attn.scores`, `attn.probs`, `attn.k_read` or `attn.v_read`, so that they have gradients.
It works on every backend, with a cache and while generating.
Generation then runs the model's modules, not fused kernels and compiled steps: on a CUDA device as
graphs all the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mqa_gpt.errors import InputError, shown
from mqa_gpt.model import GPT, MultiQueryAttention
from mqa_gpt.research.points import Point, Selection, matches, plain_name, select
from mqa_gpt.research.wraps import Pass, Probe, attention_of, part_of, watching


@contextmanager
def record(model: GPT, names: str | Sequence[str]) -> Iterator[Activations]:
    """Record tensors of the model's forward passes inside the context, in this thread.

    Args:
        model: any; `LLM.model` of a loaded checkpoint.
        names: of points, with wildcards or in TransformerLens' words; see
            `mqa_gpt.research.points`.

    Returns:
        What was recorded, also after the context; `Activations.grad` has the gradients, where the
        model ran with them and `backward` was called.

    Raises:
        InputError: an unknown name, or a compiled model; inside the context, a pass that does not
            reach a point.
    """
    recorder = _Recorder(model, select(model, names))
    with watching(recorder):
        yield Activations(recorder)


class _Saved(NamedTuple):
    """A tensor as the model went on with it, the form of it that was asked for, the attention whose
    heads it has, and the tensor's version, which counts the writes to it; None for a copy."""

    tensor: Tensor
    part: str
    attn: MultiQueryAttention | None
    version: int | None


class _Recorder(Probe):
    """Keeps what its points see: the tensors themselves where PyTorch counts writes to them, and
    copies of the others, those of `torch.inference_mode()`."""

    is_patch = False

    def __init__(self, model: GPT, selection: Selection) -> None:
        super().__init__(model, selection)
        self.passes: list[tuple[Pass, dict[str, _Saved]]] = []

    def visit(self, point: Point, x: Tensor, run: Pass) -> Tensor:
        """Save x; see `Probe`."""
        if not self.passes or self.passes[-1][0] is not run:
            self.passes.append((run, {}))
        saved = self.passes[-1][1]
        name, _, part, axes, layer = point
        if name in saved:
            raise InputError(f"{name} is computed more than once in a forward pass")
        attn = None
        if part not in ("", "shared"):
            attn = attention_of(self.model, layer or 0)
        is_cache = run.memory is not None and "T" not in axes  # which later passes write to
        if is_cache or x.is_inference():
            saved[name] = _Saved(part_of(part, x, attn).clone(), "", None, None)
            return x
        if x.requires_grad and torch.is_grad_enabled():
            x.retain_grad()
        saved[name] = _Saved(x, part, attn, x._version)
        return x

    def value(self, point: Point, saved: _Saved) -> Tensor:
        """What a point was."""
        if saved.version is not None and saved.tensor._version != saved.version:
            raise InputError(
                f"{point.name} was written to after it was recorded: a hook of your own, or code "
                "that uses the model's output, works in place; let it make a copy"
            )
        return part_of(saved.part, saved.tensor, saved.attn)

    def gradient(self, point: Point, saved: _Saved) -> Tensor:
        """What a function's gradient by a point is, after its `backward`."""
        gradient = saved.tensor.grad if saved.tensor.requires_grad else None
        if gradient is None:
            raise InputError(
                f"{point.name} has no gradient: run the model outside of torch.no_grad() and "
                "inference_mode(), with parameters that require gradients, and call backward() on "
                "a function of its output (attn.result has the gradient of attn, for every head)"
            )
        return part_of(saved.part, gradient, saved.attn)

    def take(self) -> tuple[Pass, dict[str, _Saved]]:
        """What was recorded of the last pass, which is forgotten; see `WatchedReplay`."""
        return self.passes.pop()

    def repeat(self, taken: tuple[Pass, dict[str, _Saved]], labels: Sequence[Any]) -> None:
        """Record a pass again, of these rows of the engine, by what its tensors hold now."""
        run, saved = taken
        self.passes.append(
            (run.again(labels), dict(zip(saved, _copies(saved.values()), strict=True)))
        )


def _copies(saved: Collection[_Saved]) -> list[_Saved]:
    """Copies of tensors, by one kernel: a step may have a hundred of them."""
    tensors = [one.tensor for one in saved]
    copies = [torch.empty_like(tensor) for tensor in tensors]
    torch._foreach_copy_(copies, tensors)
    pairs = zip(saved, copies, strict=True)
    return [one._replace(tensor=new, version=None) for one, new in pairs]


class Activations(Mapping[str, Any]):
    """What was recorded, by name; a wildcard for layers stacks them in front: (L, B, T, ...).

    One forward pass, or several that fill a cache whose rows have equal lengths, give a tensor with
    all positions. Rows of different lengths, and all rows of `generate` and of `LLM`, give a list
    with a tensor (T, ...) per row, in the order of the completions, with T counting the prompt and
    all new tokens but the last, which is never fed; padding and rejected drafts are left out. A
    row equals its solo run. If the context was entered later, rows begin at the positions `starts`.

    Iterating gives the plain names of what was recorded.

    Raises:
        InputError: on access: a name that was not recorded, a model that did not run, several runs
            in one context, positions that were computed outside of it, or a tensor that was
            overwritten.
    """

    def __init__(self, recorder: _Recorder) -> None:
        self._recorder = recorder
        self._get: Callable[[Point, _Saved], Tensor] = recorder.value

    @property
    def grad(self) -> Activations:
        """The gradients, with the same names and shapes."""
        other = copy.copy(self)
        other._get = self._recorder.gradient
        return other

    @property
    def starts(self) -> list[int]:
        """The first recorded position of each row."""
        points = self._recorder.points.values()
        return self._rows(next((p for p in points if "T" in p.axes), next(iter(points))))[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._recorder.points)

    def __len__(self) -> int:
        return len(self._recorder.points)

    def __getitem__(self, name: str) -> Any:
        plain = plain_name(name)
        found = [p for p in self._recorder.points.values() if matches(p.name, plain)]
        if not found:
            raise InputError(f"{shown(name)} was not recorded: there are {shown(list(self))}")
        if plain == found[0].name:
            return self._tensor(found[0])
        if len({(point.site.kind, _below(point)) for point in found}) > 1:
            raise InputError(f"{shown(name)} stands for different points: {shown(list(self))}")
        layers: list[Any] = [self._tensor(point) for point in found]
        if isinstance(layers[0], list):
            return [torch.stack(rows) for rows in zip(*layers, strict=True)]
        return torch.stack(layers)

    def _tensor(self, point: Point) -> Tensor | list[Tensor]:
        passes = self._passes(point)
        run, saved = passes[0]
        if len(passes) == 1 and run.labels is None and run.limits is None:
            return self._get(point, saved)
        rows, starts = self._rows(point)
        is_even = len({(*row.shape, start) for row, start in zip(rows, starts, strict=True)}) == 1
        return torch.stack(rows) if is_even and run.labels is None else rows

    def _passes(self, point: Point) -> list[tuple[Pass, _Saved]]:
        """The passes of the one run that was recorded."""
        passes = [(run, saved[point.name]) for run, saved in self._recorder.passes]
        if not passes:
            raise InputError(
                "nothing was recorded: the model has not run inside the context, in its thread"
            )
        memories = {id(run) if run.memory is None else _address(run.memory) for run, _ in passes}
        if len(memories) > 1:
            raise InputError(
                f"{len(memories)} runs were recorded in one context: record each in one of its own"
            )
        return passes

    def _rows(self, point: Point) -> tuple[list[Tensor], list[int]]:
        """Each row's tensor (T, ...), from its first recorded position on, and that position."""
        rows: dict[int, _Row] = {}
        prompts: dict[int, list[_Piece]] = {}  # by id of the request, whose samples share them
        for run, saved in self._passes(point):
            value, B = self._get(point, saved), len(run.ids)
            value = value.expand(B, *value.shape[1:])
            starts, limits = _per_row(run.start, B), _per_row(run.limits, B)
            fed = [] if run.labels is None else run.ids.tolist()
            for b in range(B):
                label = b if run.labels is None else run.labels[b]
                if label is None:  # a slot without a row
                    continue
                piece = _Piece.of(value[b], starts[b], run.ids.shape[1], limits[b])
                if isinstance(label, int):
                    if run.labels is not None:
                        raise InputError("a draft model's own passes cannot be recorded")
                    row = rows.setdefault(b, _Row())
                else:
                    row = rows.setdefault(label.number, _Row(label))
                    # The newest token is not fed yet, or only as a draft.
                    ids = label.ids[:-1] if label.count else label.ids
                    piece = piece.accepted(fed[b], ids)
                    if piece.start < len(label.request.prompt):
                        prompts.setdefault(id(label.request), []).append(piece)
                        continue
                row.pieces.append(piece)
        numbers = sorted(rows)
        if numbers != list(range(numbers[0], numbers[0] + len(rows))):
            raise InputError(f"only rows {numbers} ran: ask for more new tokens or fewer samples")
        for row in rows.values():
            if row.label is not None:
                row.pieces[:0] = prompts.get(id(row.label.request), [])
        joined = [rows[number].joined(point) for number in numbers]
        return [tensor for tensor, _ in joined], [start for _, start in joined]


class _Piece(NamedTuple):
    """Positions `start` to before `end` of a row: a tensor without the batch axis."""

    start: int
    end: int
    tensor: Tensor

    @classmethod
    def of(cls, x: Tensor, start: int, count: int, limit: int | None) -> _Piece:
        """Of a row that was fed `count` tokens from `start` on, up to its padding."""
        end = start + count
        return cls(start, end if limit is None else max(start, min(end, limit)), x)

    def accepted(self, fed: list[int], ids: list[int]) -> _Piece:
        """Up to the first token that was fed but did not become part of the row."""
        kept = ids[self.start : self.end]
        agree = takewhile(lambda pair: pair[0] == pair[1], zip(fed, kept, strict=False))
        return self._replace(end=self.start + len(list(agree)))


class _Row:
    """The pieces of a row, in the order of the passes, and the engine's own row."""

    def __init__(self, label: Any = None) -> None:
        self.label, self.pieces = label, []  # type: tuple[Any, list[_Piece]]

    def joined(self, point: Point) -> tuple[Tensor, int]:
        """The row's positions from the first on; where passes repeat one, the last counts."""
        pieces = [piece for piece in self.pieces if piece.start < piece.end]
        end = pieces[-1].end  # a row that was rewound ends earlier than it once did
        if "T" not in point.axes:  # each pass sees all positions
            pieces = [_Piece(0, end, pieces[-1].tensor)]
        start, axis = min(piece.start for piece in pieces), point.position_axis - 1
        shape = list(pieces[0].tensor.shape)
        shape[axis] = end - start
        keys = point.axes.find("S") - 1 if "T" in point.axes and "S" in point.axes else None
        if keys is not None:
            shape[keys] = end
        hidden = -torch.inf if point.site.kind == "scores" else 0  # of keys after the query
        out = pieces[0].tensor.new_full(shape, hidden)
        is_known = [False] * (end - start)
        for first, last, tensor in pieces:
            last = min(last, end)
            if keys is not None:
                tensor = tensor.narrow(keys, 0, min(tensor.shape[keys], end))
                target = out.narrow(keys, 0, tensor.shape[keys])
            else:
                target = out
            if first < last:
                source = tensor.narrow(axis, 0, last - first)
                target.narrow(axis, first - start, last - first).copy_(source)
                is_known[first - start : last - start] = [True] * (last - first)
        if not all(is_known):
            gap = start + is_known.index(False)
            raise InputError(
                f"position {gap} of a row was computed outside of the context, and later ones "
                "inside: stay in it"
            )
        return out, start


def _below(point: Point) -> str:
    """The name without its layer."""
    return point.name.replace(f".h.{point.layer}", ".h.*")


def _address(memory: Tensor) -> int:
    return memory.untyped_storage().data_ptr()


def _per_row(numbers: int | Tensor | None, rows: int) -> list[Any]:
    if isinstance(numbers, Tensor):
        return list(numbers.tolist())
    return [numbers] * rows
