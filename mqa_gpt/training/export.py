"""A run's weights as an ordinary model: exported for transformers, and writing texts meanwhile."""

from __future__ import annotations

from pathlib import Path

import torch

from mqa_gpt.checkpoints.headers import read_config
from mqa_gpt.checkpoints.save import save_model
from mqa_gpt.errors import InputError
from mqa_gpt.fim import infill_prompt
from mqa_gpt.generation.loop import generate
from mqa_gpt.model import GPT
from mqa_gpt.tokenizer import Tokenizer
from mqa_gpt.training import checkpoints
from mqa_gpt.training.config import (
    CONFIG_FILE,
    TOKENIZER_FOLDER,
    LoopConfig,
    read_run_config,
    require_run,
)
from mqa_gpt.training.parallel import World, whole
from mqa_gpt.training.tensor_parallel import fused


def gathered(model: GPT, world: World) -> GPT | None:
    """A copy of a model with whole parameters, in evaluation mode, on the first rank's device.

    Every rank must call this; the others get None. Parameters are gathered one at a time.
    """
    copy = GPT(model.config) if world.is_first else None
    own = dict(copy.named_parameters()) if copy is not None else {}
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, parameter in fused(parameters, model.config).items():
        tensor = whole(parameter)
        if copy is not None:
            own[name].data = tensor.clone()
    return None if copy is None else copy.eval()


def export(model: GPT, tokenizer: Tokenizer, folder: Path, dtype: str) -> None:
    """Write a gathered model and its tokenizer as a checkpoint that transformers loads.

    Args:
        dtype: of the weights; the model is changed to it.
    """
    save_model(model.to(getattr(torch, dtype)), folder, tokenizer=tokenizer)


def text_prompts(tokenizer: Tokenizer, config: LoopConfig) -> list[tuple[str, list[int]]]:
    """What the model of a run is given to write on: the name of the setting, and its ids."""
    found = [
        (f"run.prompts[{i}]", tokenizer.encode(text, special_tokens=False))
        for i, text in enumerate(config.prompts)
    ]
    return found + [
        (f"run.holes[{i}]", infill_prompt(tokenizer, before, after))
        for i, (before, after) in enumerate(config.holes)
    ]


def written_texts(model: GPT, tokenizer: Tokenizer, config: LoopConfig) -> list[str]:
    """What a gathered model writes for the prompts and holes of a run, greedily.

    Returns:
        One text per prompt, then one per hole, in which what is written stands in brackets, control
        tokens too, so that one sees whether and where it ended.
    """
    prompts = [ids for _, ids in text_prompts(tokenizer, config)]
    written = generate(model, prompts, config.sample_tokens, eos_token_id=tokenizer.end_of_text_id)
    around = [(text, "") for text in config.prompts] + list(config.holes)
    return [
        f"{before}[{tokenizer.decode(ids, skip_special_tokens=False)}]{after}"
        for (before, after), ids in zip(around, written, strict=True)
    ]


def require_empty(folder: Path) -> None:
    """Raise InputError if a folder to write a model to holds something already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists already: name another folder, or remove it")


def export_checkpoint(
    run: Path, folder: Path, *, step: int | None = None, best: bool = False, raw: bool = False
) -> Path:
    """Write the model of one of a run's checkpoints, for transformers.

    Args:
        run: folder of the run.
        folder: of the model.
        step: of the checkpoint; None for the last one.
        best: take the one with the least held-out loss.
        raw: the weights of the step, even if the run keeps an average of them.

    Returns:
        The checkpoint that was read.

    Raises:
        InputError: no such run, no such checkpoint, or `folder` holds something.
    """
    require_run(run)
    config = read_run_config(run / CONFIG_FILE)
    found = {checkpoints.read_state(path).step: path for path in checkpoints.complete(run)}
    if step is not None and best:
        raise InputError("step and best are both given: choose one")
    chosen = (
        checkpoints.best(run)
        if best
        else found.get(max(found, default=0) if step is None else step)
    )
    if chosen is None:
        known = ", ".join(map(str, found)) or "none"
        raise InputError(f"{run} has no such checkpoint: there are those of the steps {known}")
    require_empty(folder)
    tokenizer = Tokenizer.from_pretrained(run / TOKENIZER_FOLDER)
    model = GPT(read_config(run))
    part = "average" if config.averaging.decay and not raw else "model"
    tensors = {f"{part}.{name}": p.detach() for name, p in model.named_parameters()}
    checkpoints.load(chosen, tensors)
    export(model.eval(), tokenizer, folder, config.run.export_dtype)
    return chosen
