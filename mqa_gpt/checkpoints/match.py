"""Which stored tensors make which weight of the model, whatever layout they are stored in."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from mqa_gpt.checkpoints.files import (
    CONFIG_FILE,
    MASK_BUFFER,
    StoredTensor,
    all_problems,
    quantized_by,
    quantized_message,
)
from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import CheckpointError, shown
from mqa_gpt.model import GPT

# By the names that safetensors writes. Anything else is a quantized checkpoint.
STORED_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
}

WTE, LM_HEAD = "transformer.wte.weight", "lm_head.weight"

# The one or two stored tensors that make a weight, and whether they are stored transposed.
Parts = list[tuple[StoredTensor, bool]]


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


def own_weights(model: GPT) -> dict[str, Tensor]:
    """What a checkpoint of the model holds: all its tensors, a tied head's only once."""
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        return {name: tensor for name, tensor in tensors.items() if not name.startswith("lm_head.")}
    return tensors


def match(
    folder: Path, config: GPTConfig, wanted: dict[str, Tensor], stored: dict[str, StoredTensor]
) -> dict[str, Parts]:
    """What each of the `wanted` weights is made of, by name.

    Raises:
        CheckpointError: every wrong or missing name, shape and dtype; or the method by which the
            weights are quantized.
    """
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
