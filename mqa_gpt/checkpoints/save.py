"""A model to the files of a checkpoint, which are there as a whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from mqa_gpt.checkpoints.files import INDEX_FILE, WEIGHTS_FILE
from mqa_gpt.checkpoints.load import CONFIG_FILE, own_weights
from mqa_gpt.errors import CheckpointError, InputError
from mqa_gpt.fast.int8 import CONFIG_ENTRY, CONFIG_KEY, is_quantized, says_quantized
from mqa_gpt.fast.packing import UNPACKED, is_packed
from mqa_gpt.model import GPT
from mqa_gpt.tokenizer import TOKENIZER_FILE, Tokenizer


def save_model(
    model: GPT,
    folder: str | PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write `config.json` and the weights so that transformers loads them back bit for bit.

    8-bit weights (`mqa_gpt.fast.int8`) load here only; transformers refuses them.

    Everything is written and synced under a temporary name first. A folder that does not exist
    appears complete, in one step. In one that exists, the files are moved into place with the one
    that loading starts from as the last; old shards go, other files stay. If that is broken off,
    the folder does not load, or loads the old or the new model, and what was not moved is still in
    the folder `.saving-...` inside it.

    Args:
        model: weights in any float dtype, on any device.
        folder: made if it does not exist.
        tokenizer: written as `tokenizer.json`; None leaves the one that may be there.
        max_shard_size: bytes, or text such as "5GB"; a larger model is written in shards with an
            index.

    Raises:
        CheckpointError: the files cannot be written, and those of before are untouched; or they
            cannot be moved into place, and the message says where they are.
        ValueError: a size that cannot be read, or a tied model whose head is a weight of its own.
        InputError: the model's weights are packed (see `mqa_gpt.fast.packing`); nothing is touched.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    if is_packed(model):
        raise InputError(f"packed weights cannot be saved: {UNPACKED}")
    folder = Path(folder).expanduser().resolve()
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        if model.lm_head.weight is not model.transformer.wte.weight:
            raise ValueError(
                "lm_head.weight is not wte.weight, though the model's config ties them: "
                "use a config with tie_word_embeddings=False"
            )
        tensors = own_weights(model)
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    values = model.config.to_dict()
    for stale in ("torch_dtype", "transformers_weights"):  # the older name; another weights file
        values.pop(stale, None)
    if is_quantized(model):
        values[CONFIG_KEY] = CONFIG_ENTRY
    elif says_quantized(model.config):  # a plain model that was made with the config of another
        del values[CONFIG_KEY]
    values["dtype"] = str(model.dtype).removeprefix("torch.")

    # On the same disk as what it becomes. pathlib would raise where the folder may not be seen.
    beside = folder if os.path.isdir(folder) else folder.parent  # noqa: PTH112
    temporary = beside / f".saving-{uuid.uuid4().hex[:8]}"
    moving = False
    try:
        temporary.mkdir(parents=True)
        for file, names in split.filename_to_tensors.items():
            shard = {name: tensors[name].contiguous() for name in names}
            save_file(shard, temporary / file, metadata={"format": "pt"})
        _write_json(temporary / CONFIG_FILE, values)
        if tokenizer is not None:
            (temporary / TOKENIZER_FILE).write_text(tokenizer.to_json(), encoding="utf-8")
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            _write_json(temporary / INDEX_FILE, index)
        mode = (temporary / CONFIG_FILE).stat().st_mode  # safetensors lets only the owner read
        for written in temporary.iterdir():
            written.chmod(mode)
            _sync(written)
        if folder.is_dir():
            moving = True
            _move_into(folder, temporary)
            moving = False
        else:
            temporary.rename(folder)
            _sync(folder.parent)  # the rename itself
        _sync(folder)
    except (OSError, SafetensorError) as error:
        if moving:
            raise CheckpointError(
                f"the checkpoint is written but cannot be moved into {folder} ({error}): move the "
                f"files of {temporary} there by hand"
            ) from error
        raise CheckpointError(
            f"the checkpoint cannot be written to {folder} ({error}): make room there, or choose "
            "another folder"
        ) from error
    finally:
        if not moving:
            shutil.rmtree(temporary, ignore_errors=True)


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    """Have the system write a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_into(folder: Path, temporary: Path) -> None:
    """Replace the checkpoint in `folder` by the one in `temporary`.

    Between the first and the last move the folder must hold nothing that loads, for the files of
    two savings have the same names: what loading starts from goes first and comes last. Weights in
    one file are replaced in one step where nothing else changes.
    """
    new = {file.name for file in temporary.iterdir()}
    shards = folder.glob("model-?????-of-?????.safetensors")
    old = {WEIGHTS_FILE, INDEX_FILE, *(file.name for file in shards)}
    first = INDEX_FILE if INDEX_FILE in new else WEIGHTS_FILE
    others = sorted(new - {first})
    if first == INDEX_FILE or not all(_is_same(folder / n, temporary / n) for n in others):
        for name in (INDEX_FILE, WEIGHTS_FILE):
            (folder / name).unlink(missing_ok=True)
    for name in others:
        (temporary / name).replace(folder / name)
    (temporary / first).replace(folder / first)
    for name in old - new:
        (folder / name).unlink(missing_ok=True)


def _is_same(old: Path, new: Path) -> bool:
    return old.is_file() and old.read_bytes() == new.read_bytes()
