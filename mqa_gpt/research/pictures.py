"""Pictures of the analyses, with matplotlib, which is imported when the first one is drawn.

Shares run from dark to light (viridis), signed values from red to blue (RdBu); both can be told
apart with any colour vision, and cells hold their numbers where there is room.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mqa_gpt.errors import InputError
from mqa_gpt.generation.score import Score
from mqa_gpt.research.heads import Sharing
from mqa_gpt.research.lens import Attribution, Lens
from mqa_gpt.research.patching import Patching

DPI = 150
MOST_CELLS = 400  # with a number in each
LINE_WIDTH = 100  # characters of a listing


def save(figure: Any, path: str | Path) -> None:
    """Write a picture in the format of its file name.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        figure.savefig(path, dpi=DPI)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write the picture {path}: {error}") from error


def lens_picture(lens: Lens, tokens: Sequence[str]) -> Any:
    """Each layer's likeliest token at each position, coloured by how sure it is of the end result.

    Args:
        tokens: texts of the T tokens that were read, then of all `lens.top_ids`, row by row.
    """
    L, T = lens.top_ids.shape
    read, predicted = tokens[:T], tokens[T:]
    figure = _figure(1.6 + 0.95 * T, 1.4 + 0.34 * L)
    axes = figure.subplots()
    image = axes.imshow(lens.probability, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    for y in range(L):
        for x in range(T):
            text = _cut(predicted[y * T + x], 10)
            color = "black" if lens.probability[y, x] > 0.6 else "white"
            axes.text(x, y, text, ha="center", va="center", color=color, size=8, family="monospace")
    axes.set_yticks(range(L), ["embedding", *(f"layer {i}" for i in range(L - 1))])
    axes.set_xticks(range(T), [_cut(token, 10) for token in read], family="monospace", size=8)
    axes.invert_yaxis()
    axes.set_xlabel("token that was read")
    axes.set_title("Likeliest next token by the residual stream after each layer")
    figure.colorbar(image, label="probability of the model's own choice")
    return figure


def attribution_picture(found: Attribution, title: str) -> Any:
    """What heads, MLPs and the rest add to a logit."""
    L = len(found.mlps)
    figure = _figure(9, 1.8 + 0.34 * L)
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    image = _cells(left, found.heads, signed=True, digits=2)
    left.set(xlabel="head", ylabel="layer", title="attention heads")
    left.invert_yaxis()
    figure.colorbar(image, ax=left, label="logits")
    parts = [found.embedding, *found.mlps.tolist()]
    rest = found.biases.sum().item() + found.constant
    names = ["embedding", *(f"MLP {i}" for i in range(L)), "biases"]
    values = [*parts, rest]
    colors = ["#2166ac" if value >= 0 else "#b2182b" for value in values]
    right.barh(names, values, color=colors)
    right.axvline(0, color="black", linewidth=0.8)
    right.set(xlabel="logits", title="everything else")
    right.set_yticks(range(len(names)), names, size=8)
    figure.suptitle(f"{title} = {found.total:.2f}")
    return figure


def heads_picture(scores: Mapping[str, Tensor], title: str) -> Any:
    """Shares of attention (L, H) by head, a panel each."""
    L, H = next(iter(scores.values())).shape
    columns = min(len(scores), 4)
    rows = -(-len(scores) // columns)
    figure = _figure(columns * (0.9 + 0.5 * H) + 1, rows * (1.0 + 0.32 * L) + 0.6)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels[len(scores) :]:
        panel.set_axis_off()
    for panel, (name, values) in zip(panels, scores.items(), strict=False):
        image = _cells(panel, values, signed=False, digits=2)
        panel.set(title=name, xlabel="head", ylabel="layer")
        panel.invert_yaxis()
    figure.colorbar(image, ax=panels.tolist(), label="share of attention")
    figure.suptitle(title)
    return figure


def patching_picture(found: Mapping[str, Patching], tokens: Sequence[str], title: str) -> Any:
    """What each layer and position restores, a panel for each way of finding out."""
    L, T = next(iter(found.values())).restored.shape
    figure = _figure(1.5 + 0.62 * T * len(found), 1.8 + 0.36 * L)
    panels = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    for panel, (name, one) in zip(panels, found.items(), strict=True):
        image = _cells(panel, one.restored, signed=True, digits=1, limit=1.0)
        panel.set(title=name, xlabel="position")
        panel.set_xticks(
            range(T), [_cut(t, 10) for t in tokens], rotation=60, ha="right", family="monospace"
        )
    panels[0].set_ylabel("layer")
    panels[0].invert_yaxis()
    figure.colorbar(image, ax=panels.tolist(), label="share of the answer restored")
    figure.suptitle(title)
    return figure


def loss_picture(score: Score, tokens: Sequence[str], title: str) -> Any:
    """A text as a listing, each token on a ground coloured by its loss in bits."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    places, lines = _layout(tokens)
    # In inches: a listing of any length with a scale of one size above it.
    width, listing, head = 0.085 * LINE_WIDTH + 0.3, 0.17 * lines, 0.85
    figure = _figure(width, listing + head, arranges=False)
    axes = figure.add_axes((0.015, 0.1 / (listing + head), 0.97, listing / (listing + head)))
    scale_axes = figure.add_axes((0.66, 1 - 0.32 / (listing + head), 0.3, 0.13 / (listing + head)))
    scale, colors = Normalize(0, 12), colormaps["cividis"]
    for i, line, column, text in places:
        bits = -(score.logprobs[i] or 0.0) / 0.6931471805599453
        color = colors(scale(bits))
        axes.add_patch(_rectangle(column, line, len(text), color))
        ink = "white" if scale(bits) < 0.5 else "black"
        for k, letter in enumerate(text):  # one by one, so that columns stay columns
            axes.text(
                column + k + 0.5, line + 0.5, letter, color=ink, size=7, family="monospace",
                ha="center", va="center",
            )  # fmt: skip
    axes.set(xlim=(0, LINE_WIDTH), ylim=(lines, 0))
    axes.set_axis_off()
    figure.colorbar(
        ScalarMappable(scale, colors), cax=scale_axes, orientation="horizontal",
        label="bits per token", extend="max",
    )  # fmt: skip
    figure.text(0.015, 1 - 0.32 / (listing + head), title, size=11)
    return figure


def sharing_picture(found: Sharing, most: int, title: str) -> Any:
    """How alike the heads of each layer are, and how much of the head dim K and V use."""
    L = len(found.overlap)
    columns = min(L, 6)
    rows = -(-L // columns)
    figure = _figure(1.6 * columns + 1.5, 1.8 * rows + 3.2)
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.8 * rows + 0.4, 2.8])
    panels = top.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels[L:]:
        panel.set_axis_off()
    for i, panel in enumerate(panels[:L]):
        image = _cells(panel, found.overlap[i], signed=False, digits=1)
        panel.set_title(f"layer {i}", size=9)
        panel.tick_params(labelsize=7)
    top.colorbar(image, ax=panels.tolist(), label="attention in common")
    axes = bottom.subplots()
    layers = torch.arange(L)
    for shift, ranks, name, color in (
        (-0.2, found.all_key_rank, "keys", "#0072b2"),
        (0.2, found.all_value_rank, "values", "#e69f00"),
    ):
        axes.bar(layers + shift, ranks, width=0.38, label=name, color=color)
    axes.axhline(most, color="black", linestyle="--", linewidth=1, label="at most")
    axes.set(xlabel="layer", ylabel="effective rank", xticks=range(L), ylim=(0, None))
    axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.22), frameon=False)
    figure.suptitle(title)
    return figure


def _figure(width: float, height: float, *, arranges: bool = True) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "a picture needs matplotlib: pip install matplotlib, or leave out --picture"
        ) from error
    return Figure(figsize=(width, height), layout="constrained" if arranges else None)


def _cells(
    axes: Any, values: Tensor, *, signed: bool, digits: int, limit: float | None = None
) -> Any:
    """A heat map, with numbers where there is room; returns what a colour bar needs."""
    values = values.detach().float().cpu()
    if signed:
        limit = limit or max(values.abs().max().item(), 1e-9)
        image = axes.imshow(values, aspect="auto", cmap="RdBu", vmin=-limit, vmax=limit)
    else:
        image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    if values.numel() <= MOST_CELLS:
        for y, row in enumerate(values.tolist()):
            for x, value in enumerate(row):
                is_light = abs(value) < 0.6 * (limit or 1) if signed else value > 0.6
                text = f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no minus before zero
                axes.text(
                    x, y, text, ha="center", va="center", size=7,
                    color="black" if is_light else "white",
                )  # fmt: skip
    axes.set_xticks(range(values.shape[1]))
    axes.set_yticks(range(values.shape[0]))
    return image


def _rectangle(column: int, line: int, width: int, color: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column, line), width, 1, facecolor=color, linewidth=0)


def _layout(tokens: Sequence[str]) -> tuple[list[tuple[int, int, int, str]], int]:
    """Where the pieces of tokens go: (token, line, column, text), and the number of lines."""
    places, line, column = [], 0, 0
    for i, token in enumerate(tokens):
        for letter in token.replace("\t", "    "):
            if letter == "\n" or column == LINE_WIDTH:
                line, column = line + 1, 0
            if letter != "\n":
                places.append((i, line, column, letter))
                column += 1
            else:
                places.append((i, line - 1, min(LINE_WIDTH - 1, _end(places, line - 1)), "⏎"))
    return places, line + 1


def _end(places: Sequence[tuple[int, int, int, str]], line: int) -> int:
    """The first free column of a line."""
    return places[-1][2] + 1 if places and places[-1][1] == line else 0


def _cut(token: str, length: int) -> str:
    """A token for a label: white space made visible, and not too long."""
    text = token.replace("\n", "⏎").replace("\t", "→").replace(" ", "·")
    return text if len(text) <= length else text[: length - 1] + "…"
