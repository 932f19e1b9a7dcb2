"""The demo checkpoint's data: the sources of Python's standard library, tokenized and packed.

Every machine with Python has them. Some modules are held out, by name. Test packages, generated
tables and modules that repeat a held-out one are left out of training.
"""

from __future__ import annotations

import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from mqa_gpt.fim import MODES, fim_transform, infill_prompt
from mqa_gpt.tokenizer import Tokenizer

# Of several kinds: a long interface, text, numbers, files, protocols, a parser, async.
HELD_OUT = (
    "argparse.py",
    "asyncio/streams.py",
    "calendar.py",
    "configparser.py",
    "csv.py",
    "fractions.py",
    "graphlib.py",
    "heapq.py",
    "http/cookies.py",
    "json/decoder.py",
    "logging/handlers.py",
    "shlex.py",
    "tempfile.py",
    "textwrap.py",
)

# Not the library itself (installed packages, tests), and tables written by programs.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}
GENERATED = re.compile(r"encodings/(cp|iso|mac|koi|kz|hp|ptcp|tis|palmos).*|_sysconfigdata.*")

# StarCoder's control tokens, in its order: ids 0 to 18.
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<fim_prefix>",
    "<fim_middle>",
    "<fim_suffix>",
    "<fim_pad>",
    "<filename>",
    "<gh_stars>",
    "<issue_start>",
    "<issue_comment>",
    "<issue_closed>",
    "<jupyter_start>",
    "<jupyter_text>",
    "<jupyter_code>",
    "<jupyter_output>",
    "<empty_output>",
    "<commit_before>",
    "<commit_msg>",
    "<commit_after>",
    "<reponame>",
]

# An infilling piece has at least PIECE_CHARACTERS, and at most PIECE_CHARACTERS_PER_TOKEN for each
# token of the window, so that it usually fits.
PIECE_CHARACTERS = 200
PIECE_CHARACTERS_PER_TOKEN = 3
HOLE_LINES = (1, 1, 1, 2, 3)  # a hole of whole lines has one of these lengths
LONG_LINE = 20  # characters; shorter lines are common to all files
REPEATED_SHARE = 0.25  # a file with more of its long lines in held-out modules repeats them


@dataclass(frozen=True)
class Corpus:
    """Module texts by their path inside the standard library."""

    training: dict[str, str]
    held_out: dict[str, str]


def read_corpus(library: Path | None = None) -> Corpus:
    """Read the standard library of the running Python, or of another folder."""
    library = library or Path(sysconfig.get_paths()["stdlib"])
    texts: dict[str, str] = {}
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library).as_posix()
        if SKIPPED_FOLDERS.intersection(name.split("/")) or GENERATED.fullmatch(name):
            continue
        try:
            text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue
        if text.strip():
            texts[name] = text
    held_out = {name: texts.pop(name) for name in HELD_OUT if name in texts}
    if not held_out:
        raise SystemExit(f"{library} holds none of the held-out modules: is it a standard library?")
    held_out_lines = set().union(*map(_long_lines, held_out.values()))
    training: dict[str, str] = {}
    for name, text in texts.items():
        lines = _long_lines(text)
        repeats = len(lines & held_out_lines) > REPEATED_SHARE * len(lines)
        if not repeats and text not in training.values():
            training[name] = text
    return Corpus(training, held_out)


def train_tokenizer(texts: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Byte-level BPE as StarCoder's: control tokens first, every digit a token of its own."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def batches(
    texts: list[str], tokenizer: Tokenizer, *, batch_size: int, length: int, seed: int
) -> Iterator[Tensor]:
    """Endless training batches (B, length + 1) int64, determined by the seed.

    Each epoch reads every text once, in a new order: about half of them whole, the rest in pieces
    rearranged for infilling. Documents are packed with `<|endoftext|>` between them and cut into
    windows, which are shuffled. A window's last token is the next one's first.
    """
    rng = random.Random(seed)
    end = tokenizer.end_of_text_id
    assert end is not None
    while True:
        ids: list[int] = []
        for text in rng.sample(texts, len(texts)):
            if rng.random() < 0.5:
                ids += [end, *tokenizer.encode(text, special_tokens=False)]
                continue
            for piece in split_into_pieces(text, PIECE_CHARACTERS_PER_TOKEN * length, rng):
                ids += [end, *rearrange(piece, tokenizer, rng)]
        windows = torch.tensor(ids, dtype=torch.int32).unfold(0, length + 1, length)
        order = rng.sample(range(len(windows)), len(windows))
        for i in range(0, len(order) - batch_size + 1, batch_size):
            yield windows[order[i : i + batch_size]].long()


def split_into_pieces(text: str, longest: int, rng: random.Random) -> Iterator[str]:
    """Cut a text at line starts into pieces of very different lengths."""
    start = 0
    while start < len(text):
        size = int(PIECE_CHARACTERS * (longest / PIECE_CHARACTERS) ** rng.random())
        end = text.find("\n", start + size) + 1 or len(text)
        yield text[start:end]
        start = end


def rearrange(piece: str, tokenizer: Tokenizer, rng: random.Random) -> list[int]:
    """The ids of a piece rearranged for infilling, with a hole of one of two kinds.

    Half of the holes lie anywhere, as in StarCoder's training. The other half are what an editor
    asks for, and their end is easier to learn: they end with a line and begin with a line or a
    word. A line includes the line break and indentation before it, which are one token; a word
    includes its space.
    """
    if rng.random() < 0.5:
        return fim_transform(piece, tokenizer, rng, rate=1.0)
    lines = list(re.finditer(r"\s*\S.*", piece))
    if not lines:  # blank
        return tokenizer.encode(piece, special_tokens=False)
    first = rng.randrange(len(lines))
    last = min(first + rng.choice(HOLE_LINES), len(lines)) - 1
    start, end = lines[first].start(), lines[last].end()
    if rng.random() < 0.5:
        words = re.finditer(r"(?<=\S)(?= \S)|(?<=[(\[{.])(?=\S)", lines[first].group())
        start += rng.choice([0, *(word.start() for word in words)])
    before, hole, after = piece[:start], piece[start:end], piece[end:]
    prompt = infill_prompt(tokenizer, before, after, mode=rng.choice(MODES))
    return prompt + tokenizer.encode(hole, special_tokens=False)


def _long_lines(text: str) -> set[str]:
    return {line for line in map(str.strip, text.splitlines()) if len(line) >= LONG_LINE}
