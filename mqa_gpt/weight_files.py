"""The weight files of a checkpoint folder: what they hold, from their headers alone, and why not.

Only JSON and safetensors are ever opened, neither of which can run code, and no name that a file
contains becomes a path outside its folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from mqa_gpt.checks import shown
from mqa_gpt.errors import CheckpointError, InputError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# A plain file name: it stays in its folder, fits every file system and prints as it is.
SHARD_NAME = re.compile(r"[\w .+@-]{1,200}\.safetensors", re.ASCII)


class StoredTensor(NamedTuple):
    """One tensor of a checkpoint, as its file's header describes it.

    `dtype` is the name that safetensors gives it, such as "F32" or "BF16".
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path


def stored_tensors(folder: str | PathLike[str]) -> list[StoredTensor]:
    """Every tensor of the checkpoint in `folder`, read from its files' headers alone.

    `model.safetensors` is used if it exists, else the shards that the index names, as in
    transformers.

    Raises:
        CheckpointError: no weights, a damaged file, or an index that disagrees with its shards;
            all such problems in one message.
    """
    folder = Path(folder)
    if (folder / WEIGHTS_FILE).is_file():
        return _read_header(folder / WEIGHTS_FILE)
    if not (folder / INDEX_FILE).is_file():
        raise CheckpointError(_no_weights(folder))
    weight_map = _read_index(folder / INDEX_FILE)

    problems: list[str] = []
    stored: list[StoredTensor] = []
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            problems.append(f"{shown(shard)} is missing")
            continue
        try:
            tensors = _read_header(folder / shard)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        names = {tensor.name for tensor in tensors}
        promised = {name for name, file in weight_map.items() if file == shard}
        problems += [f"{shard} lacks {shown(name)}" for name in sorted(promised - names)]
        problems += [
            f"{shard} holds {shown(name)}, which the index does not place there"
            for name in sorted(names - promised)
        ]
        stored += tensors
    if problems:
        raise all_problems(
            f"{folder / INDEX_FILE} does not fit the files beside it; get them all again", problems
        )
    return stored


def _read_index(file: Path) -> dict[str, str]:
    """The index's map from tensor name to shard, of plain safetensors file names only."""
    index = read_json(file, CheckpointError)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{file} has no weight_map from tensor names to shards: get it again")
    refused = [
        f"{shown(name)} is in {shown(shard)}"
        for name, shard in weight_map.items()
        if not isinstance(shard, str) or not SHARD_NAME.fullmatch(shard)
    ]
    if refused:
        raise all_problems(
            f"{file} may only name .safetensors files in its own folder; do not trust it", refused
        )
    return weight_map


def read_json(file: Path, error_type: type[InputError]) -> Any:
    """The contents of a JSON file."""
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # ValueError: JSON, UTF-8 or a number too long
        raise error_type(f"{file} is not valid JSON ({error}): get it again") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file, mapped into memory; CheckpointError where it cannot be used."""
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise CheckpointError(_diagnose(file, error)) from error


def _read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file."""
    with opened(file) as handle:
        views = {name: handle.get_slice(name) for name in sorted(handle.keys())}
        return [
            StoredTensor(name, tuple(view.get_shape()), view.get_dtype(), file)
            for name, view in views.items()
        ]


def _diagnose(file: Path, error: Exception) -> str:
    """Why safetensors refused a file, from its first bytes where they tell."""
    try:
        with file.open("rb") as stream:
            head = stream.read(64)
        size = file.stat().st_size
    except OSError as unreadable:
        return f"{file} cannot be read: {unreadable.strerror}"
    if not size:
        return f"{file} is empty (0 bytes): get it again"
    if head.startswith(b"version https://git-lfs"):
        return (
            f"{file} ({size:,} bytes) is a git-lfs pointer, not the weights: run `git lfs pull` in "
            "its folder"
        )
    if head.startswith(b"PK\x03\x04") or re.match(rb"\x80[\x02-\x05]", head):
        return (
            f"{file} ({size:,} bytes) is a pickle (PyTorch's .bin format), which can run code when "
            "it is opened: get the checkpoint's real safetensors files"
        )
    reason = shown(str(error).removeprefix("Error while deserializing header: "))
    return f"{file} ({size:,} bytes) is not a valid safetensors file ({reason}): get it again"


def _no_weights(folder: Path) -> str:
    """What to say about a folder without the files that loading starts from."""
    message = f"{folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}"
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if others:
        return f"{message} but {shown(others)}: rename a single file to {WEIGHTS_FILE}"
    pickles = sorted(
        file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt")
    )
    if pickles:
        message += f" but {shown(pickles)}"
    return (
        f"{message}: get the rest if files are missing; only safetensors are read, since opening a "
        "pickle (.bin, .pt) can run code, so convert a checkpoint of pickles with transformers' "
        "save_pretrained, or look for a revision with safetensors"
    )


def all_problems(what: str, problems: list[str]) -> CheckpointError:
    """One error for many problems: the first twenty in full, the others counted."""
    lines = problems[:20]
    if len(problems) > len(lines):
        lines.append(f"... and {len(problems) - len(lines)} more")
    return CheckpointError(f"{what}:\n  " + "\n  ".join(lines))
