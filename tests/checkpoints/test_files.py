"""Messages for weight files that are not what their names say, and unusual files that are valid."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mqa_gpt import CheckpointError, ConfigError
from mqa_gpt.checkpoints.files import (
    INDEX_FILE,
    MAX_HEADER_BYTES,
    WEIGHTS_FILE,
    read_json,
    stored_tensors,
)
from mqa_gpt.checkpoints.headers import read_config
from mqa_gpt.errors import InputError

SHARD = "model-00001-of-00001.safetensors"


def safetensors(header: str, size: int) -> bytes:
    """A file of this header and `size` bytes of data."""
    return struct.pack("<Q", len(header)) + header.encode() + bytes(size)


def entry(begin: int, end: int) -> str:
    return f'{{"dtype": "F32", "shape": [{(end - begin) // 4}], "data_offsets": [{begin}, {end}]}}'


def sharded(folder: Path, weight_map: str) -> Path:
    (folder / INDEX_FILE).write_text(f'{{"weight_map": {weight_map}}}')
    return folder


# ------------------------------------------------------------------------------- not regular files


def link_to_nothing(file: Path) -> str:
    file.symlink_to("../../blobs/0123")
    return "is a link to '../../blobs/0123', where nothing is: get the file again"


def link_to_itself(file: Path) -> str:
    file.symlink_to(file.name)
    return "cannot be read: Too many levels of symbolic links"


def subfolder(file: Path) -> str:
    file.mkdir()
    return "is a folder, not a file: put the checkpoint's file there"


def pipe(file: Path) -> str:
    os.mkfifo(file)
    return "is a pipe or device, not a file: put the checkpoint's file there"


def endless_device(file: Path) -> str:
    file.symlink_to("/dev/zero")
    return "is a pipe or device, not a file: put the checkpoint's file there"


@pytest.mark.parametrize("make", [link_to_nothing, link_to_itself, subfolder, pipe, endless_device])
@pytest.mark.parametrize("name", [WEIGHTS_FILE, INDEX_FILE, SHARD])
def test_what_is_no_regular_file_is_named(
    tmp_path: Path, name: str, make: Callable[[Path], str]
) -> None:
    if name == SHARD:
        sharded(tmp_path, f'{{"a": "{SHARD}"}}')
    expected = make(tmp_path / name)
    with pytest.raises(CheckpointError) as caught:
        stored_tensors(tmp_path)
    assert f"{tmp_path / name} {expected}" in str(caught.value)


# ---------------------------------------------------------------------------- files of other kinds


def test_what_torch_saves_is_a_pickle(tmp_path: Path) -> None:
    for old_format in (True, False):
        torch.save(
            {"a": torch.zeros(3)},
            tmp_path / WEIGHTS_FILE,
            _use_new_zipfile_serialization=not old_format,
        )
        with pytest.raises(CheckpointError, match=r"is a pickle \(PyTorch's \.bin format\)"):
            stored_tensors(tmp_path)


@pytest.mark.parametrize("damaged", [False, True])
def test_any_other_zip_file_is_named_as_one(tmp_path: Path, damaged: bool) -> None:
    file = tmp_path / WEIGHTS_FILE
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model.safetensors", bytes(100))
    if damaged:
        file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"bytes\) is a zip archive: unpack it"):
        stored_tensors(tmp_path)


def test_a_json_file_above_the_limit_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(" " * 998 + "{}")
    assert read_json(file, ConfigError, 1000) == {}
    file.write_text(" " * 999 + "{}")
    with pytest.raises(ConfigError, match=r"config\.json is larger than 1,000 bytes: get it again"):
        read_json(file, ConfigError, 1000)


# ------------------------------------------------------------------------------- odd but permitted


def test_a_name_that_a_header_repeats_counts_once(tmp_path: Path) -> None:
    header = f'{{"a": {entry(0, 8)}, "a": {entry(0, 8)}}}'
    (tmp_path / WEIGHTS_FILE).write_bytes(safetensors(header, 8))
    assert [(t.name, t.shape) for t in stored_tensors(tmp_path)] == [("a", (2,))]


@pytest.mark.parametrize("second", [entry(8, 16), entry(0, 4)])
def test_a_name_that_a_header_repeats_for_other_data_is_refused(
    tmp_path: Path, second: str
) -> None:
    header = f'{{"a": {entry(0, 8)}, "a": {second}}}'
    (tmp_path / WEIGHTS_FILE).write_bytes(safetensors(header, 16))
    with pytest.raises(CheckpointError, match="is not a valid safetensors file"):
        stored_tensors(tmp_path)


def test_a_name_that_an_index_repeats_must_be_where_it_is_named_last(tmp_path: Path) -> None:
    other = "model-00002-of-00002.safetensors"
    save_file({"a": torch.zeros(1)}, tmp_path / SHARD)
    save_file({"b": torch.zeros(1)}, tmp_path / other)
    sharded(tmp_path, json.dumps({"b": other})[:-1] + f', "a": "{other}", "a": "{SHARD}"}}')
    assert [(t.name, t.file.path.name) for t in stored_tensors(tmp_path)] == [
        ("a", SHARD),
        ("b", other),
    ]
    sharded(tmp_path, json.dumps({"b": other})[:-1] + f', "a": "{SHARD}", "a": "{other}"}}')
    with pytest.raises(CheckpointError, match=f"{other} lacks 'a'"):
        stored_tensors(tmp_path)


def test_a_file_may_hold_no_tensors_and_a_tensor_no_elements(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS_FILE).write_bytes(safetensors("{}", 0))
    assert stored_tensors(tmp_path) == []
    save_file({"a": torch.zeros(0), "b": torch.zeros(2, 0, 3)}, tmp_path / WEIGHTS_FILE)
    assert [(t.name, t.shape) for t in stored_tensors(tmp_path)] == [("a", (0,)), ("b", (2, 0, 3))]


def test_a_long_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    header = "{" + " " * MAX_HEADER_BYTES + "}"
    (tmp_path / WEIGHTS_FILE).write_bytes(safetensors(header, 0))
    with pytest.raises(CheckpointError, match=r"its header of 10,000,002 bytes is longer than 10"):
        stored_tensors(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_config_takes_little_memory_however_long_it_is(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text('{"a": [' + "{}," * 400_000 + "{}]}")
    with pytest.raises(InputError, match=rf"{name} is larger than 1,000,000 bytes: get it again"):
        read_config(tmp_path)


def test_a_weights_file_is_closed_when_nothing_refers_to_it(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / WEIGHTS_FILE)
    found = stored_tensors(tmp_path)
    descriptor = found[0].file._descriptor
    assert os.fstat(descriptor).st_size > 0
    del found
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
