"""Infilling for training: where holes are cut, and how a piece of text is rearranged around one.

A hole is cut at character level, before tokenizing, because that is how a user's cursor cuts a
file: often inside what would have been one token. Prefix, middle and suffix are then tokenized each
by itself and ordered as in `mqa_gpt.fim`. There are three kinds of holes:

    characters  both ends anywhere (Bavarian et al. 2022; StarCoder, Li et al. 2023)
    lines       one to three whole lines, or from a word of the first to the end of the last
    nodes       one node of Python's syntax tree (as in Gong et al. 2025, structure-aware infilling)

The white space before a hole of lines or of a node belongs to it: one token holds a line break and
the indentation after it. Such a hole ends where a line or a node does, which the suffix shows, so
that a model can learn where to stop.
"""

from __future__ import annotations

import ast
import random
import re
import warnings
from dataclasses import dataclass

from mqa_gpt.errors import ConfigError, require_int, require_number
from mqa_gpt.fim import MODES, infill_prompt
from mqa_gpt.tokenizer import Tokenizer

Hole = tuple[int, int]  # first character, and the one after the last

HOLE_LINES = (1, 1, 1, 2, 3)  # a hole of whole lines has one of these lengths
KINDS = ("characters", "lines", "nodes")

LINE = re.compile(r"\s*\S(?:.*\S)?")  # with the white space before it, without that after it
VISIBLE = re.compile(r"\S")
WORD = re.compile(r"(?<=\S)(?= \S)|(?<=[(\[{.])(?=\S)")  # where a word begins, its space included
# The parser warns of unknown escapes in strings, which are no concern here.
FILE = "<infilling>"
warnings.filterwarnings("ignore", module=FILE)

# What continues the statement before it at the same indentation.
CONTINUES = re.compile(r"(?:else|elif|except|finally)\b|[)\]}]")


@dataclass(frozen=True)
class InfillingConfig:
    """The table `[data.infilling]`. The defaults are StarCoder's.

    Attributes:
        rate: share of documents that are rearranged for infilling, drawn again in each epoch.
        late_rate, late_epoch: the share from an epoch on, counted from 0; None keeps `rate`.
        spm_rate: share of rearranged pieces in SPM order; the others are in PSM order.
        characters, lines, nodes: shares of the kinds of holes; only their ratios matter.
        piece_tokens: two numbers between which the length of each piece is drawn log-uniformly. By
            default pieces are as long as their windows have room for.
        end_in_context: whether `<|endoftext|>` is a choice for the tokens of prefix and suffix. It
            never comes there, and a filling never asks. In SPM order no mark separates the prefix
            from its middle, so a model that learns not to end in a long prefix seldom ends after a
            short middle either. False takes the choice out of the loss there.
    """

    rate: float = 0.5
    late_rate: float | None = None
    late_epoch: int = 0
    spm_rate: float = 0.5
    characters: float = 1.0
    lines: float = 0.0
    nodes: float = 0.0
    piece_tokens: tuple[int, int] | None = None
    end_in_context: bool = True

    def __post_init__(self) -> None:
        for key in ("rate", "spm_rate", *KINDS):
            _require_share(key, getattr(self, key))
        if self.late_rate is not None:
            _require_share("late_rate", self.late_rate)
        require_int(ConfigError, "data.infilling.late_epoch", self.late_epoch, 0)
        if not any(self.shares):
            raise ConfigError("data.infilling: characters, lines and nodes are all 0: raise one")
        least = 1
        for i, tokens in enumerate(self.piece_tokens or ()):
            least = require_int(ConfigError, f"data.infilling.piece_tokens[{i}]", tokens, least)

    @property
    def is_used(self) -> bool:
        """Whether any document is rearranged, in whatever epoch."""
        return self.rate > 0 or (self.late_rate or 0) > 0

    @property
    def shares(self) -> tuple[float, float, float]:
        """Of the kinds of holes, in the order of `KINDS`."""
        return self.characters, self.lines, self.nodes

    def rate_in(self, epoch: int) -> float:
        """The share of documents that an epoch rearranges."""
        if self.late_rate is None or epoch < self.late_epoch:
            return self.rate
        return self.late_rate


def _require_share(name: str, value: float) -> None:
    require_number(
        ConfigError, f"data.infilling.{name}", value, "from 0 to 1", lambda x: 0 <= x <= 1
    )


def rearrange(
    text: str, tokenizer: Tokenizer, config: InfillingConfig, rng: random.Random
) -> tuple[list[int], int]:
    """A piece of text as an infilling prompt and its answer, without `<|endoftext|>`.

    Returns:
        The ids, and how many of them come before the middle.
    """
    start, end = draw_hole(text, config, rng)
    mode = MODES[rng.random() < config.spm_rate]
    prompt = infill_prompt(tokenizer, text[:start], text[end:], mode=mode)
    return prompt + tokenizer.encode(text[start:end], special_tokens=False), len(prompt)


def draw_hole(text: str, config: InfillingConfig, rng: random.Random) -> Hole:
    """A hole of a kind drawn from the config's shares.

    Where no node is found, because the text is no Python or the statement is cut off, lines are
    taken; where there are no lines, characters.
    """
    (kind,) = rng.choices(KINDS, config.shares)
    hole = None
    if kind == "nodes":
        hole = node_hole(text, rng)
    if hole is None and kind != "characters":
        hole = line_hole(text, rng)
    return character_hole(text, rng) if hole is None else hole


def character_hole(text: str, rng: random.Random) -> Hole:
    """Two positions drawn uniformly from [0, len(text)]; any part may be empty."""
    start, end = sorted(rng.randint(0, len(text)) for _ in range(2))
    return start, end


def line_hole(text: str, rng: random.Random) -> Hole | None:
    """One to three lines, from the start of the first or from a word in it; None in blank text."""
    lines = list(LINE.finditer(text))
    if not lines:
        return None
    first = rng.randrange(len(lines))
    last = min(first + rng.choice(HOLE_LINES), len(lines)) - 1
    start, end = lines[first].start(), lines[last].end()
    if rng.random() < 0.5:
        words = WORD.finditer(lines[first].group())
        start += rng.choice([0, *(word.start() for word in words)])
    return start, end


def node_hole(text: str, rng: random.Random) -> Hole | None:
    """A node of Python's syntax tree around a random character, or None if nothing parses there.

    Only the statement that begins in the character's line is parsed, with the lines that belong to
    it. So the rest of the text need not be Python that parses, and the time does not grow with it.
    The character is drawn uniformly (white space stands for what follows it) and then one of the
    nodes around it, so large and small nodes both occur.
    """
    found = VISIBLE.search(text, rng.randint(0, len(text)))
    if found is None:
        return None
    position = found.start()
    begin = text.rfind("\n", 0, position) + 1
    statement = _statement(text[begin:])
    indentation = len(statement) - len(statement.lstrip())
    header = "if 1:\n" if indentation else ""
    try:
        tree = ast.parse(header + statement, FILE)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # as `ast.parse` documents
        return None
    lines = statement.split("\n")
    starts = [begin]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    first = 2 if header else 1  # number of the statement's first line

    def offset(row: int, column: int) -> int:
        """The character of a node's end, which the tree gives as line and byte."""
        line = lines[row - first]
        width = column if line.isascii() else len(line.encode()[:column].decode(errors="ignore"))
        return starts[row - first] + width

    holes = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.stmt | ast.expr | ast.arg | ast.keyword | ast.excepthandler):
            continue
        if node.lineno < first or node.end_lineno is None or node.end_col_offset is None:
            continue
        if node.end_lineno - first >= len(lines):  # Python counts a lone "\r" as a line break
            return None
        hole = offset(node.lineno, node.col_offset), offset(node.end_lineno, node.end_col_offset)
        if hole[0] <= position < hole[1]:
            holes.add(hole)
    if not holes:  # a comment
        return None
    start, end = rng.choice(sorted(holes))
    return len(text[:start].rstrip()), end


def _statement(text: str) -> str:
    """The lines of the statement that a text begins with: those up to the next one as deep."""
    lines = text.split("\n")
    indentation = len(lines[0]) - len(lines[0].lstrip())
    for i, line in enumerate(lines[1:], 1):
        code = line.lstrip()
        is_deeper = len(line) - len(code) > indentation
        if code and not is_deeper and not lines[i - 1].lstrip().startswith("@"):
            is_part = len(line) - len(code) == indentation and CONTINUES.match(code)
            if not is_part:
                return "\n".join(lines[:i])
    return text
