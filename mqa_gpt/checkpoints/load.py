"""Checkpoints: a hub name or a folder -> validated safetensors -> GPT. `saving` is the way back.

A checkpoint is untrusted input. Only JSON and safetensors are ever opened, neither of which can
run code; every name, shape and dtype is checked against the config before memory is allocated;
and no name that a checkpoint contains becomes a path outside its folder.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from functools import reduce
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
    WEIGHTS_FILE,
    StoredTensor,
    all_problems,
    is_there,
    opened,
    read_json,
    stored_tensors,
)
from mqa_gpt.checkpoints.hub import resolve
from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import CheckpointError, ConfigError, InputError, shown
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

CONFIG_FILE = "config.json"

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}

# The same, by the names that safetensors writes. Anything else is a quantized checkpoint.
STORED_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
}

WTE, LM_HEAD = "transformer.wte.weight", "lm_head.weight"


def read_config(folder: str | PathLike[str]) -> GPTConfig:
    """The config of the checkpoint in `folder`.

    Raises:
        CheckpointError: there is no config.json.
        ConfigError: it is not JSON, or not a config that this architecture can run.
    """
    file = Path(folder) / CONFIG_FILE
    if not is_there(file):
        raise CheckpointError(
            f"{folder} holds no {CONFIG_FILE}: a checkpoint is a folder with {CONFIG_FILE} and "
            f"{WEIGHTS_FILE}"
        )
    values = read_json(file, ConfigError)
    try:
        return GPTConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


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
    copied one by one from the mapped file into the model, so that the peak is the model plus its
    largest tensor, in whatever dtype they are stored.

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
    select_attention(backend, chosen_device)  # a wrong name is said before the work, not after
    folder = resolve(name_or_dir, revision)
    config = read_config(folder)
    stored = _by_parameter_name(folder, stored_tensors(folder), config)
    chosen_dtype = wanted_dtype or _widest_dtype(stored.values())
    model = empty_model(config).to(chosen_dtype)
    if says_quantized(config):
        quantize_model(model)
    wanted = own_weights(model)
    parts = _match(folder, config, wanted, stored)
    if quantize is not None and not is_quantized(model):
        quantize_model(model)
    final = own_weights(model)
    new_scales = final.keys() - wanted.keys()
    to_quantize = [tensor for name, tensor in wanted.items() if f"{name}_scale" in new_scales]
    spare = max((2 * 4 * tensor.numel() for tensor in to_quantize), default=0)
    _require_memory(folder, model, chosen_dtype, chosen_device, spare)
    if config.tie_word_embeddings and WTE in stored and LM_HEAD in stored:
        _require_equal(folder, stored[WTE], stored[LM_HEAD], chosen_dtype)

    # What is packed, or rounded at once, needs no copy of its own.
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


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The dtype of that name; InputError if a model cannot have it."""
    found: torch.dtype | None
    if isinstance(dtype, str):
        name = dtype.removeprefix("torch.")
        found = DTYPES.get(SHORT_DTYPES.get(name, name))
    else:
        found = dtype
    if found is None or found not in DTYPES.values():
        raise InputError(f"dtype is {dtype!r}: accepted are {', '.join(DTYPES)}")
    return found


def as_device(device: torch.device | str | None) -> torch.device:
    """The device of that name, or the best one here; InputError if there is none such."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with warnings.catch_warnings(action="ignore"):  # of names that are on their way out
            found = torch.device(device)
        if found.type == "meta":
            raise RuntimeError("has no values to compute with")
        torch.empty(0, device=found)  # the name may be known and the hardware absent
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise InputError(
            f"device is {str(device)!r}, which this machine or this build of PyTorch does not "
            "have: 'cpu' always works"
        ) from error
    return found


def _by_parameter_name(
    folder: Path, tensors: list[StoredTensor], config: GPTConfig
) -> dict[str, StoredTensor]:
    """The stored tensors by the model's names, without the mask buffers of old versions."""
    buffer = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")
    stored: dict[str, StoredTensor] = {}
    twice = []
    for tensor in tensors:
        name = tensor.name
        if not name.startswith(("transformer.", "lm_head.")):
            name = f"transformer.{name}"
        if buffer.fullmatch(name):
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
    """What a checkpoint of the model holds: all its tensors, a tied head's once."""
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        return {name: tensor for name, tensor in tensors.items() if not name.startswith("lm_head.")}
    return tensors


# The one or two stored tensors that make a weight, and whether they are stored transposed.
Parts = list[tuple[StoredTensor, bool]]


def _match(
    folder: Path, config: GPTConfig, wanted: dict[str, Tensor], stored: dict[str, StoredTensor]
) -> dict[str, Parts]:
    """What each weight is made of; CheckpointError with every name, shape or dtype amiss."""
    # Original SantaCoder keeps queries apart from keys and values, and every linear weight of its
    # blocks as [in, out], the habit of GPT-2's Conv1D.
    santacoder = config.multi_query and any(name.endswith(".q_attn.weight") for name in stored)
    left = dict(stored)
    parts: dict[str, Parts] = {}
    problems = []
    if config.tie_word_embeddings and LM_HEAD in left:
        head = left.pop(LM_HEAD)
        if left.setdefault(WTE, head) is not head:
            problems += _amiss(head, (config.vocab_size, config.n_embd), wanted[WTE].dtype)
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
            problems += _amiss(tensor, stored_shape, weight.dtype)
            parts[weight_name].append((tensor, transposed))
    problems += [f"{shown(tensor.name)} is unexpected" for tensor in left.values()]
    if problems:
        quantized = " (quantized weights)" * ("quantization_config" in config.extra)
        raise all_problems(
            f"the weights in {folder} are not those that its {CONFIG_FILE} describes{quantized}; "
            "get both from the same place",
            problems,
        )
    return parts


def _amiss(tensor: StoredTensor, shape: tuple[int, ...], dtype: torch.dtype) -> list[str]:
    """What is wrong with one stored tensor."""
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


def _widest_dtype(tensors: Iterable[StoredTensor]) -> torch.dtype:
    """The dtype that holds every stored weight exactly; 8-bit weights and scales do not count."""
    names = {t.dtype for t in tensors if t.dtype in STORED_DTYPES and not t.name.endswith("_scale")}
    return reduce(torch.promote_types, {STORED_DTYPES[name] for name in names} or {torch.float32})


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
    with opened(wte.file) as a, opened(lm_head.file) as b:
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

    With `mapped` it may be the file's own memory, for whoever does not keep it: a file that changes
    would change it too.
    """
    if mapped and device.type == "cpu" and len(parts) == 1 and not parts[0][1]:
        with opened(parts[0][0].file) as handle:
            stored: Tensor = handle.get_tensor(parts[0][0].name)
        if stored.dtype == dtype:
            return stored
    weight = torch.empty(shape, dtype=dtype, device=device)
    first = 0
    for tensor, transposed in parts:
        # Opened for each tensor, which takes half a millisecond: the pages of a mapped file count
        # as this process's memory until it is closed.
        with opened(tensor.file) as handle:
            stored = handle.get_tensor(tensor.name)
            stored = stored.T if transposed else stored
            weight[first : first + len(stored)].copy_(stored)
        first += tensor.shape[-1] if transposed else tensor.shape[0]
    return weight
