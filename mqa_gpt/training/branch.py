"""A run continued with other settings in a folder of its own, such as a longer or a cooled-down
one: what WSD schedules are made for (Hu et al. 2024).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mqa_gpt.errors import InputError
from mqa_gpt.training import checkpoints
from mqa_gpt.training.config import (
    CONFIG_FILE,
    DATA_FOLDER,
    FREE_IN_BRANCH,
    SIZES_FILE,
    TOKENIZER_FOLDER,
    RunConfig,
    differences,
    read_run_config,
    require_run,
    to_toml,
)
from mqa_gpt.training.log import LOG_FILE
from mqa_gpt.training.shards import written_at_once


def branch(source: Path, out: Path, config: RunConfig) -> str:
    """Make a folder for a run that continues from the last checkpoint of another.

    It holds that checkpoint, the data, the tokenizer and the log up to there: resumed, it goes on
    as if the steps that are done were its own. The files are linked where the file system can,
    since none of them is ever changed.

    Args:
        source: folder of the run to continue from, which stays as it is.
        out: a new folder.
        config: of the new run.

    Returns:
        What is continued and with which other settings, as a sentence.

    Raises:
        InputError: no such run or checkpoint, `out` is not empty, or a setting differs that the
            steps that are done depend on.
    """
    require_run(source)
    if out.exists() and out.samefile("."):  # it would be replaced by a folder of the same name
        raise InputError("a run cannot continue in the current folder: name a new one by --out")
    found = checkpoints.complete(source)
    if not found:
        raise InputError(f"{source} has no checkpoint yet: there is nothing to continue from")
    last, old = found[-1], read_run_config(source / CONFIG_FILE)
    changed = differences(old, config, free=FREE_IN_BRANCH)
    if changed:
        raise InputError(
            f"a run cannot continue from {source} where settings differ on which its steps "
            f"depend: {'; '.join(changed)}"
        )
    step = checkpoints.read_state(last).step
    if step >= config.run.steps:
        raise InputError(
            f"the last checkpoint of {source} is of step {step:,} and run.steps is "
            f"{config.run.steps:,}: it must be more"
        )
    with written_at_once(out) as folder:
        for name in (TOKENIZER_FOLDER, DATA_FOLDER):
            if (source / name).exists():
                shutil.copytree(source / name, folder / name, copy_function=_link)
        target = folder / checkpoints.FOLDER / last.name
        shutil.copytree(last, target, copy_function=_link)
        for name in (SIZES_FILE, LOG_FILE):
            shutil.copy(source / name, folder / name)
        (folder / CONFIG_FILE).write_text(to_toml(config), encoding="utf-8")
    settings = "; ".join(differences(old, config, free=())) or "the same settings"
    return f"continues from step {step:,} of {source} with {settings}"


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
