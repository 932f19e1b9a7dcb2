"""A run's weights as an ordinary model: exported for transformers, and writing texts meanwhile."""

from __future__ import annotations

from pathlib import Path

import torch

from mqa_gpt.checkpoints.save import save_model
from mqa_gpt.fim import infill_prompt
from mqa_gpt.generation.loop import generate
from mqa_gpt.model import GPT
from mqa_gpt.tokenizer import Tokenizer
from mqa_gpt.training.config import LoopConfig
from mqa_gpt.training.parallel import World, whole


def gathered(model: GPT, world: World) -> GPT | None:
    """A copy of a model with whole parameters, in evaluation mode, on the first rank's device.

    Every rank must call this; the others get None. Parameters are gathered one at a time.
    """
    copy = GPT(model.config) if world.is_first else None
    own = dict(copy.named_parameters()) if copy is not None else {}
    for name, parameter in model.named_parameters():
        tensor = whole(parameter.detach())
        if copy is not None:
            own[name].data = tensor.clone()
    return None if copy is None else copy.eval()


def export(model: GPT, tokenizer: Tokenizer, folder: Path, dtype: str) -> None:
    """Write a gathered model and its tokenizer as a checkpoint that transformers loads.

    Args:
        dtype: of the weights; the model is changed to it.
    """
    save_model(model.to(getattr(torch, dtype)), folder, tokenizer=tokenizer)


def written_texts(model: GPT, tokenizer: Tokenizer, config: LoopConfig) -> list[str]:
    """What a gathered model writes for the prompts and holes of a run, greedily.

    Returns:
        One text per prompt, then one per hole, in which what is written stands in brackets.
    """
    prompts = [tokenizer.encode(text, special_tokens=False) for text in config.prompts]
    prompts += [infill_prompt(tokenizer, before, after) for before, after in config.holes]
    written = generate(model, prompts, config.sample_tokens, eos_token_id=tokenizer.end_of_text_id)
    around = [(text, "") for text in config.prompts] + list(config.holes)
    return [
        f"{before}[{tokenizer.decode(ids)}]{after}"
        for (before, after), ids in zip(around, written, strict=True)
    ]
