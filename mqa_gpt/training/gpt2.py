"""GPT-2's own checkpoints as models of this architecture with a key/value head per query head.

The two compute the same. GPT-2 stores its linear layers as [in, out] (its `Conv1D`), and the rows
of `c_attn` as all queries, all keys, all values instead of head by head.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mqa_gpt.checkpoints.files import CONFIG_FILE, StoredTensor, read_json, stored_tensors
from mqa_gpt.checkpoints.headers import STORED_DTYPES, by_parameter_name, widest_dtype
from mqa_gpt.checkpoints.hub import resolve
from mqa_gpt.checkpoints.load import empty_model
from mqa_gpt.checkpoints.match import LM_HEAD, WTE, own_weights
from mqa_gpt.config import MODEL_TYPE, GPTConfig
from mqa_gpt.errors import CheckpointError, ConfigError, shown
from mqa_gpt.fast.int8 import tie_head
from mqa_gpt.model import GPT
from mqa_gpt.training.qkv import join_qkv


def is_gpt2(folder: Path) -> bool:
    """Whether the checkpoint in `folder` is GPT-2's, by its config.json."""
    values = read_json(folder / CONFIG_FILE, ConfigError) if (folder / CONFIG_FILE).exists() else {}
    return isinstance(values, dict) and values.get("model_type") == "gpt2"


def load_gpt2(name_or_dir: str | PathLike[str], *, revision: str | None = None) -> GPT:
    """Load a GPT-2 checkpoint on the CPU in its own dtype, in evaluation mode; the logits are
    GPT-2's.

    Args:
        name_or_dir, revision: a hub name or a folder, see `mqa_gpt.checkpoints.hub.resolve`.

    Raises:
        ConfigError: a config with something that this architecture does not have, such as
            `scale_attn_by_inverse_layer_idx` or an activation that it does not know.
        CheckpointError: the checkpoint is missing or damaged, or its tensors are not those that the
            config describes.
    """
    folder = resolve(name_or_dir, revision)
    config = gpt2_config(folder)
    stored = by_parameter_name(folder, stored_tensors(folder), config)
    if config.tie_word_embeddings:
        head = stored.pop(LM_HEAD, None)
        if head is not None:
            stored.setdefault(WTE, head)
    model = empty_model(config).to(widest_dtype(stored.values()))
    wanted = own_weights(model)
    for name, weight in wanted.items():
        _check(folder, name, weight, stored.get(name))
    if unexpected := sorted(stored.keys() - wanted.keys()):
        raise CheckpointError(
            f"{folder} holds {shown(unexpected[0])}, which GPT-2 does not have: is it GPT-2 with "
            "something added?"
        )
    state = {}
    for name, weight in wanted.items():
        with stored[name].file.opened() as handle:
            tensor: Tensor = handle.get_tensor(stored[name].name)
        if is_transposed(name, tensor.ndim):
            tensor = tensor.T
        if ".c_attn." in name:
            q, k, v = tensor.chunk(3)
            tensor = join_qkv(q, k, v, config)
        state[name] = tensor.to(weight.dtype, memory_format=torch.contiguous_format).contiguous()
    model.load_state_dict(state, assign=True, strict=False)  # a tied head has no entry of its own
    if config.tie_word_embeddings:
        tie_head(model)
    return model.eval()


def gpt2_config(folder: Path) -> GPTConfig:
    """The config of a GPT-2 checkpoint as one of this architecture.

    Raises:
        ConfigError: it has something that this architecture does not have.
    """
    file = folder / CONFIG_FILE
    values: dict[str, Any] = read_json(file, ConfigError)
    if values.get("scale_attn_by_inverse_layer_idx"):
        raise ConfigError(
            f"{file}: scale_attn_by_inverse_layer_idx is true, which divides each layer's scores "
            "by its number: this architecture cannot express it"
        )
    # GPT-2's class names, the switch that was just found to be off, and an old name of n_positions.
    dropped = ("architectures", "auto_map", "scale_attn_by_inverse_layer_idx", "n_ctx")
    kept = {key: value for key, value in values.items() if key not in dropped}
    try:
        return GPTConfig.from_dict({**kept, "model_type": MODEL_TYPE, "multi_query": False})
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def is_transposed(name: str, dimensions: int) -> bool:
    """Whether GPT-2 stores a weight of this name as [in, out]."""
    return ".h." in name and dimensions == 2


def _check(folder: Path, name: str, weight: Tensor, stored: StoredTensor | None) -> None:
    """CheckpointError unless a stored tensor is there and has the weight's shape."""
    shape = tuple(weight.shape)
    expected = shape[::-1] if is_transposed(name, weight.ndim) else shape
    if stored is None:
        raise CheckpointError(f"{folder} lacks {name}: get the checkpoint again")
    if stored.shape != expected or stored.dtype not in STORED_DTYPES:
        raise CheckpointError(
            f"{stored.name} in {folder} is {stored.dtype} {shown(list(stored.shape))}: expected "
            f"{list(expected)} in a float dtype, by {CONFIG_FILE}"
        )
