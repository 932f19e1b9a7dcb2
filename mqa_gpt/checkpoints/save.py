"""A model -> the files of a checkpoint, all of them or none."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from mqa_gpt.checkpoints.files import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, WRITTEN
from mqa_gpt.checkpoints.headers import GENERATION_FILE
from mqa_gpt.checkpoints.match import own_weights
from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import CheckpointError, InputError, is_int, shown
from mqa_gpt.fast.int8 import CONFIG_ENTRY, CONFIG_KEY, is_quantized, says_quantized
from mqa_gpt.model import GPT
from mqa_gpt.tokenizer import END_OF_TEXT, TOKENIZER_FILE, Tokenizer

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"  # read by transformers only


def save_model(
    model: GPT,
    folder: str | PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write `config.json` and the weights so that transformers loads them back bit for bit.

    8-bit weights (`mqa_gpt.fast.int8`) load here only; transformers refuses them. The config's end
    tokens are also written as `generation_config.json`.

    Everything is written and synced under a temporary name first. A folder that does not exist
    appears complete, in one step. In one that exists, old shards are replaced and other files stay;
    the file that loading starts from is moved into place last. If the process is killed before
    that, the old model loads, or loading says where the complete new files are.

    Args:
        model: weights in any float dtype, on any device.
        folder: made if it does not exist.
        tokenizer: written as `tokenizer.json` and `tokenizer_config.json`; None leaves those that
            may be there.
        max_shard_size: bytes, or text such as "5GB"; a larger model is written in shards with an
            index.

    Raises:
        CheckpointError: the files cannot be written, and the old ones are untouched; or they cannot
            be moved into place, and the message says where they are.
        InputError: an invalid size, a model with a peft adapter, or a tied model whose head is a
            weight of its own. Nothing is written.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    folder, max_bytes = _as_path(folder), _as_bytes(max_shard_size)
    tensors = model.state_dict()
    if any(".base_layer." in name for name in tensors):
        raise InputError(
            "the model has a peft adapter: merge it with peft's merge_and_unload and save the "
            "result, or save the adapter alone with the PeftModel's save_pretrained"
        )
    if model.config.tie_word_embeddings:
        if model.lm_head.weight is not model.transformer.wte.weight:
            raise InputError(
                "lm_head.weight is not wte.weight, though the model's config ties them: "
                "use a config with tie_word_embeddings=False"
            )
        tensors = own_weights(model)
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_bytes
    )
    values = model.config.to_dict()
    for stale in ("torch_dtype", "transformers_weights"):  # the older name; another weights file
        values.pop(stale, None)
    if is_quantized(model):
        values[CONFIG_KEY] = CONFIG_ENTRY
    elif says_quantized(model.config):  # a plain model that was made with the config of another
        del values[CONFIG_KEY]
    values["dtype"] = str(model.dtype).removeprefix("torch.")

    # On the same disk as the folder. pathlib would raise where the folder is not accessible.
    disk = folder if os.path.isdir(folder) else folder.parent  # noqa: PTH112
    if os.path.isfile(folder):  # noqa: PTH113
        raise CheckpointError(f"{folder} is a file: choose another folder")
    unique = uuid.uuid4().hex[:8]
    temporary = disk / f".writing-{unique}"
    moving = False
    try:
        temporary.mkdir(parents=True)
        for file, names in split.filename_to_tensors.items():
            shard = {name: tensors[name].contiguous() for name in names}
            save_file(shard, temporary / file, metadata={"format": "pt"})
        _write_json(temporary / CONFIG_FILE, values)
        ids = {key: values[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_json(temporary / GENERATION_FILE, {k: v for k, v in ids.items() if v is not None})
        if tokenizer is not None:
            (temporary / TOKENIZER_FILE).write_text(tokenizer.to_json(), encoding="utf-8")
            _write_json(
                temporary / TOKENIZER_CONFIG_FILE, tokenizer_config(tokenizer, model.config)
            )
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            _write_json(temporary / INDEX_FILE, index)
        mode = (temporary / CONFIG_FILE).stat().st_mode  # safetensors lets only the owner read
        for written in temporary.iterdir():
            written.chmod(mode)
            _sync(written)
        if folder.is_dir():
            temporary = temporary.rename(folder / f"{WRITTEN}{unique}")
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
            ) from None
        is_barred = isinstance(error, (PermissionError, NotADirectoryError, FileExistsError))
        advice = "choose another folder" if is_barred else "make room there, or choose another"
        raise CheckpointError(
            f"the checkpoint cannot be written to {folder} ({error}): {advice}"
        ) from None
    finally:
        if not moving:
            shutil.rmtree(temporary, ignore_errors=True)


def tokenizer_config(tokenizer: Tokenizer, config: GPTConfig) -> dict[str, Any]:
    """The `tokenizer_config.json` by which transformers finds class and control tokens."""

    def name(*ids: int | None) -> str | None:
        """The first of the ids that is a control token, else end-of-text, by name."""
        names = [*(tokenizer.id_to_token(id_) for id_ in ids if id_ is not None), END_OF_TEXT]
        return next((n for n in names if n and tokenizer.control_id(n) is not None), None)

    end = name(*config.end_token_ids)
    tokens = {"bos_token": name(config.bos_token_id), "eos_token": end, "unk_token": end}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.n_positions,
        "clean_up_tokenization_spaces": False,
    } | {key: token for key, token in tokens.items() if token is not None}


def _as_path(folder: str | PathLike[str]) -> Path:
    """The folder's absolute path; CheckpointError if there can be none of that name."""
    try:
        return Path(folder).expanduser().resolve()
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise CheckpointError(
            f"{shown(folder)} cannot be the path of a folder ({error}): choose another"
        ) from None


def _as_bytes(max_shard_size: int | str) -> int:
    """A size such as 1000 or "5GB" in bytes; InputError if it is not one."""
    size: Any = max_shard_size
    if isinstance(size, str):
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])B", size.strip().upper())
        size = int(float(found[1]) * 1000 ** (1 + "KMGT".index(found[2]))) if found else 0
    if not is_int(size) or size < 1:
        raise InputError(
            f"max_shard_size is {shown(max_shard_size)}: it must be a positive number of bytes, or "
            "text such as '5GB' or '500MB'"
        )
    return int(size)


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

    From the first move to the last the folder must hold nothing that loads, because the files of
    two savings have the same names: what loading starts from is removed first and moved last. If
    only the weights change and they are in one file, they are replaced in one step.
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
