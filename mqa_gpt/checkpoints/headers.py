"""What a checkpoint folder declares: its config, its tensors, and what loading leaves out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from mqa_gpt.checkpoints.files import (
    CONFIG_FILE,
    INDEX_FILE,
    MASK_BUFFER,
    WEIGHTS_FILE,
    StoredTensor,
    all_problems,
    is_there,
    read_json,
    stored_tensors,
    versions,
)
from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import CheckpointError, ConfigError, InputError, is_int, shown

GENERATION_FILE = "generation_config.json"
ADAPTER_FILE = "adapter_config.json"  # peft's

# What generation_config.json holds besides defaults of sampling and length.
NO_DEFAULTS = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}

# By the names that safetensors writes. Anything else is a quantized checkpoint.
STORED_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds, read in one pass; no weights yet.

    Attributes:
        stored: its tensors by the model's names, in files that stay open, without the mask buffers
            of old versions.
        dtype: see `widest_dtype`.
        notes: what loading it ignores and its user may expect, a sentence each.
    """

    folder: Path
    config: GPTConfig
    stored: dict[str, StoredTensor]
    dtype: torch.dtype
    notes: list[str]


def read_checkpoint(folder: str | PathLike[str]) -> Checkpoint:
    """The checkpoint in `folder`, of one saving even while another replaces it.

    Raises:
        CheckpointError: files that are missing, damaged, or always being written; names with a
            wrapper's prefix, weights that are stored twice, or far too few of them.
        ConfigError: see `read_config`.
    """
    folder = Path(folder)
    watched = (CONFIG_FILE, GENERATION_FILE, INDEX_FILE, WEIGHTS_FILE)
    for _ in range(5):
        before = versions(folder, watched)
        try:
            values, generation = _read_configs(folder)
            notes = _notes(folder, generation)
            config, tensors = _config(folder, values, generation), stored_tensors(folder)
        except InputError:
            if versions(folder, watched) == before:
                raise
        else:
            if versions(folder, watched) == before:
                stored = by_parameter_name(folder, tensors, config)
                return Checkpoint(folder, config, stored, widest_dtype(stored.values()), notes)
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
    return _config(Path(folder), *_read_configs(Path(folder)))


def _config(folder: Path, values: Any, generation: dict[str, Any]) -> GPTConfig:
    """The config that the two files' contents make."""
    end = generation.get("eos_token_id")
    if end is not None and isinstance(values, dict):
        values = {**values, "eos_token_id": end}
    try:
        return GPTConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG_FILE}: {error}") from None


def _read_configs(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The contents of config.json and of generation_config.json, whose end tokens are checked."""
    if not is_there(folder / CONFIG_FILE):
        raise CheckpointError(_no_config(folder))
    config = read_json(folder / CONFIG_FILE, ConfigError)
    file = folder / GENERATION_FILE
    if not is_there(file):
        return config, {}
    values = read_json(file, CheckpointError)
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} is not a JSON object: get it again, or remove it")
    end = values.get("eos_token_id")
    if end is not None and not all(map(is_int, end if isinstance(end, list) else [end])):
        raise CheckpointError(
            f"{file}: eos_token_id is {shown(end)}: it must be an integer, a list of integers or "
            "null"
        )
    return config, values


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
        "into it with peft's PeftModel.from_pretrained(model, adapter).merge_and_unload(), save "
        "the result with LLM(model, tokenizer).save(new_folder), and load new_folder"
    )


def _notes(folder: Path, generation: dict[str, Any]) -> list[str]:
    """What loading ignores: defaults of sampling and length, and an adapter beside the weights."""
    notes = []
    defaults = {
        key: value
        for key, value in generation.items()
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


def by_parameter_name(
    folder: Path, tensors: list[StoredTensor], config: GPTConfig
) -> dict[str, StoredTensor]:
    """The stored tensors by the model's names, without the mask buffers of old versions.

    Raises:
        CheckpointError: names with a wrapper's prefix, weights that are stored twice, or far too
            few of them.
    """
    _refuse_prefix(folder, [tensor.name for tensor in tensors])
    stored: dict[str, StoredTensor] = {}
    twice = []
    for tensor in tensors:
        name = tensor.name
        if not name.startswith(("transformer.", "lm_head.")):
            name = f"transformer.{name}"
        if re.fullmatch(MASK_BUFFER, name):
            continue
        if name in stored:
            twice.append(f"{shown(tensor.name)} and {shown(stored[name].name)} are the same weight")
        stored[name] = tensor
    if twice:
        raise all_problems(f"{folder} holds weights twice; remove one of each", twice)
    if config.n_layer > len(stored):  # before a model of that many layers is built
        raise CheckpointError(
            f"{folder} holds {len(stored)} weights, too few for the n_layer of {config.n_layer} in "
            f"its {CONFIG_FILE}: one of the two is of another model"
        )
    return stored


def widest_dtype(tensors: Iterable[StoredTensor]) -> torch.dtype:
    """The dtype that holds every stored weight exactly; 8-bit weights and scales do not count."""
    names = {t.dtype for t in tensors if t.dtype in STORED_DTYPES and not t.name.endswith("_scale")}
    return reduce(torch.promote_types, {STORED_DTYPES[name] for name in names} or {torch.float32})


def _refuse_prefix(folder: Path, names: list[str]) -> None:
    """CheckpointError if all names begin with what a wrapper of the model puts before them."""
    pattern = re.compile(r"(.+?\.)(?:transformer\.)?(?:wte|wpe|ln_f|h\.\d+)\.")
    prefix = next((found[1] for name in names if (found := pattern.match(name))), "transformer.")
    if prefix != "transformer." and all(name.startswith(prefix) for name in names):
        raise CheckpointError(
            f"all weights in {folder} have the prefix {shown(prefix)}, which a wrapper such as "
            "DistributedDataParallel, torch.compile or peft adds: remove it from the names, or "
            "save the model inside the wrapper"
        )
