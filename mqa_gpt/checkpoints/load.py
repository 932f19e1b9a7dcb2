"""A hub name or a folder -> validated safetensors -> GPT.

A checkpoint is untrusted input. Only JSON and safetensors are ever opened, neither of which can
run code; every name, shape and dtype is checked against the config before memory is allocated;
and no name that a checkpoint contains becomes a path outside its folder.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from tqdm import tqdm  # type: ignore[import-untyped]

from mqa_gpt.attention import select_attention
from mqa_gpt.cache import cache_bytes
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
from mqa_gpt.checkpoints.hub import resolve
from mqa_gpt.checkpoints.match import (
    LM_HEAD,
    WTE,
    Parts,
    by_parameter_name,
    match,
    own_weights,
    widest_dtype,
)
from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import CheckpointError, ConfigError, InputError, is_int, shown
from mqa_gpt.fast.int8 import (
    check_method,
    is_quantized,
    quantize_rows,
    says_quantized,
    tie_head,
)
from mqa_gpt.fast.int8 import quantize as quantize_model
from mqa_gpt.fast.packing import can_pack, pack, packed_names, packing_bytes
from mqa_gpt.machine import available_memory
from mqa_gpt.model import GPT

DEMO_DIR = Path(__file__).parents[1] / "demo"

GENERATION_FILE = "generation_config.json"
ADAPTER_FILE = "adapter_config.json"  # peft's

# What generation_config.json holds besides defaults of sampling and length.
NO_DEFAULTS = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

# Other common names of these.
DTYPE_ALIASES = {
    "float": "float32",
    "fp32": "float32",
    "bf16": "bfloat16",
    "half": "float16",
    "fp16": "float16",
    "double": "float64",
    "fp64": "float64",
}


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


def load_model(
    name_or_dir: str | PathLike[str],
    *,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
    quantize: str | None = None,
    packed: bool = False,
) -> GPT:
    """Load a checkpoint; the model is in evaluation mode.

    Reads every layout in which these models are published: one file or shards, names with or
    without "transformer.", a tied embedding stored as `lm_head` or `wte`, the mask buffers of old
    versions (skipped), and original SantaCoder's separate and transposed projections. Tensors are
    copied one by one from the mapped file into the model, so peak memory is the model plus its
    largest tensor as stored. A checkpoint that another process saves over meanwhile loads as it
    was before or after, or not at all.

    Args:
        name_or_dir, revision: see `resolve`.
        dtype: of the model; None keeps what is stored (the widest, if tensors differ).
        device: None takes CUDA where there is one, else the CPU.
        backend: attention backend (see `mqa_gpt.attention`).
        quantize: "int8" makes the weights 8-bit integers as they are read (see
            `mqa_gpt.fast.int8`); those of a checkpoint that was saved so are, in any case.
        packed: pack the weights for speed where `mqa_gpt.fast.packing` can, straight from the
            mapped files. Such a model cannot be trained, edited or saved.

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
    folder = resolve(name_or_dir, revision)
    config, tensors = _read_headers(folder)
    stored = by_parameter_name(folder, tensors, config)
    chosen_dtype = wanted_dtype or widest_dtype(stored.values())
    model = empty_model(config).to(chosen_dtype)
    if says_quantized(config):
        quantize_model(model)
    wanted = own_weights(model)
    parts = match(folder, config, wanted, stored)
    if quantize is not None and not is_quantized(model):
        quantize_model(model)
    final = own_weights(model)
    new_scales = final.keys() - wanted.keys()
    to_quantize = [tensor for name, tensor in wanted.items() if f"{name}_scale" in new_scales]
    spare = max((2 * 4 * tensor.numel() for tensor in to_quantize), default=0)
    _require_memory(folder, model, chosen_dtype, chosen_device, spare)
    if config.tie_word_embeddings and WTE in stored and LM_HEAD in stored:
        _require_equal(folder, stored[WTE], stored[LM_HEAD], chosen_dtype)

    # Weights that are packed or quantized at once need no copy of their own.
    from_file = {f"{name}.weight" for name in packed_names(model, chosen_dtype, chosen_device)}
    state = {}
    total = sum(tensor.numel() for tensor in wanted.values())
    with tqdm(
        total=total, desc="loading", unit=" weights", unit_scale=True, leave=False, delay=1,
        disable=None,
    ) as bar:  # fmt: skip
        for name, tensor in wanted.items():
            if f"{name}_scale" in new_scales:
                weight = _read(parts[name], tensor.shape, torch.float32, chosen_device, True)
                state[name], state[f"{name}_scale"] = quantize_rows(weight)
            else:
                mapped = packed and name in from_file
                state[name] = _read(parts[name], tensor.shape, tensor.dtype, chosen_device, mapped)
            bar.update(tensor.numel())
    model.load_state_dict(state, assign=True, strict=False)  # a tied head has no entry of its own
    del state  # it would hold all plain weights while they are packed
    if config.tie_word_embeddings:
        tie_head(model)
    model.set_backend(backend)
    if packed and can_pack(model):
        pack(model)
    return model.eval()


def _read_headers(folder: Path) -> tuple[GPTConfig, list[StoredTensor]]:
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
    return (
        f"{folder} holds a peft adapter for {shown(base)}, not a model: load the model and merge "
        "the adapter into it with peft's merge_and_unload, then save it and load that"
    )


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The dtype of that name, such as "bfloat16", "bf16" or "torch.bfloat16".

    Raises:
        InputError: a model cannot have it.
    """
    found: Any = dtype
    if isinstance(dtype, str):
        name = dtype.removeprefix("torch.")
        found = DTYPES.get(DTYPE_ALIASES.get(name, name))
    if found not in DTYPES.values():
        raise InputError(f"dtype is {shown(dtype)}: accepted are {', '.join(DTYPES)}")
    return DTYPES[str(found).removeprefix("torch.")]


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that `load_model` gives the checkpoint in `folder` where none is asked for.

    Raises:
        CheckpointError: its weights are missing or damaged.
    """
    return widest_dtype(stored_tensors(folder))


def fast_dtype(
    stored: torch.dtype, device: torch.device, parameters: int
) -> tuple[torch.dtype, str | None]:
    """The dtype to run stored weights in where none is asked for, and why if it is another.

    float32 for 16-bit weights on a CPU without fast products of that dtype, if memory allows.
    """
    if device.type != "cpu" or stored not in (torch.bfloat16, torch.float16):
        return stored, None
    if can_pack(torch.nn.Linear(1, 1, dtype=stored, device=device)):  # has fast products of it
        return stored, None
    name = str(stored).removeprefix("torch.")
    room = available_memory(device)
    if room is not None and 4 * parameters > room:
        return stored, (
            f"running in {name}, which is slow on this processor: in float32 the weights would "
            f"take {4 * parameters / 1e9:.2f} GB, and {room / 1e9:.2f} GB are available"
        )
    return torch.float32, (
        f"running in float32, because this processor is slow in {name}: --dtype {name} "
        f"(dtype='{name}') keeps the checkpoint's"
    )


def as_device(device: torch.device | str | None) -> torch.device:
    """The device of that name; None is CUDA if it is available, else the CPU.

    Raises:
        InputError: there is no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with warnings.catch_warnings(action="ignore"):  # about deprecated names
            found = torch.device(device)
        if found.type == "meta":
            raise RuntimeError("has no values to compute with")
        torch.empty(0, device=found)  # the name may be known and the hardware absent
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, TypeError):
        raise InputError(
            f"device is {shown(str(device))}, which this machine or this build of PyTorch does not "
            "have: 'cpu' always works"
        ) from None
    return found


def _require_memory(
    folder: Path, model: GPT, dtype: torch.dtype, device: torch.device, spare: int = 0
) -> None:
    """CheckpointError if the model in this dtype does not fit on this device.

    Counted is what `LLM.load` allocates: the weights and, for a while, `spare` bytes to quantize
    them or, where it packs them, what that takes.
    """

    cpu = torch.device("cpu")

    def needed(dtype: torch.dtype, place: torch.device) -> int:
        weights = sum(
            p.numel() * (dtype.itemsize if p.is_floating_point() else 1) for p in model.parameters()
        )
        weights += sum(buffer.nbytes for buffer in model.buffers())  # the scales of 8-bit weights
        return weights + max(spare, packing_bytes(model, dtype, place))

    def fits(dtype: torch.dtype, place: torch.device) -> bool:
        room = available_memory(place)
        return room is None or needed(dtype, place) <= room

    def fits_as_int8(place: torch.device) -> bool:
        room = available_memory(place)
        large = [p.numel() for p in model.parameters() if p.ndim == 2]
        # A byte each, and for a while the largest twice in float32.
        return room is not None and sum(large) + 8 * max(large) <= room

    if fits(dtype, device):
        return
    advice = "it needs a device with more memory"
    if dtype.itemsize > 2 and fits(torch.bfloat16, device):
        smaller = needed(torch.bfloat16, device)
        advice = f"dtype='bfloat16' takes {smaller / 1e9:.2f} GB and would fit"
    elif not is_quantized(model) and fits_as_int8(device):
        advice = "quantize='int8' would fit"
    elif device != cpu and fits(dtype, cpu):
        advice = "device='cpu' has room for it"
    per_token = cache_bytes(model.config, dtype)
    raise CheckpointError(
        f"{folder} needs {needed(dtype, device) / 1e9:.2f} GB in "
        f"{str(dtype).removeprefix('torch.')}, and {per_token / 1e3:,.1f} kB for each token in the "
        f"KV cache, but {(available_memory(device) or 0) / 1e9:.2f} GB are available on {device}: "
        f"{advice}"
    )


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
