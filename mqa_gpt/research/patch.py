"""patch: change tensors of a model's forward passes, by name.

    with patch(model, {"transformer.h.3.attn.z": zero(heads=2)}):
        logits = model(ids)

Edits apply at layers (by the name's wildcards), heads, positions, tokens and rows, in any forward
pass inside the context: one pass, a cache that is filled step by step, `generate`. What is cached
while patched stays as it was patched. Positions are absolute, also with a cache. The names are
those of `mqa_gpt.research.points`; `attn.k_read` and `attn.v_read` are the shared keys and values
as each query head reads them, so that an edit there changes them for one reading head only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import replace as with_fields
from typing import Any

import torch
from torch import Tensor

from mqa_gpt.errors import InputError, is_int, shown
from mqa_gpt.model import GPT
from mqa_gpt.research.points import Point, Selection, select
from mqa_gpt.research.wraps import Pass, Probe, attention_of, part_of, watching, with_part

Indices = int | Sequence[int] | slice
Values = Tensor | float


@dataclass(frozen=True, eq=False)
class Edit:
    """One change: what becomes of a tensor, and where in it; made by the functions below.

    Attributes:
        kind: "zero", "add", "replace", "mean" or "edit".
        values: what is added or put there, or the function.
        rows: of the batch, or the rows' numbers in `generate`; None for all, as in the others.
        positions: absolute, from 0.
        heads: query heads, at `attn.k` and `attn.v` K/V heads.
        tokens: ids: only where one of these is fed.
    """

    kind: str
    values: Any = None
    rows: Indices | None = None
    positions: Indices | None = None
    heads: Indices | None = None
    tokens: Indices | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "positions", "heads", "tokens"):
            value = getattr(self, name)
            if value is None or isinstance(value, slice):
                bounds = [] if value is None else [value.start, value.stop, value.step]
                numbers = [x for x in bounds if x is not None]
            else:
                numbers = _as_list(value)
            if not all(is_int(x) and x >= 0 for x in numbers):
                raise InputError(
                    f"{name} is {shown(value)}: expected an integer of at least 0, several, or a "
                    "slice of such"
                )


def zero(**where: Any) -> Edit:
    """Set to zero; `where` are the fields rows, positions, heads and tokens of `Edit`."""
    return Edit("zero", **where)


def add(vector: Values, **where: Any) -> Edit:
    """Add a vector, such as a steering vector: shapes as in `replace`."""
    return Edit("add", vector, **where)


def replace(values: Values, **where: Any) -> Edit:
    """Replace by values of another run.

    Args:
        values: as recorded at this point, (B or 1, T, ...) or (T, ...), from position 0 on; or
            without the positions, such as (C,) or (H, D), the same at all of them; or a number.
            Under a name with a wildcard also stacked, (L, B, T, ...), as it was recorded.
        where: see `zero`.
    """
    return Edit("replace", values, **where)


def mean(values: Tensor | Sequence[Tensor], **where: Any) -> Edit:
    """Replace by the mean over all rows and positions of what was recorded at this point.

    Args:
        values: (B, T, ...), stacked (L, B, T, ...), or a list of rows (T, ...).
        where: see `zero`.
    """
    return Edit("mean", values, **where)


def edit(function: Callable[[Tensor], Tensor], **where: Any) -> Edit:
    """Replace by a function of the tensor, of the same shape; it gets a copy of its own."""
    return Edit("edit", function, **where)


@contextmanager
def patch(model: GPT, edits: Mapping[str, Any]) -> Iterator[None]:
    """Change tensors of the model's forward passes inside the context, in this thread.

    Args:
        model: any; `LLM.model` of a loaded checkpoint.
        edits: by the points' names; an `Edit`, a function as for `edit`, a tensor as for `replace`,
            or a list of these, applied in order.

    Raises:
        InputError: an unknown name, an edit that does not fit the point; inside the context, a pass
            that does not reach a point; at its end, a patch without a pass, or an edit whose rows
            or positions never came.
    """
    if not isinstance(edits, Mapping):
        raise InputError(f"edits are {shown(edits)}: expected a dictionary from names to edits")
    patcher = _Patcher(model, edits)
    with watching(patcher):
        yield
    patcher.require_used()


class _Patcher(Probe):
    """Applies its edits, point by point."""

    is_patch = True

    def __init__(self, model: GPT, edits: Mapping[str, Any]) -> None:
        self.edits: dict[Point, list[Edit]] = {}
        self.names: dict[Edit, str] = {}
        used: dict[str, Sequence[Point]] = {}  # names with edits
        for name, points in select(model, list(edits)).asked.items():
            for one in _as_edits(name, edits[name]):
                used[name] = points
                for i, point in enumerate(points):
                    own = _of_layer(one, point, i, len(points))
                    self.names[own] = name
                    self.edits.setdefault(point, []).append(own)
        super().__init__(model, Selection(used))
        # Whether the rows and positions of an edit have come; on the device, not to wait for it.
        self._used: dict[Edit, Tensor | bool] = {}

    def visit(self, point: Point, x: Tensor, run: Pass) -> Tensor:
        """Apply the point's edits to x; see `Probe`."""
        attn = None
        if point.part not in ("", "shared"):
            attn = attention_of(self.model, point.layer or 0)
        before = part_of(point.part, x, attn)
        after = before
        for one in self.edits[point]:
            after = self._apply(one, point, after, run)
        return with_part(point.part, x, after, attn)

    def _apply(self, one: Edit, point: Point, x: Tensor, run: Pass) -> Tensor:
        place, where = _place(one, point, x, run)  # None: everywhere
        used = self._used.get(one, False)
        self._used[one] = True if place is None else used | place.any()
        new = _changed(one, point, x, run, place)
        return new if where is None else torch.where(where, new, x)

    def require_used(self) -> None:
        """InputError if nothing ran, or an edit's rows and positions were never fed."""
        if not self.runs:
            raise InputError(
                "nothing was patched: the model has not run inside the context, in its thread"
            )
        for one, used in self._used.items():
            if not used:
                raise InputError(
                    f"the edit of {self.names[one]} was never applied: its rows or positions "
                    f"({shown(one.rows)}, {shown(one.positions)}) were not fed inside the context"
                )


def _as_edits(name: str, value: Any) -> list[Edit]:
    """What stands for edits in a dictionary."""
    if isinstance(value, list | tuple):
        return [one for item in value for one in _as_edits(name, item)]
    if isinstance(value, Edit):
        return [value]
    if isinstance(value, Tensor):
        return [replace(value)]
    if callable(value):
        return [edit(value)]
    raise InputError(
        f"the edit of {name} is {shown(value)}: expected zero(), add(), replace(), mean(), a "
        "function or a tensor"
    )


def _of_layer(one: Edit, point: Point, i: int, count: int) -> Edit:
    """The edit of the i-th of the points that one name stands for."""
    values = one.values
    if not isinstance(values, Tensor) or values.ndim != len(point.axes) + 1:
        return with_fields(one)
    if len(values) != count:
        raise InputError(
            f"the values for {point.name} are of {len(values)} layers, but the name stands for "
            f"{count}"
        )
    return with_fields(one, values=values[i])


def _changed(one: Edit, point: Point, x: Tensor, run: Pass, place: Tensor | None) -> Tensor:
    """What the edit makes of all of x."""
    if one.kind == "zero":
        return torch.zeros_like(x)
    if one.kind == "edit":
        new = one.values(x.clone())
        if not isinstance(new, Tensor) or (new.shape, new.dtype) != (x.shape, x.dtype):
            raise InputError(
                f"the function for {point.name} gives {_described(new)}: expected {_described(x)}"
            )
        return new
    values = _mean(one.values, point) if one.kind == "mean" else one.values
    fitted = _fitted(values, point, x, run, place)
    return x + fitted if one.kind == "add" else fitted.expand_as(x)


def _mean(values: Any, point: Point) -> Tensor:
    """The mean over rows and positions, without these axes."""
    if not isinstance(values, Tensor):
        rows = list(values) if isinstance(values, Sequence) else []
        if not rows or not all(isinstance(row, Tensor) for row in rows):
            raise InputError(f"mean of {shown(values)}: expected what was recorded at the point")
        values = torch.cat(rows, dim=point.position_axis - 1)[None]
    if values.ndim != len(point.axes) or "T" not in point.axes or "S" in point.axes:
        raise InputError(
            f"mean of {_described(values)} at {point.name}: expected what was recorded there, "
            f"{_axes(point)}, without an axis of keys"
        )
    return values.mean((0, point.position_axis))


def _fitted(values: Any, point: Point, x: Tensor, run: Pass, place: Tensor | None) -> Tensor:
    """Values that broadcast to x, those with an axis of positions at the positions of x."""
    tensor = torch.as_tensor(values).to(x)
    axis, dims = point.position_axis, x.ndim
    if tensor.ndim == 0:
        return tensor
    if tensor.ndim == dims - 2 and not ("T" in point.axes and "S" in point.axes):
        tensor = tensor.unsqueeze(axis - 1)[None]  # the same at every position, and in every row
    else:
        tensor = tensor[None] if tensor.ndim == dims - 1 else tensor
        if tensor.ndim == dims:
            tensor = _at_positions(tensor, point, x, run, place)
    if "T" in point.axes and point.axes.endswith("S") and tensor.shape[-1] > x.shape[-1]:
        tensor = tensor[..., : x.shape[-1]]  # of keys that come later
    if tensor.ndim != x.ndim or not all(
        own == whole or (own == 1 and i in (0, axis))
        for i, (own, whole) in enumerate(zip(tensor.shape, x.shape, strict=True))
    ):
        raise InputError(
            f"the values for {point.name} are {_described(torch.as_tensor(values))}: they do not "
            f"fit {_described(x)}, {_axes(point)}"
        )
    return tensor


def _at_positions(
    values: Tensor, point: Point, x: Tensor, run: Pass, place: Tensor | None
) -> Tensor:
    """values (B or 1, ..., P, ...), from position 0 on -> at the positions of x."""
    axis = point.position_axis
    held = values.shape[axis]
    positions = _positions(point, x, run)  # (1 or B, T)
    beyond = (positions >= held) if place is None else (positions >= held) & place
    if beyond.any():
        raise InputError(
            f"the values for {point.name} end at position {held - 1}, and later ones are fed: say "
            f"positions=slice({held})"
        )
    at = positions.clamp(max=held - 1)
    if len(at) == 1:
        return values.index_select(axis, at[0])
    values = values.expand(len(at), *values.shape[1:])
    return torch.stack([v.index_select(axis - 1, p) for v, p in zip(values, at, strict=True)])


def _place(one: Edit, point: Point, x: Tensor, run: Pass) -> tuple[Tensor | None, Tensor | None]:
    """Which rows and positions an edit is about, (1 or B, 1 or T) bool, and which elements of x,
    which also depends on tokens and heads; None for all."""
    place = where = None
    if one.positions is not None:
        place = _is_in(_positions(point, x, run), one.positions)
    if one.rows is not None:
        rows = _is_in(_row_numbers(run).to(x.device), one.rows)[:, None]
        place = rows if place is None else place & rows
    selected = place
    if one.tokens is not None:
        if "T" not in point.axes:
            raise InputError(f"tokens are not known at {point.name}: give positions")
        are_fed = _is_in(run.ids, one.tokens)
        selected = are_fed if selected is None else selected & are_fed
    if selected is not None:
        shape = [1] * x.ndim
        shape[0], shape[point.position_axis] = selected.shape
        where = selected.view(shape)
    if one.heads is not None:
        axis = point.head_axis
        if axis is None:
            raise InputError(f"{point.name} has no heads: it is {_axes(point)}")
        heads = torch.arange(x.shape[axis], device=x.device)
        chosen = _is_in(heads, one.heads)
        numbers = [] if isinstance(one.heads, slice) else _as_list(one.heads)
        if any(number >= len(heads) for number in numbers) or not chosen.any():
            raise InputError(f"heads is {shown(one.heads)}: {point.name} has {len(heads)}")
        shape = [1] * x.ndim
        shape[axis] = len(heads)
        chosen = chosen.view(shape)
        where = chosen if where is None else where & chosen
    return place, where


def _positions(point: Point, x: Tensor, run: Pass) -> Tensor:
    """Absolute positions along the point's axis of them: (1 or B, T) or, of all keys, (1, S)."""
    if "T" in point.axes:
        return run.positions
    return torch.arange(x.shape[point.position_axis], device=x.device)[None]


def _row_numbers(run: Pass) -> Tensor:
    """Of the rows of a pass, (B,): their numbers in the engine, if it runs them."""
    if run.labels is None:
        return torch.arange(len(run.ids))
    numbers = []
    for label in run.labels:
        if isinstance(label, int) or (label is not None and label.request.n > 1):
            raise InputError(
                "rows cannot be told apart here: samples of one prompt share its prefill, and a "
                "draft model's rows move; give each prompt by itself"
            )
        numbers.append(-1 if label is None else label.number)
    return torch.tensor(numbers)


def _is_in(numbers: Tensor, indices: Indices) -> Tensor:
    """Which of the numbers are among the indices."""
    if isinstance(indices, slice):
        begin, step = indices.start or 0, indices.step or 1
        chosen = (numbers >= begin) & ((numbers - begin) % step == 0)
        return chosen if indices.stop is None else chosen & (numbers < indices.stop)
    return torch.isin(numbers, torch.tensor(_as_list(indices), device=numbers.device))


def _as_list(indices: Any) -> list[Any]:
    if is_int(indices):
        return [int(indices)]
    if isinstance(indices, Tensor):
        return list(indices.flatten().tolist())
    is_list = isinstance(indices, Sequence) and not isinstance(indices, str | bytes)
    return list(indices) if is_list else [indices]


def _axes(point: Point) -> str:
    return f"({', '.join(point.axes)})"


def _described(x: Any) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else shown(x)
