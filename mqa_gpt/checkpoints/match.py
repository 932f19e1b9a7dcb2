"""Which stored tensors make which weight of the model, whatever layout they are stored in."""

from __future__ import annotations

import torch
from torch import Tensor

from mqa_gpt.checkpoints.files import (
    CONFIG_FILE,
    StoredTensor,
    all_problems,
    quantized_by,
    quantized_message,
)
from mqa_gpt.checkpoints.headers import STORED_DTYPES, Checkpoint
from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import CheckpointError, shown
from mqa_gpt.model import GPT

WTE, LM_HEAD = "transformer.wte.weight", "lm_head.weight"

# The one or two stored tensors that make a weight, and whether they are stored transposed.
Parts = list[tuple[StoredTensor, bool]]


def own_weights(model: GPT) -> dict[str, Tensor]:
    """What a checkpoint of the model holds: all its tensors, a tied head's only once."""
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        return {name: tensor for name, tensor in tensors.items() if not name.startswith("lm_head.")}
    return tensors


def match(checkpoint: Checkpoint, wanted: dict[str, Tensor]) -> dict[str, Parts]:
    """What each of the `wanted` weights is made of, by name.

    Raises:
        CheckpointError: every wrong or missing name, shape and dtype; or the method by which the
            weights are quantized.
    """
    folder, config, stored = checkpoint.folder, checkpoint.config, checkpoint.stored
    # Original SantaCoder keeps queries apart from keys and values, and stores every linear weight
    # of its blocks as [in, out], as GPT-2's Conv1D does.
    santacoder = config.multi_query and any(name.endswith(".q_attn.weight") for name in stored)
    left = dict(stored)
    parts: dict[str, Parts] = {}
    problems = []
    if config.tie_word_embeddings and LM_HEAD in left:
        head = left.pop(LM_HEAD)
        if left.setdefault(WTE, head) is not head:
            problems += _problems_of(head, (config.vocab_size, config.n_embd), wanted[WTE].dtype)
    for weight_name, weight in wanted.items():
        shape = tuple(weight.shape)
        names = [(weight_name, shape)]
        if santacoder and ".c_attn." in weight_name:
            sizes = {"q_attn": config.n_embd, "kv_attn": 2 * config.head_dim}
            names = [
                (weight_name.replace("c_attn", part), (rows, *shape[1:]))
                for part, rows in sizes.items()
            ]
        transposed = santacoder and ".h." in weight_name and len(shape) == 2
        parts[weight_name] = []
        for name, part_shape in names:
            tensor = left.pop(name, None)
            if tensor is None:
                problems.append(f"{name} is missing")
                continue
            stored_shape = part_shape[::-1] if transposed else part_shape
            problems += _problems_of(tensor, stored_shape, weight.dtype)
            parts[weight_name].append((tensor, transposed))
    problems += [f"{shown(tensor.name)} is unexpected" for tensor in left.values()]
    if problems:
        method = _quantization_method(config) or quantized_by(folder, stored)
        if method:
            raise CheckpointError(quantized_message(folder, method))
        raise all_problems(
            f"the weights in {folder} are not those that its {CONFIG_FILE} describes; get both "
            "from the same source",
            problems,
        )
    return parts


def _problems_of(tensor: StoredTensor, shape: tuple[int, ...], dtype: torch.dtype) -> list[str]:
    """What is wrong with the shape and dtype of one stored tensor."""
    problems = []
    if tensor.shape != shape:
        problems.append(
            f"{tensor.name} has the shape {shown(list(tensor.shape))} instead of {list(shape)}"
        )
    readable = ["I8"] if dtype == torch.int8 else list(STORED_DTYPES)
    if tensor.dtype not in readable:
        problems.append(
            f"{tensor.name} has the dtype {tensor.dtype}: only {', '.join(readable)} are read"
        )
    return problems


def _quantization_method(config: GPTConfig) -> str | None:
    """How the config says that other software quantized the weights."""
    entry = config.extra.get("quantization_config")
    method = entry.get("quant_method") if isinstance(entry, dict) else None
    return None if method is None else shown(method)
