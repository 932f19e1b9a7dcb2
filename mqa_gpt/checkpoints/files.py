"""The weight files of a checkpoint folder: what they hold, from their headers alone, and why not.

Only JSON and safetensors are ever opened, neither of which can run code, and no name that a file
contains becomes a path outside its folder.
"""

from __future__ import annotations

import json
import re
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from mqa_gpt.errors import CheckpointError, InputError, shown

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# As much as safetensors allows a header; the index of the largest models is a hundredth of it.
MAX_JSON_BYTES = 100_000_000

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
    if is_there(folder / WEIGHTS_FILE):
        return _read_header(folder / WEIGHTS_FILE)
    if not is_there(folder / INDEX_FILE):
        raise CheckpointError(_no_weights(folder))
    weight_map = _read_index(folder / INDEX_FILE)

    problems: list[str] = []
    stored: list[StoredTensor] = []
    for shard in sorted(set(weight_map.values())):
        try:
            if not is_there(folder / shard):
                problems.append(f"{shown(shard)} is missing")
                continue
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


def is_there(file: Path) -> bool:
    """Whether a file exists; CheckpointError if its name is taken by something that is no file.

    Opening a pipe would wait for a writer, and a device may never end.
    """
    try:
        mode = file.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if file.is_symlink():
            raise CheckpointError(
                f"{file} is a link to {shown(str(file.readlink()))}, where nothing is: get the "
                "file again"
            ) from None
        return False
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        what = "folder" if stat.S_ISDIR(mode) else "pipe or device"
        raise CheckpointError(f"{file} is a {what}, not a file: put the checkpoint's file there")
    return True


def read_json(file: Path, error_type: type[InputError]) -> Any:
    """The contents of a JSON file."""
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    if len(data) > MAX_JSON_BYTES:
        raise error_type(f"{file} is larger than {MAX_JSON_BYTES:,} bytes: get it again")
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # ValueError: JSON, UTF-8 or a number too long
        raise error_type(f"{file} is not valid JSON ({error}): get it again") from error


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
    is_zip = head.startswith(b"PK\x03\x04")
    if re.match(rb"\x80[\x02-\x05]", head) or (is_zip and _holds_pickle(file)):
        return (
            f"{file} ({size:,} bytes) is a pickle (PyTorch's .bin format), which can run code when "
            "it is opened: get the checkpoint's real safetensors files"
        )
    if is_zip:
        return f"{file} ({size:,} bytes) is a zip archive: unpack it, or get the file itself"
    reason = shown(str(error).removeprefix("Error while deserializing header: "))
    return f"{file} ({size:,} bytes) is not a valid safetensors file ({reason}): get it again"


def _holds_pickle(archive: Path) -> bool:
    """Whether a zip file is what `torch.save` writes: a pickle, and its tensors beside it."""
    try:
        with zipfile.ZipFile(archive) as opened_archive:
            return any(name.split("/")[-1] == "data.pkl" for name in opened_archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return False


def _no_weights(folder: Path) -> str:
    """What to say about a folder without the files that loading starts from."""
    message = f"{folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}"
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if others:
        return f"{message} but {shown(others)}: rename a single file to {WEIGHTS_FILE}"
    pickles = sorted(
        file.name for file in folder.glob("*") if file.suffix in (".bin", ".pt", ".pth", ".ckpt")
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
