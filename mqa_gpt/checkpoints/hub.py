"""A hub name or a folder -> the folder that holds the checkpoint's files.

`huggingface_hub` downloads and caches. It makes file names of what the hub answers, so answers are
checked before it sees them (`mqa_gpt.checkpoints.answers`).
"""

from __future__ import annotations

import hashlib
import os
import re
from http import HTTPStatus
from os import PathLike
from pathlib import Path

from mqa_gpt.checkpoints.answers import check_answers, masked, one_line
from mqa_gpt.errors import CheckpointError, shown
from mqa_gpt.progress import status

# What is read is what is fetched: never a pickle, never code, nothing from sub-folders.
FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "adapter_config.json",
    "quantize_config.json",
    "quant_config.json",
    "model.safetensors.index.json",
    "*.safetensors",
]

DEMO, DEMO_DIR = "demo", Path(__file__).parents[1] / "demo"

EXAMPLE = "'bigcode/starcoderbase-1b'"

REVISION = re.compile(r"[\w@+-][\w.@+-]*(/[\w@+-][\w.@+-]*)*")  # none is a path out of its folder
SHA256 = re.compile(r"[0-9a-f]{64}")


def resolve(name_or_dir: str | PathLike[str], revision: str | None = None) -> Path:
    """The folder of a checkpoint: `name_or_dir` itself, or the hub's files in the local cache.

    A folder that exists is used as it is, even if the hub has a model of that name. A path that
    does not exist (a `Path`, or text that begins with "/", "." or "~" or has more than two parts)
    is an error; "demo" is the checkpoint that comes with the package; anything else is a hub name,
    whose safetensors and JSON files `huggingface_hub` downloads or finds in its cache.

    Args:
        name_or_dir: a folder, or a hub name such as "bigcode/starcoderbase-1b".
        revision: branch, tag or commit of a hub name.

    Raises:
        CheckpointError: no such folder, or what the hub answered: gated, missing, unreachable.
    """
    name = os.fspath(name_or_dir) if isinstance(name_or_dir, PathLike) else name_or_dir
    if not isinstance(name, str):
        raise CheckpointError(f"the model is {shown(name_or_dir)}: it must be a folder or hub name")
    # os.path answers False for what cannot be a path at all, where pathlib raises.
    path = os.path.expanduser(name)  # noqa: PTH111
    if os.path.isdir(path):  # noqa: PTH112
        if revision is not None:
            raise CheckpointError(
                f"revision is {shown(revision)} but {name} is a folder, which has no revisions: "
                "leave it out, or give a hub name"
            )
        return Path(path)
    if name == DEMO and revision is None and not isinstance(name_or_dir, PathLike):
        return DEMO_DIR
    if os.path.isfile(path):  # noqa: PTH113
        raise CheckpointError(f"{name} is a file: give the folder that holds it and config.json")
    is_path = isinstance(name_or_dir, PathLike) or name.startswith(("/", ".", "~"))
    if is_path or len(Path(path).parts) > 2:
        raise CheckpointError(
            f"there is no folder {shown(name)}: give a folder that exists, or a hub name such as "
            f"{EXAMPLE}"
        )
    if revision is not None:
        fits = isinstance(revision, str) and REVISION.fullmatch(revision)
        if not fits or ".." in revision or not revision.isprintable():
            raise CheckpointError(
                f"revision is {shown(revision)}: it must be a branch, tag or commit, such as 'main'"
            )
    return _download(name, revision)


def _download(name: str, revision: str | None) -> Path:
    """The cache folder with the checkpoint's files; those that are missing are fetched."""
    # Imported here: half a second that loading from a folder does not need.
    try:
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
        from huggingface_hub.file_download import repo_folder_name
    except ValueError as error:
        raise CheckpointError(
            "an environment variable that begins with HF_ cannot be used "
            f"({one_line(error)}): correct or unset it"
        ) from None

    endpoint = masked(constants.ENDPOINT)
    try:
        check_answers()
        storage = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"))
        complete = set((storage / "blobs").glob("*"))
        try:
            with status() as say:
                say(f"asking {endpoint} for {name}")
                folder = snapshot_download(
                    name, revision=revision, allow_patterns=FILES, ignore_patterns="*/*"
                )
        finally:
            _check_digests(set((storage / "blobs").glob("*")) - complete)
        return Path(folder)
    except CheckpointError as error:
        raise CheckpointError(str(error)) from None
    except HFValidationError:
        message = f"{shown(name)} is neither a folder nor a hub name such as {EXAMPLE}"
    except GatedRepoError:  # before RepositoryNotFoundError, which it derives from
        message = (
            f"{name} is gated: accept its licence at https://huggingface.co/{name}, then run "
            "`hf auth login` with a token of that account"
        )
    except RepositoryNotFoundError:
        message = (
            f"{name} is neither a folder here nor a model on the hub: check the spelling, or run "
            "`hf auth login` if it is private"
        )
    except RevisionNotFoundError:
        message = (
            f"{name} has no revision {shown(revision)}: its branches and tags are listed at "
            f"https://huggingface.co/{name}/tree/main"
        )
    except LocalEntryNotFoundError as error:
        cause = error.__cause__ or error
        if constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set: unset it to download"
        elif isinstance(cause, HfHubHTTPError):
            reason = _refused(endpoint, cause.response.status_code)
        else:
            reason = f"{endpoint} cannot be reached ({one_line(cause)}): check the network"
        message = (
            f"there is no folder {name} here, and the cache at {constants.HF_HUB_CACHE} does not "
            f"hold all files of a hub model of that name; {reason}, or give a folder"
        )
    except HfHubHTTPError as error:
        message = f"downloading {name} failed: {_refused(endpoint, error.response.status_code)}"
    except Exception as error:  # of the network, the disk, or an answer that no hub gives
        message = (
            f"downloading {name} failed ({one_line(error)}): run the same again; the files that "
            "are complete are kept"
        )
    raise CheckpointError(message)


def _refused(endpoint: str, code: int) -> str:
    """What a hub's error status means, and what to do."""
    advice = {
        401: "it refuses the access token: run `hf auth login` with a valid one, or unset HF_TOKEN",
        403: "it refuses access: check what the access token permits, and the network's proxy",
        429: "it limits the rate of requests: wait some minutes and run the same again",
    }
    default = "run the same again later; the files that are complete are kept"
    meaning = HTTPStatus(code).phrase if code in set(HTTPStatus) else "unknown"
    return f"{endpoint} answers with status {code} ({meaning}): {advice.get(code, default)}"


def _check_digests(blobs: set[Path]) -> None:
    """CheckpointError if a downloaded file is not the one whose SHA-256 the hub names.

    A large file of the cache has its SHA-256 for a name. A file that differs is deleted.
    """
    for blob in blobs:
        if not SHA256.fullmatch(blob.name) or not blob.is_file():
            continue
        with blob.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() == blob.name:
                continue
        blob.unlink()
        raise CheckpointError(
            f"a downloaded file does not have the SHA-256 that the hub names, {blob.name}, and was "
            "deleted: run the same again"
        )
