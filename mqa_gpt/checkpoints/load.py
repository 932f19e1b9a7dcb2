"""A hub name or a folder -> validated safetensors -> GPT.

A checkpoint is untrusted input. Only JSON and safetensors are ever opened, neither of which can
run code; every name, shape and dtype is checked against the config before memory is allocated;
and no name that a checkpoint contains becomes a path outside its folder.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from tqdm import tqdm  # type: ignore[import-untyped]

from mqa_gpt.attention import select_attention
from mqa_gpt.checkpoints.files import (
    CONFIG_FILE,
    StoredTensor,
)
from mqa_gpt.checkpoints.headers import Checkpoint, read_checkpoint
from mqa_gpt.checkpoints.hub import DEMO_DIR as DEMO_DIR
from mqa_gpt.checkpoints.hub import resolve
from mqa_gpt.checkpoints.match import (
    LM_HEAD,
    WTE,
    Parts,
    match,
    own_weights,
)
from mqa_gpt.checkpoints.placement import as_device, as_dtype, require_memory
from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import CheckpointError
from mqa_gpt.fast.int8 import (
    check_method,
    is_quantized,
    quantize_rows,
    says_quantized,
    tie_head,
)
from mqa_gpt.fast.int8 import quantize as quantize_model
from mqa_gpt.model import GPT


def load_model(
    name_or_dir: str | PathLike[str] | Checkpoint,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
    quantize: str | None = None,
) -> GPT:
    """Load a checkpoint; the model is in evaluation mode.

    Reads every layout in which these models are published: one file or shards, names with or
    without "transformer.", a tied embedding stored as `lm_head` or `wte`, the mask buffers of old
    versions (skipped), and original SantaCoder's separate and transposed projections. Tensors are
    copied one by one from the mapped file into the model, so peak memory is the model plus its
    largest tensor as stored. A checkpoint that another process saves over meanwhile
    loads entirely old, entirely new, or raises.

    Args:
        name_or_dir, revision: see `resolve`; or what `read_checkpoint` has read.
        dtype: of the model; None keeps what is stored (the widest, if tensors differ).
        device: None takes CUDA where there is one, else the CPU.
        backend: attention backend (see `mqa_gpt.attention`).
        quantize: "int8" makes the weights 8-bit integers as they are read (see
            `mqa_gpt.fast.int8`); a checkpoint saved as int8 stays int8.

    Raises:
        CheckpointError: a checkpoint that is missing, damaged, or not what its config describes,
            with all its problems; or a model that does not fit into memory.
        ConfigError: a config that this architecture cannot run.
        InputError: a dtype or device that does not exist here, or a way to quantize.
    """
    check_method(quantize)
    wanted_dtype = None if dtype is None else as_dtype(dtype)
    chosen_device = as_device(device)
    select_attention(backend, chosen_device)  # fail early on an unknown name
    checkpoint = name_or_dir
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = read_checkpoint(resolve(checkpoint, revision))
    folder, config, stored = checkpoint.folder, checkpoint.config, checkpoint.stored
    chosen_dtype = wanted_dtype or checkpoint.dtype
    model = empty_model(config).to(chosen_dtype)
    if says_quantized(config):
        quantize_model(model)
    wanted = own_weights(model)
    parts = match(checkpoint, wanted)
    if quantize is not None and not is_quantized(model):
        quantize_model(model)
    final = own_weights(model)
    new_scales = final.keys() - wanted.keys()
    to_quantize = [tensor for name, tensor in wanted.items() if f"{name}_scale" in new_scales]
    spare = max((2 * 4 * tensor.numel() for tensor in to_quantize), default=0)
    require_memory(folder, model, chosen_dtype, chosen_device, spare)
    if config.tie_word_embeddings and WTE in stored and LM_HEAD in stored:
        _require_equal(folder, stored[WTE], stored[LM_HEAD], chosen_dtype)

    state = {}
    total = sum(tensor.numel() for tensor in wanted.values())
    with tqdm(
        total=total, desc="loading", unit=" weights", unit_scale=True, leave=False, delay=1,
        disable=None,
    ) as bar:  # fmt: skip
        for name, tensor in wanted.items():
            if f"{name}_scale" in new_scales:
                # Quantized at once, so it needs no copy of its own.
                weight = _read(parts[name], tensor.shape, torch.float32, chosen_device, mapped=True)
                state[name], state[f"{name}_scale"] = quantize_rows(weight)
            else:
                state[name] = _read(parts[name], tensor.shape, tensor.dtype, chosen_device)
            bar.update(tensor.numel())
    model.load_state_dict(state, assign=True, strict=False)  # a tied head has no entry of its own
    if config.tie_word_embeddings:
        tie_head(model)
    model.set_backend(backend)
    return model.eval()


class _NoRandomNumbers(TorchFunctionMode):
    """Skip `normal_`, for which the meta device would import a compiler: two seconds."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.nn.init.normal_, Tensor.normal_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def empty_model(config: GPTConfig) -> GPT:
    """A model on the meta device: every module, name and shape, and no memory for the weights."""
    with torch.device("meta"), _NoRandomNumbers():
        return GPT(config)


def _require_equal(
    folder: Path, wte: StoredTensor, lm_head: StoredTensor, dtype: torch.dtype
) -> None:
    """CheckpointError if a tied checkpoint stores two different matrices.

    Versions of transformers differ on it (wte for both, or both untied, with a warning): a
    checkpoint that contradicts its config is not guessed at.
    """
    with wte.file.opened() as a, lm_head.file.opened() as b:
        # As bytes, because NaN is not equal to itself.
        one = a.get_tensor(wte.name).to(dtype).view(torch.uint8)
        two = b.get_tensor(lm_head.name).to(dtype).view(torch.uint8)
        if not torch.equal(one, two):
            raise CheckpointError(
                f"{folder} stores different values for {wte.name} and {lm_head.name}, but "
                f"tie_word_embeddings in its {CONFIG_FILE} makes them one: set it to false to use "
                "both, or remove the wrong one"
            )


def _read(
    parts: Parts, shape: torch.Size, dtype: torch.dtype, device: torch.device, mapped: bool = False
) -> Tensor:
    """One weight from its stored parts, which follow each other in its first dimension.

    With `mapped` it may be the file's own mapped memory, for callers that do not keep it: writing
    to the file would change it.
    """
    if mapped and device.type == "cpu" and len(parts) == 1 and not parts[0][1]:
        with parts[0][0].file.opened() as handle:
            stored: Tensor = handle.get_tensor(parts[0][0].name)
        if stored.dtype == dtype:
            return stored
    weight = torch.empty(shape, dtype=dtype, device=device)
    first = 0
    for tensor, transposed in parts:
        # Mapped again for each tensor, which takes half a millisecond: the pages of a mapped file
        # count as this process's memory until it is unmapped.
        with tensor.file.opened() as handle:
            stored = handle.get_tensor(tensor.name)
            stored = stored.T if transposed else stored
            weight[first : first + len(stored)].copy_(stored)
        first += tensor.shape[-1] if transposed else tensor.shape[0]
    return weight
