"""What a checkpoint folder declares: its config, its tensors, and what loading leaves out."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from mqa_gpt.checkpoints.files import (
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    StoredTensor,
    is_there,
    read_json,
    stored_tensors,
    versions,
)
from mqa_gpt.checkpoints.match import widest_dtype
from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import CheckpointError, ConfigError, InputError, is_int, shown

GENERATION_FILE = "generation_config.json"
ADAPTER_FILE = "adapter_config.json"  # peft's

# What generation_config.json holds besides defaults of sampling and length.
NO_DEFAULTS = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}


def read_headers(folder: Path) -> tuple[GPTConfig, list[StoredTensor]]:
    """A checkpoint's config and stored tensors, of one saving even while another replaces it."""
    watched = (CONFIG_FILE, GENERATION_FILE, INDEX_FILE, WEIGHTS_FILE)
    for _ in range(5):
        before = versions(folder, watched)
        try:
            config, tensors = read_config(folder), stored_tensors(folder)
        except InputError:
            if versions(folder, watched) == before:
                raise
        else:
            if versions(folder, watched) == before:
                return config, tensors
    raise CheckpointError(
        f"{folder} is being written by another process: load it when that has finished"
    )


def read_config(folder: str | PathLike[str]) -> GPTConfig:
    """The config of the checkpoint in `folder`.

    Its end tokens are those of generation_config.json if that names any, as in transformers.

    Raises:
        CheckpointError: there is no config.json, or generation_config.json cannot be used.
        ConfigError: config.json is not JSON, or not a config that this architecture can run.
    """
    folder = Path(folder)
    file = folder / CONFIG_FILE
    if not is_there(file):
        raise CheckpointError(_no_config(folder))
    values = read_json(file, ConfigError)
    try:
        config = GPTConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    end = _read_generation_config(folder).get("eos_token_id")
    return config if end is None else replace(config, eos_token_id=end)


def _read_generation_config(folder: Path) -> dict[str, Any]:
    """The contents of generation_config.json, {} if there is none; its end tokens are checked."""
    file = folder / GENERATION_FILE
    if not is_there(file):
        return {}
    values = read_json(file, CheckpointError)
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} is not a JSON object: get it again, or remove it")
    end = values.get("eos_token_id")
    if end is not None and not all(map(is_int, end if isinstance(end, list) else [end])):
        raise CheckpointError(
            f"{file}: eos_token_id is {shown(end)}: it must be an integer, a list of integers or "
            "null"
        )
    return values


def _no_config(folder: Path) -> str:
    """The message for a folder without config.json, which may be that of an adapter."""
    if not is_there(folder / ADAPTER_FILE):
        return (
            f"{folder} holds no {CONFIG_FILE}: a checkpoint is a folder with {CONFIG_FILE} and "
            f"{WEIGHTS_FILE}"
        )
    values = read_json(folder / ADAPTER_FILE, CheckpointError)
    base = values.get("base_model_name_or_path") if isinstance(values, dict) else None
    of = "a model that it does not name" if base is None else shown(base)
    return (
        f"{folder} holds a peft adapter for {of}, not a model: load the model, merge the adapter "
        "into it with peft's PeftModel.from_pretrained(model, folder).merge_and_unload(), save the "
        "result with its save_pretrained, and load that"
    )


def checkpoint_notes(folder: str | PathLike[str]) -> list[str]:
    """What loading the checkpoint in `folder` ignores and its user may expect, a sentence each.

    Raises:
        CheckpointError: generation_config.json cannot be used.
    """
    folder = Path(folder)
    notes = []
    defaults = {
        key: value
        for key, value in _read_generation_config(folder).items()
        if key not in NO_DEFAULTS and not key.startswith("_") and value is not None
    }
    if defaults:
        notes.append(
            f"the defaults in {folder / GENERATION_FILE} are not used: {shown(defaults)}; choose "
            "sampling and length by options"
        )
    if is_there(folder / ADAPTER_FILE):
        notes.append(
            f"the peft adapter in {folder} is not used: only the full weights there are loaded"
        )
    return notes


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that `load_model` gives the checkpoint in `folder` where none is asked for.

    Raises:
        CheckpointError: its weights are missing or damaged.
    """
    return widest_dtype(stored_tensors(folder))
