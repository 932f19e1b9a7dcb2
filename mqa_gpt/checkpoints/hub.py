"""From a hub name or a folder to the folder that holds the checkpoint's files."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path

from mqa_gpt.errors import CheckpointError, shown

# What is read, so what is fetched: never a pickle, never code, nothing from sub-folders.
FILES = ["config.json", "tokenizer.json", "model.safetensors.index.json", "*.safetensors"]

EXAMPLE = "'bigcode/starcoderbase-1b'"


def resolve(name_or_dir: str | PathLike[str], revision: str | None = None) -> Path:
    """The folder of a checkpoint: `name_or_dir` itself, or the hub's files in the local cache.

    A folder that exists is taken as it is, also where the hub has a model of that name. What does
    not exist but is a path (a `Path`, or text that begins with "/", "." or "~" or has more than two
    parts) is an error; anything else is a hub name, whose safetensors and JSON files
    `huggingface_hub` downloads or finds in its cache.

    Args:
        name_or_dir: a folder, or a hub name such as "bigcode/starcoderbase-1b".
        revision: branch, tag or commit of a hub name.

    Raises:
        CheckpointError: no such folder, or what the hub answered: gated, missing, unreachable.
    """
    name = os.fspath(name_or_dir)
    # os.path answers False for what cannot be a path at all, where pathlib raises.
    path = os.path.expanduser(name)  # noqa: PTH111
    if os.path.isdir(path):  # noqa: PTH112
        if revision is not None:
            raise CheckpointError(
                f"revision is {shown(revision)} but {name} is a folder, which has no revisions: "
                "leave it out, or give a hub name"
            )
        return Path(path)
    if os.path.isfile(path):  # noqa: PTH113
        raise CheckpointError(f"{name} is a file: give the folder that holds it and config.json")
    is_path = isinstance(name_or_dir, PathLike) or name.startswith(("/", ".", "~"))
    if is_path or len(Path(path).parts) > 2:
        raise CheckpointError(
            f"there is no folder {shown(name)}: give a folder that exists, or a hub name such as "
            f"{EXAMPLE}"
        )
    # huggingface_hub makes a path of it without looking.
    if revision is not None and (not revision or ".." in revision or not revision.isprintable()):
        raise CheckpointError(
            f"revision is {shown(revision)}: it must be a branch, tag or commit, such as 'main'"
        )
    return _download(name, revision)


def _download(name: str, revision: str | None) -> Path:
    """The cache folder with the checkpoint's files, fetched as far as they are not there yet."""
    # Imported here: half a second that loading from a folder does not need.
    try:
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.errors import (  # type: ignore[attr-defined]
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            HTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ValueError as error:
        raise CheckpointError(
            f"an environment variable that begins with HF_ cannot be used ({_one_line(error)}): "
            "correct or unset it"
        ) from error

    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=FILES, ignore_patterns="*/*")
        )
    except HFValidationError as error:
        raise CheckpointError(
            f"{shown(name)} is neither a folder nor a hub name such as {EXAMPLE}"
        ) from error
    except GatedRepoError as error:  # before RepositoryNotFoundError, which it derives from
        raise CheckpointError(
            f"{name} is gated: accept its licence at https://huggingface.co/{name}, then run "
            "`hf auth login` with a token of that account"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name} is neither a folder here nor a model on the hub: check the spelling, or run "
            "`hf auth login` if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{name} has no revision {shown(revision)}: its branches and tags are listed at "
            f"https://huggingface.co/{name}/tree/main"
        ) from error
    except LocalEntryNotFoundError as error:
        reason = (
            "HF_HUB_OFFLINE is set: unset it to download"
            if constants.HF_HUB_OFFLINE
            else f"{constants.ENDPOINT} cannot be reached ({_one_line(error.__cause__ or error)}): "
            "check the network"
        )
        raise CheckpointError(
            f"there is no folder {name} here, and the cache at {constants.HF_HUB_CACHE} does not "
            f"hold all files of a hub model of that name; {reason}, or give a folder"
        ) from error
    except (HfHubHTTPError, HTTPError, OSError, ValueError, KeyError) as error:
        # The last two: an answer that is no hub's, such as a network's login page.
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise CheckpointError(
                f"{constants.ENDPOINT} refuses the access token for {name}: run `hf auth login` "
                "with a valid one, or unset HF_TOKEN"
            ) from error
        raise CheckpointError(
            f"downloading {name} failed ({_one_line(error)}): run the same again; the files that "
            "are complete are kept"
        ) from error


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
