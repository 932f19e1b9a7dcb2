"""Checkpoints: a hub name or a folder -> validated safetensors -> GPT, and back.

A checkpoint is untrusted input. Only JSON and safetensors are ever opened, neither of which can
run code; every name, shape and dtype is checked against the config before memory is allocated;
and no name that a checkpoint contains becomes a path outside its folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from tqdm import tqdm  # type: ignore[import-untyped]

from mqa_gpt.attention import select_attention
from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import CheckpointError, ConfigError, InputError
from mqa_gpt.model import GPT

DEMO_DIR = Path(__file__).parent / "demo"

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# What is fetched from the hub: never a pickle, never code, nothing from sub-folders.
HUB_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
]

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

# The same, by the names that safetensors writes. Anything else is a quantized checkpoint.
STORED_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
}

WTE, LM_HEAD = "transformer.wte.weight", "lm_head.weight"


class StoredTensor(NamedTuple):
    """One tensor of a checkpoint, as its file's header describes it.

    `dtype` is the name that safetensors gives it, such as "F32" or "BF16".
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path


# ---------------------------------------------------------------------------------------- finding


def resolve(name_or_dir: str | PathLike[str], revision: str | None = None) -> Path:
    """The folder of a checkpoint: `name_or_dir` itself, or the hub's files in the local cache.

    A folder that exists is taken as it is. What does not exist but looks like a path (begins with
    "/", "." or "~", or lies in a folder that exists) is an error; anything else is a hub name,
    whose safetensors and JSON files `huggingface_hub` downloads or finds in its cache.

    Args:
        name_or_dir: a folder, or a hub name such as "bigcode/starcoderbase-1b".
        revision: branch, tag or commit of a hub name.

    Raises:
        CheckpointError: no such folder, or what the hub answered: gated, missing, unreachable.
    """
    name = os.fspath(name_or_dir)
    path = Path(name).expanduser()
    if name and path.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"revision is {revision!r} but {name} is a folder: a revision needs a hub name"
            )
        return path
    if name and path.is_file():
        raise CheckpointError(
            f"{name} is a file: give the folder that holds the config.json and the weights"
        )
    in_a_folder = len(path.parts) > 1 and path.parent.is_dir()
    if not name or name[0] in "/.~" or len(path.parts) > 2 or in_a_folder:
        raise CheckpointError(
            f"there is no folder {name!r}: give an existing folder, "
            "or a hub name such as 'bigcode/starcoderbase-1b'"
        )
    return _download(name, revision)


def _download(name: str, revision: str | None) -> Path:
    """The folder that holds the checkpoint's files after asking the hub and its local cache."""
    # Imported here: half a second that loading a folder does not need.
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=["*/*"]
            )
        )
    except HFValidationError as error:
        raise CheckpointError(
            f"{name!r} is neither a folder nor a hub name such as 'bigcode/starcoderbase-1b'"
        ) from error
    except GatedRepoError as error:  # before RepositoryNotFoundError, which it derives from
        raise CheckpointError(
            f"{name} is gated: accept its licence at https://huggingface.co/{name}, "
            "then run `hf auth login` with a token of that account"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name!r} is neither a folder here nor a model on the hub: check the spelling, "
            "or run `hf auth login` if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{name} has no revision {revision!r}: see the branches and tags at "
            f"https://huggingface.co/{name}/tree/main"
        ) from error
    except LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set: unset it to download"
        else:
            reason = f"the hub at {constants.ENDPOINT} cannot be reached: check the network"
        raise CheckpointError(
            f"{name} is not complete in the cache ({constants.HF_HUB_CACHE}) and {reason}, "
            "or give a folder"
        ) from error
    except HfHubHTTPError as error:
        raise CheckpointError(f"the hub refused {name}: {error}") from error
    except (HTTPError, OSError) as error:
        raise CheckpointError(
            f"downloading {name} failed: {error or type(error).__name__}; "
            "run the same again to continue where it stopped"
        ) from error


def read_config(folder: str | PathLike[str]) -> GPTConfig:
    """The config of the checkpoint in `folder`.

    Raises:
        CheckpointError: there is no config.json.
        ConfigError: it is not JSON, or not a config that this architecture can run.
    """
    file = Path(folder) / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{folder} holds no {CONFIG_FILE}: a checkpoint is a folder with {CONFIG_FILE} and "
            f"{WEIGHTS_FILE}"
        )
    try:
        return GPTConfig.from_dict(_read_json(file))
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def _read_json(file: Path) -> Any:
    """The contents of a JSON file; ConfigError if it has none."""
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not valid JSON ({error})") from error


# --------------------------------------------------------------------------------------- headers


def stored_tensors(folder: str | PathLike[str]) -> list[StoredTensor]:
    """Every tensor of the checkpoint in `folder`, read from its files' headers alone.

    `model.safetensors` is used if it exists, else the shards that the index names, as in
    transformers.

    Raises:
        CheckpointError: no weights, a damaged file, or an index that disagrees with its shards;
            all such problems in one message.
    """
    folder = Path(folder)
    if (folder / WEIGHTS_FILE).is_file():
        return list(_read_header(folder / WEIGHTS_FILE))
    if not (folder / INDEX_FILE).is_file():
        raise CheckpointError(_no_weights(folder))
    weight_map = _read_index(folder / INDEX_FILE)

    problems: list[str] = []
    stored: list[StoredTensor] = []
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            problems.append(f"{shard} is missing")
            continue
        try:
            tensors = list(_read_header(folder / shard))
        except CheckpointError as error:
            problems.append(str(error))
            continue
        names = {tensor.name for tensor in tensors}
        promised = {name for name, file in weight_map.items() if file == shard}
        problems += [f"{shard} lacks {name!r}" for name in sorted(promised - names)]
        problems += [
            f"{shard} holds {name!r}, which the index does not place there"
            for name in sorted(names - promised)
        ]
        stored += tensors
    if problems:
        raise _all_problems(
            f"{folder / INDEX_FILE} does not describe the files beside it", problems
        )
    return stored


def _read_index(file: Path) -> dict[str, str]:
    """The index's map from tensor name to shard, of plain safetensors file names only."""
    try:
        index = _read_json(file)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{file} has no weight_map: it must map tensor names to shards")
    problems = []
    for shard in {repr(shard): shard for shard in weight_map.values()}.values():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            problems.append(f"{shard!r} is not the plain name of a .safetensors file")
    if problems:
        raise _all_problems(f"{file} names shards that are refused", problems)
    return weight_map


def _read_header(file: Path) -> Iterator[StoredTensor]:
    """The tensors of one safetensors file."""
    try:
        with safe_open(file, framework="pt") as handle:
            for name in sorted(handle.keys()):
                view = handle.get_slice(name)
                yield StoredTensor(name, tuple(view.get_shape()), view.get_dtype(), file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(_diagnose(file, error)) from error


def _diagnose(file: Path, error: Exception) -> str:
    """Why safetensors refused a file, from its first bytes where they tell."""
    try:
        with file.open("rb") as stream:
            head = stream.read(64)
        size = file.stat().st_size
    except OSError as unreadable:
        return f"{file} cannot be read: {unreadable.strerror or unreadable}"
    if not head:
        return f"{file} is empty: download it again"
    if head.startswith(b"version https://git-lfs"):
        return f"{file} is a git-lfs pointer, not the weights: run `git lfs pull` in its folder"
    if head.startswith(b"PK\x03\x04") or re.match(rb"\x80[\x02-\x05]", head):
        return (
            f"{file} is a pickle (PyTorch's .bin format), which can run code when it is opened, "
            "and not safetensors: get the checkpoint's .safetensors files"
        )
    return f"{file} ({size:,} bytes) is not a valid safetensors file ({error}): download it again"


def _no_weights(folder: Path) -> str:
    """What to say about a folder without the two files that loading starts from."""
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    pickles = sorted(file.name for p in ("*.bin", "*.pt", "*.pth") for file in folder.glob(p))
    message = f"{folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}"
    if others:
        return f"{message} but {', '.join(others)}: rename a single file to {WEIGHTS_FILE}"
    return (
        f"{message}{f' but {pickles[0]}' if pickles else ''}: only safetensors are read, since "
        "opening a pickle (.bin, .pt) can run code; convert it with transformers' save_pretrained, "
        "or look for a revision of the checkpoint with safetensors"
    )


def _all_problems(what: str, problems: list[str], shown: int = 20) -> CheckpointError:
    """One error for many problems: the first ones in full, the others counted."""
    lines = problems[:shown]
    if len(problems) > shown:
        lines.append(f"... and {len(problems) - shown} more")
    return CheckpointError(f"{what}:\n  " + "\n  ".join(lines))


# --------------------------------------------------------------------------------------- loading


def load_model(
    name_or_dir: str | PathLike[str],
    *,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
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

    Raises:
        CheckpointError: a checkpoint that is missing, damaged, or not what its config describes,
            with all its problems; or a model that does not fit into memory.
        ConfigError: a config that this architecture cannot run.
        InputError: a dtype or device that does not exist here.
    """
    chosen_dtype = None if dtype is None else _as_dtype(dtype)
    chosen_device = _as_device(device)
    select_attention(backend, chosen_device)  # a wrong name is said before the work, not after
    folder = resolve(name_or_dir, revision)
    config = read_config(folder)
    stored = _by_parameter_name(folder, stored_tensors(folder), config)
    model = empty_model(config, backend)
    parts = _match(folder, model, stored)

    if chosen_dtype is None:
        chosen_dtype = STORED_DTYPES[next(iter(stored.values())).dtype]
        for tensor in stored.values():
            chosen_dtype = torch.promote_types(chosen_dtype, STORED_DTYPES[tensor.dtype])
    _require_memory(folder, model, chosen_dtype, chosen_device)
    if config.tie_word_embeddings and LM_HEAD in stored and WTE in stored:
        _require_equal(folder, stored[WTE], stored[LM_HEAD])

    state = {}
    copies: list[tuple[StoredTensor, Tensor]] = []
    for name, parameter in model.named_parameters():
        state[name] = torch.empty(parameter.shape, dtype=chosen_dtype, device=chosen_device)
        first = 0
        for tensor, transposed in parts[name]:
            size = tensor.shape[-1] if transposed else tensor.shape[0]
            rows = state[name][first : first + size]
            copies.append((tensor, rows.T if transposed else rows))
            first += size
    _copy(copies)
    if config.tie_word_embeddings:
        state[LM_HEAD] = state[WTE]
    model.load_state_dict(state, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    model.set_backend(backend)
    return model.eval()


class _NoRandomNumbers(TorchFunctionMode):
    """Skip `normal_`, for which the meta device would import a compiler: two seconds."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.nn.init.normal_, torch.Tensor.normal_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def empty_model(config: GPTConfig, backend: str = "auto") -> GPT:
    """A model on the meta device: every module, name and shape, and no memory for the weights."""
    with torch.device("meta"), _NoRandomNumbers():
        return GPT(config, backend)


def _as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise InputError(f"dtype is {dtype!r}: accepted are {', '.join(DTYPES)}")
    return found


def _as_device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise InputError(
            f"device is {str(device)!r}, which this machine or this build of torch does not have; "
            "'cpu' always works"
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
        if name != LM_HEAD and not name.startswith("transformer."):
            name = "transformer." + name
        if buffer.fullmatch(name):
            continue
        if name in stored:
            twice.append(f"{tensor.name!r} is the same weight as {stored[name].name!r}")
        stored[name] = tensor
    if twice:
        raise _all_problems(f"{folder} holds weights twice", twice)
    if config.n_layer > len(stored):  # before a model of that many layers is built
        raise CheckpointError(
            f"{folder} holds {len(stored)} weights, but its {CONFIG_FILE} describes "
            f"{config.n_layer} layers"
        )
    return stored


# One or two stored tensors that make a parameter, and whether they are stored transposed.
Parts = list[tuple[StoredTensor, bool]]


def _match(folder: Path, model: GPT, stored: dict[str, StoredTensor]) -> dict[str, Parts]:
    """What each parameter is made of; CheckpointError with every name, shape or dtype amiss."""
    config = model.config
    # Original SantaCoder keeps queries apart from keys and values, and every linear weight of its
    # blocks as [in, out], the habit of GPT-2's Conv1D.
    santacoder = any(name.endswith(".attn.q_attn.weight") for name in stored)
    parts: dict[str, Parts] = {}
    problems = []
    left = dict(stored)
    for parameter_name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        wanted = [(parameter_name, shape)]
        if santacoder and ".c_attn." in parameter_name:
            wanted = [
                (parameter_name.replace("c_attn", part), (rows, *shape[1:]))
                for part, rows in (
                    ("q_attn", config.n_embd),
                    ("kv_attn", shape[0] - config.n_embd),
                )
            ]
        transposed = santacoder and ".h." in parameter_name and len(shape) == 2
        parts[parameter_name] = []
        for name, part_shape in wanted:
            tied = name == WTE and config.tie_word_embeddings
            if tied and LM_HEAD in left:
                head = left.pop(LM_HEAD)
                problems += _amiss(head, part_shape)
                left.setdefault(WTE, head)
            if name not in left:
                problems.append(f"{name} is missing")
                continue
            tensor = left.pop(name)
            problems += _amiss(tensor, part_shape[::-1] if transposed else part_shape)
            parts[parameter_name].append((tensor, transposed))
    problems += [f"{tensor.name!r} is unexpected" for tensor in left.values()]
    if problems:
        raise _all_problems(f"the weights in {folder} are not those of its {CONFIG_FILE}", problems)
    return parts


def _amiss(tensor: StoredTensor, shape: tuple[int, ...]) -> list[str]:
    """What is wrong with one stored tensor."""
    problems = []
    if tensor.shape != shape:
        problems.append(f"{tensor.name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if tensor.dtype not in STORED_DTYPES:
        problems.append(
            f"{tensor.name} has dtype {tensor.dtype}: accepted are {', '.join(STORED_DTYPES)}; "
            "a quantized checkpoint cannot be loaded"
        )
    return problems


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return None if found is None else int(found[1]) * 1024


def _require_memory(folder: Path, model: GPT, dtype: torch.dtype, device: torch.device) -> None:
    """CheckpointError if the model in this dtype does not fit on this device."""
    available = available_memory(device)
    elements = sum(parameter.numel() for parameter in model.parameters())
    needed = elements * dtype.itemsize
    if available is None or needed <= available:
        return
    advice = "use a device with more memory"
    if dtype.itemsize > 2 and 2 * elements <= available:
        advice = f"dtype='bfloat16' needs {_gigabytes(2 * elements)} and fits"
    elif device.type != "cpu":
        on_cpu = available_memory(torch.device("cpu"))
        if on_cpu is None or needed <= on_cpu:
            advice = "device='cpu' has room for it"
    raise CheckpointError(
        f"{folder} needs {_gigabytes(needed)} in {str(dtype).removeprefix('torch.')}, and {device} "
        f"has {_gigabytes(available)} available: {advice}"
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"


def _require_equal(folder: Path, wte: StoredTensor, lm_head: StoredTensor) -> None:
    """CheckpointError if a tied checkpoint stores two different matrices.

    Versions of transformers disagree on what that means (the embedding for both; or untied, with a
    warning), so neither is guessed.
    """
    with safe_open(wte.file, framework="pt") as a, safe_open(lm_head.file, framework="pt") as b:
        if not torch.equal(a.get_tensor(wte.name), b.get_tensor(lm_head.name)):
            raise CheckpointError(
                f"{folder} stores {wte.name} and {lm_head.name} with different values, but its "
                f"{CONFIG_FILE} says tie_word_embeddings: set that to false to use both"
            )


def _copy(copies: list[tuple[StoredTensor, Tensor]]) -> None:
    """Fill each destination from its stored tensor, converting dtype and device on the way."""
    total = sum(destination.nbytes for _, destination in copies)
    with tqdm(
        total=total, desc="loading", unit="B", unit_scale=True, leave=False, delay=1, disable=None
    ) as bar:
        for tensor, destination in copies:
            # Opened per tensor, for half a millisecond each: the pages of a mapped file count as
            # this process's memory until it is unmapped.
            with safe_open(tensor.file, framework="pt") as handle:
                destination.copy_(handle.get_tensor(tensor.name))
            bar.update(destination.nbytes)


# ---------------------------------------------------------------------------------------- saving


def save_model(
    model: GPT, folder: str | PathLike[str], *, max_shard_size: int | str = "5GB"
) -> None:
    """Write `config.json` and the weights so that transformers loads them back bit for bit.

    Everything is written and synced under a temporary name first. A folder that does not exist
    appears complete, in one step. In one that exists, the files are moved into place with the one
    that loading starts from as the last; old shards go, other files (a tokenizer) stay.

    Args:
        model: weights in any float dtype, on any device.
        folder: made if it does not exist.
        max_shard_size: bytes, or text such as "5GB"; a larger model is written in shards with an
            index.

    Raises:
        CheckpointError: the files cannot be written; those of before are untouched.
        ValueError: a size that cannot be read, or a tied model whose head is a weight of its own.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    folder = Path(folder).expanduser().resolve()
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        if model.lm_head.weight is not model.transformer.wte.weight:
            raise ValueError(
                "lm_head.weight is not wte.weight, though the model's config ties them: "
                "use a config with tie_word_embeddings=False"
            )
        del tensors[LM_HEAD]
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    values = model.config.to_dict()
    values.pop("torch_dtype", None)
    values["dtype"] = str(model.dtype).removeprefix("torch.")

    temporary = (folder if folder.exists() else folder.parent) / f".saving-{uuid.uuid4().hex[:8]}"
    try:
        temporary.mkdir(parents=True)
        for file, names in split.filename_to_tensors.items():
            shard = {name: tensors[name].contiguous() for name in names}
            save_file(shard, temporary / file, metadata={"format": "pt"})
        _write_json(temporary / CONFIG_FILE, values)
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            _write_json(temporary / INDEX_FILE, index)
        mode = (temporary / CONFIG_FILE).stat().st_mode  # safetensors lets only the owner read
        for written in temporary.iterdir():
            written.chmod(mode)
            _sync(written)
        if folder.exists():
            _move_into(folder, temporary)
        else:
            temporary.rename(folder)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint cannot be written to {folder}: {error}") from error
    finally:
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

    Shards of two savings have the same names, so between the first and the last move the folder
    must hold nothing that loads: the index goes first and comes last. One file needs no such care.
    """
    new = {file.name for file in temporary.iterdir()}
    old = {WEIGHTS_FILE, INDEX_FILE} | {file.name for file in folder.glob("model-*.safetensors")}
    first = INDEX_FILE if INDEX_FILE in new else WEIGHTS_FILE
    if first == INDEX_FILE:
        for name in (INDEX_FILE, WEIGHTS_FILE):
            (folder / name).unlink(missing_ok=True)
    for name in sorted(new - {first}):
        (temporary / name).replace(folder / name)
    (temporary / first).replace(folder / first)
    for name in old - new:
        (folder / name).unlink(missing_ok=True)
