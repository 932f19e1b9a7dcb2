"""What a checkpoint holds and how much memory it takes to run, without loading the model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from mqa_gpt.cache import cache_bytes
from mqa_gpt.checkpoints.files import WeightFile, stored_tensors
from mqa_gpt.checkpoints.headers import read_config, widest_dtype
from mqa_gpt.checkpoints.hub import resolve
from mqa_gpt.checkpoints.load import DEMO_DIR, empty_model
from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import CheckpointError
from mqa_gpt.fast.int8 import says_quantized

# The dtypes for which weights and caches are counted.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Formats that have neither NaN nor infinity, and for which torch has no arithmetic.
ALWAYS_FINITE = ("F4", "F6_E2M3", "F6_E3M2")


class TensorInfo(NamedTuple):
    """One tensor; `dtype` is safetensors' name, as "F32". Both it and `file` are None if no file
    holds the tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str | None = None
    file: WeightFile | None = None


@dataclass(frozen=True)
class Inspection:
    """The sizes of a model.

    Attributes:
        name: the folder, hub name or preset that was asked for.
        config: its config.
        tensors: what its files store, or for a preset, the parameters it would have.
        file_bytes: size of the weight files; None for a preset.
        hub: hub name and commit of the files; None for a folder or a preset.
        dtype: of the stored weights (see `widest_dtype`); None for a preset.
    """

    name: str
    config: GPTConfig
    tensors: list[TensorInfo]
    file_bytes: int | None = None
    hub: tuple[str, str] | None = None
    dtype: torch.dtype | None = None

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the parameters in a dtype."""
        return self.config.parameters * dtype.itemsize

    def cache_bytes_per_token(self, dtype: torch.dtype, *, multi_query: bool) -> int:
        """Bytes of K and V that each token keeps, with one key/value head or with one per head."""
        return cache_bytes(replace(self.config, multi_query=multi_query), dtype)

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        names = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
        weights = {name: self.weight_bytes(dtype) for name, dtype in names.items()}
        if self.file_bytes is not None and says_quantized(self.config):
            # Including scales and weights that are not quantized, as the files hold them.
            names["int8"], weights["int8"] = torch.int8, self.file_bytes
        return {
            "name": self.name,
            "config": self.config.to_dict(),
            "parameters": self.config.parameters,
            "parameters_by_part": self.config.parameters_by_part,
            "file_bytes": self.file_bytes,
            "weight_bytes": weights,
            "cache_bytes_per_token": {
                name: {
                    "mqa": self.cache_bytes_per_token(dtype, multi_query=True),
                    "mha": self.cache_bytes_per_token(dtype, multi_query=False),
                }
                for name, dtype in names.items()
            },
            "tensors": [
                tensor._asdict() | {"file": tensor.file and tensor.file.path.name}
                for tensor in self.tensors
            ],
        }


class NonFinite(NamedTuple):
    """How many NaN and infinite values a stored tensor holds."""

    name: str
    nan: int
    inf: int


class FileHash(NamedTuple):
    """The SHA-256 of a weight file and the one it should have, hexadecimal.

    `expected` is None if it is not known. `source` says where it comes from: "hub", or "cache" for
    the file's name in the hub's local cache.
    """

    file: str
    sha256: str
    expected: str | None
    source: str | None

    @property
    def differs(self) -> bool:
        """Whether the file is not the published one."""
        return self.expected is not None and self.sha256 != self.expected


def inspect_checkpoint(
    name_or_dir: str | PathLike[str] | None = None, *, revision: str | None = None
) -> Inspection:
    """The sizes of a checkpoint, from its config and its files' headers; None is the demo.

    Raises:
        CheckpointError, ConfigError: it cannot be found or downloaded, or is damaged.
    """
    name = DEMO_DIR if name_or_dir is None else name_or_dir
    folder = resolve(name, revision)
    config = read_config(folder)
    stored = stored_tensors(folder)
    tensors = [TensorInfo(*tensor) for tensor in stored]
    is_folder = folder in (DEMO_DIR, Path(name).expanduser())
    return Inspection(
        name="demo" if name_or_dir is None else str(name),
        config=config,
        tensors=tensors,
        file_bytes=sum(file.stat().st_size for file in _files(tensors)),
        hub=None if is_folder else (str(name), folder.name),
        dtype=widest_dtype(stored),
    )


def inspect_shape(name: str) -> Inspection:
    """The sizes of a published checkpoint by its name alone; nothing is downloaded.

    Raises:
        ConfigError: not one of the presets; lists them.
    """
    config = GPTConfig.preset(name)
    tensors = [
        TensorInfo(name, tuple(parameter.shape))
        for name, parameter in empty_model(config).named_parameters()
    ]
    return Inspection(name=name, config=config, tensors=tensors)


def check_finite(found: Inspection) -> list[NonFinite]:
    """The stored tensors that hold NaN or infinity; reads one tensor at a time.

    Raises:
        CheckpointError: a file cannot be read.
    """
    bad = []
    for tensor in _progress(found.tensors, "checking", "tensor"):
        if tensor.file is None or tensor.dtype in ALWAYS_FINITE:
            continue
        # Mapped again for each tensor: what has been read of a mapped file counts as memory.
        with tensor.file.opened() as handle:
            values = handle.get_tensor(tensor.name)
        if values.is_floating_point() and values.itemsize == 1:
            values = values.float()  # torch cannot ask this of every 8-bit format
        if not values.isfinite().all():
            nan, inf = int(values.isnan().sum()), int(values.isinf().sum())
            bad.append(NonFinite(tensor.name, nan, inf))
    return bad


def hash_files(found: Inspection) -> list[FileHash]:
    """The SHA-256 of each weight file, and what the hub says it should be.

    For a hub name, the hub is asked. If it does not answer, and for a snapshot folder in its cache,
    the file's name in the cache counts: a large file is stored there under its SHA-256.

    Raises:
        CheckpointError: a file cannot be read.
    """
    from_hub = {} if found.hub is None else _hub_digests(*found.hub)
    hashes = []
    for file in _progress(_files(found.tensors), "hashing", "file"):
        try:
            with file.open("rb") as stream:
                sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
        blob = file.resolve()
        expected, source = from_hub.get(file.name), "hub"
        if expected is None and blob.parent.name == "blobs":
            expected, source = blob.name, "cache"
        if expected is None or not re.fullmatch("[0-9a-f]{64}", expected):
            hashes.append(FileHash(file.name, sha256, None, None))
        else:
            hashes.append(FileHash(file.name, sha256, expected, source))
    return hashes


def _hub_digests(name: str, commit: str) -> dict[str, str]:
    """File name -> SHA-256 of a repository's large files; empty if the hub does not answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    try:
        files = [
            file
            for file in HfApi().list_repo_tree(name, revision=commit)
            if isinstance(file, RepoFile)
        ]
    except Exception:  # offline, refused, or an answer that no hub gives
        return {}
    return {file.path: file.lfs.sha256 for file in files if file.lfs}


def _files(tensors: list[TensorInfo]) -> list[Path]:
    """The files that hold the tensors."""
    return sorted({tensor.file.path for tensor in tensors if tensor.file is not None})


def _progress(items: list[Any], what: str, unit: str) -> Iterator[Any]:
    """The items, with a progress bar on standard error after a second."""
    return tqdm(items, desc=what, unit=unit, delay=1, leave=False, disable=None)
