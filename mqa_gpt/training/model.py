"""The model that a run starts from: random weights from the seed, or those of a checkpoint."""

from __future__ import annotations

import dataclasses

import torch

from mqa_gpt.checkpoints.headers import read_config
from mqa_gpt.checkpoints.hub import resolve
from mqa_gpt.checkpoints.load import load_model
from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import ConfigError
from mqa_gpt.model import GPT
from mqa_gpt.tokenizer import Tokenizer
from mqa_gpt.training.config import RunConfig
from mqa_gpt.training.induction import require_room, start_from_induction


def model_config(config: RunConfig, tokenizer: Tokenizer) -> GPTConfig:
    """The sizes of a run's model.

    Raises:
        ConfigError: as `require_sizes`.
    """
    return require_sizes(config, tokenizer.vocab_size, tokenizer.end_of_text_id)


def require_sizes(config: RunConfig, vocab_size: int, end: int | None = None) -> GPTConfig:
    """The sizes of a run's model with a tokenizer of `vocab_size` entries.

    Raises:
        ConfigError: its vocabulary is smaller than the tokenizer's, or its context than a sequence,
            or it has no room for the induction circuit.
    """
    sizes = given_sizes(config, vocab_size=vocab_size, bos_token_id=end, eos_token_id=end)
    if vocab_size > sizes.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {sizes.vocab_size:,} and the tokenizer has {vocab_size:,} "
            "entries: it must be at least as many"
        )
    if config.model.induction:
        require_room(sizes)
    if config.data.length > sizes.n_positions:
        raise ConfigError(
            f"data.length is {config.data.length:,} and model.n_positions is "
            f"{sizes.n_positions:,}: a sequence must fit into the context"
        )
    return sizes


def given_sizes(config: RunConfig, **defaults: int | None) -> GPTConfig:
    """The sizes that a run's config or its pretrained model gives.

    Args:
        defaults: as in `ModelConfig.gpt_config`; a pretrained model needs none.
    """
    if config.model.pretrained is None:
        return config.model.gpt_config(**defaults)
    return dataclasses.replace(read_config(resolve(config.model.pretrained)), **config.model.sizes)


def make_model(config: RunConfig, tokenizer: Tokenizer, device: torch.device) -> GPT:
    """A run's model with the weights that it starts from, float32.

    Raises:
        InputError: as `model_config`; or the checkpoint cannot be loaded.
    """
    torch.manual_seed(config.run.seed)
    model = GPT(model_config(config, tokenizer))
    if config.model.pretrained is not None:
        stored = load_model(config.model.pretrained, dtype=torch.float32, device="cpu")
        model.load_state_dict(stored.state_dict())
    elif config.model.induction:
        start_from_induction(model)
    model.to(device).set_backend(config.model.backend)
    return model
