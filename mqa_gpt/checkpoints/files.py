"""The files of a checkpoint folder: which tensors they hold, from their headers, or what is wrong.

Only JSON and safetensors are ever opened, neither of which can run code, and no name that a file
contains becomes a path outside its folder.
"""

from __future__ import annotations

import json
import os
import re
import stat
import struct
import weakref
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from mqa_gpt.errors import CheckpointError, InputError, shown

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# The name of the folder, inside the one that is saved to, with a complete set of written files that
# are being moved into place.
WRITTEN = ".saving-"

# Far above what any checkpoint needs (an index of the family's largest has 60 kB). Python's objects
# take up to 30 times the bytes of their JSON.
MAX_JSON_BYTES = 1_000_000
MAX_HEADER_BYTES = 10_000_000  # of an index or a safetensors header, which name every tensor

# A plain file name: it stays in its folder, fits every file system and is safe to print.
SHARD_NAME = re.compile(r"[\w .+@-]{1,200}\.safetensors", re.ASCII)

# What converters list in an index without storing it: a tied head, and old versions' mask buffers.
MASK_BUFFER = r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias"
OPTIONAL = re.compile(rf"{MASK_BUFFER}|lm_head\.weight")


class Version(NamedTuple):
    """What tells a file from one that was written in its place."""

    st_dev: int
    st_ino: int
    st_size: int
    st_mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Version:
        """The version that `os.stat` describes."""
        return cls(*(getattr(status, name) for name in cls._fields))


def versions(folder: Path, names: Sequence[str]) -> list[Version | None]:
    """The versions of files in a folder, None for those that are not there.

    Equal before and after others were opened, they say that no saving came between: it replaces
    these files too.
    """
    found: list[Version | None] = []
    for name in names:
        try:
            found.append(Version.of((folder / name).stat()))
        except OSError:
            found.append(None)
    return found


class WeightFile:
    """A safetensors file that is opened once and stays the same if its path is replaced.

    It is closed when nothing refers to it any more.

    Attributes:
        path: where it was, for messages.

    Raises:
        CheckpointError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        weakref.finalize(self, os.close, self._descriptor)
        self._version = self._stat()

    @contextmanager
    def opened(self) -> Iterator[Any]:
        """The file mapped into memory by safetensors, until the context ends.

        Raises:
            CheckpointError: it is damaged, or was overwritten since it was opened.
        """
        # Mapped through the descriptor, because the path may have become another file's. Systems
        # without /proc or /dev/fd do not replace files that are open.
        numbered = (f"{folder}/{self._descriptor}" for folder in ("/proc/self/fd", "/dev/fd"))
        file = next(filter(os.path.exists, numbered), self.path)
        try:
            with safe_open(file, framework="pt") as handle:
                yield handle
        except (SafetensorError, OSError) as error:
            raise CheckpointError(_diagnose(self.path, error)) from None
        if self._stat() != self._version:
            raise CheckpointError(
                f"{self.path} was overwritten while it was read: load it again when it is complete"
            )

    def header(self) -> list[StoredTensor]:
        """The tensors that the file holds, sorted by name."""
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        start = os.read(self._descriptor, 8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if MAX_HEADER_BYTES < length < self._version.st_size:
            reason = f"its header of {length:,} bytes is longer than {MAX_HEADER_BYTES:,}"
            raise CheckpointError(_diagnose(self.path, ValueError(reason)))
        with self.opened() as handle:
            views = {name: handle.get_slice(name) for name in sorted(handle.keys())}
            return [
                StoredTensor(name, tuple(view.get_shape()), view.get_dtype(), self)
                for name, view in views.items()
            ]

    def _stat(self) -> Version:
        return Version.of(os.fstat(self._descriptor))


class StoredTensor(NamedTuple):
    """One tensor of a checkpoint, as its file's header describes it.

    `dtype` is the name that safetensors gives it, such as "F32" or "BF16".
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: WeightFile


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
        return WeightFile(folder / WEIGHTS_FILE).header()
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
            tensors = WeightFile(folder / shard).header()
        except CheckpointError as error:
            problems.append(str(error))
            continue
        names = {tensor.name for tensor in tensors}
        promised = {name for name, file in weight_map.items() if file == shard}
        differing = {name for name in promised ^ names if not OPTIONAL.fullmatch(name)}
        problems += [f"{shard} lacks {shown(name)}" for name in sorted(differing & promised)]
        problems += [
            f"{shard} holds {shown(name)}, which the index does not place there"
            for name in sorted(differing & names)
        ]
        stored += tensors
    if problems:
        raise all_problems(
            f"{folder / INDEX_FILE} does not fit the files next to it; get them all again", problems
        )
    return stored


def _read_index(file: Path) -> dict[str, str]:
    """The index's map from tensor name to shard, of plain safetensors file names only."""
    index = read_json(file, CheckpointError, MAX_HEADER_BYTES)
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
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        what = "folder" if stat.S_ISDIR(mode) else "pipe or device"
        raise CheckpointError(f"{file} is a {what}, not a file: put the checkpoint's file there")
    return True


def read_json(file: Path, error_type: type[InputError], limit: int = MAX_JSON_BYTES) -> Any:
    """The contents of a JSON file of at most `limit` bytes."""
    try:
        with file.open("rb") as stream:
            data = stream.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    if len(data) > limit:
        raise error_type(f"{file} is larger than {limit:,} bytes: get it again")
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # ValueError: JSON, UTF-8 or a number too long
        raise error_type(f"{file} is not valid JSON ({error}): get it again") from None


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
    """Whether a zip file is what `torch.save` writes: a pickle together with raw tensors."""
    try:
        with zipfile.ZipFile(archive) as opened_archive:
            return any(name.split("/")[-1] == "data.pkl" for name in opened_archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return False


def _no_weights(folder: Path) -> str:
    """The message for a folder without the files that loading starts from."""
    message = f"{folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}"
    saved = [path.name for path in folder.glob(f"{WRITTEN}*")]
    dated = zip(versions(folder, saved), saved, strict=True)
    found = [(version.st_mtime_ns, name) for version, name in dated if version is not None]
    if found:
        return (
            f"{message}: saving into it was interrupted, or is not finished; if nothing is being "
            f"saved, move all files of {folder / max(found)[1]} into {folder}"
        )
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if others:
        try:
            names = [tensor.name for tensor in WeightFile(folder / others[0]).header()]
        except CheckpointError:
            names = []
        if method := quantized_by(folder, names):
            return quantized_message(folder, method)
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


def quantized_by(folder: Path, names: Iterable[str]) -> str | None:
    """The method by which other software quantized a checkpoint, as file and tensor names tell."""
    for file, method in (("quantize_config.json", "GPTQ"), ("quant_config.json", "AWQ")):
        if (folder / file).exists():
            return method
    if any(name.endswith((".qweight", ".qzeros", ".g_idx")) for name in names):
        return "GPTQ or AWQ"
    return "bitsandbytes" if any(name.endswith((".absmax", ".SCB")) for name in names) else None


def quantized_message(folder: Path, method: str) -> str:
    """What to do about weights that other software quantized."""
    return (
        f"the weights in {folder} are quantized by {method}, which is not read: load the "
        "checkpoint that they were made from, with quantize='int8' to save memory"
    )


def all_problems(what: str, problems: list[str]) -> CheckpointError:
    """One error for many problems: the first twenty in full, the others counted."""
    lines = problems[:20]
    if len(problems) > len(lines):
        lines.append(f"... and {len(problems) - len(lines)} more")
    return CheckpointError(f"{what}:\n  " + "\n  ".join(lines))
