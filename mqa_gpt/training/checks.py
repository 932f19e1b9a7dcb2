"""Checks of a run before its documents are read, so that it fails in seconds and not after minutes
of tokenizing; and notes about settings that will have no effect.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mqa_gpt.attention import select_attention
from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import CheckpointError, ConfigError, InputError, shown
from mqa_gpt.tokenizer import Tokenizer
from mqa_gpt.training.config import RunConfig
from mqa_gpt.training.documents import require_sources
from mqa_gpt.training.export import text_prompts
from mqa_gpt.training.model import given_sizes, model_config, require_sizes
from mqa_gpt.training.packing import require_tokens
from mqa_gpt.training.parallel import World, require_shared_batch
from mqa_gpt.training.samples import Samples
from mqa_gpt.training.tensor_parallel import require_equal_shares
from mqa_gpt.training.vocabulary import TokenizerConfig


def require_runnable(config: RunConfig, ranks: World, *, is_prepared: bool = False) -> None:
    """Check all that needs no documents.

    Args:
        is_prepared: whether the run's folder holds tokenizer and data, so that the sources are not
            needed any more.

    Raises:
        ConfigError: settings that contradict each other, the ranks, the tokenizer or what is on the
            disk; begins with the setting.
    """
    require_shared_batch(config.run, ranks)
    pretrained, backend = config.model.pretrained, config.model.backend
    if config.data.within_documents and backend not in ("auto", "sdpa"):
        raise ConfigError(
            f"model.backend is {shown(backend)}, but data.within_documents is true, which only "
            "sdpa can do: choose sdpa or auto"
        )
    try:
        select_attention(backend, ranks.device)
    except InputError as error:
        raise ConfigError(f"model.backend is {shown(backend)}: {error}") from None
    if ranks.tensor_mesh is not None:
        with naming("model.pretrained", pretrained):
            sizes = given_sizes(config)
        require_equal_shares(sizes, ranks.tensor_mesh.size())
        optimizer = config.optimizer
        if optimizer.name == "muon" and not optimizer.split_qkv and sizes.n_kv_head == 1:
            raise ConfigError(
                "optimizer.split_qkv is false, but tensor-parallel ranks hold queries, keys and "
                "values apart: set it to true, or leave --tensor-parallel out"
            )
    if is_prepared:
        return
    source = config.tokenizer.source or pretrained
    require_sources(config.data, has_tokenizer=source is not None)
    if source is None:
        require_sizes(config, config.tokenizer.vocab_size)
        return
    with naming("tokenizer.source" if config.tokenizer.source else "model.pretrained", source):
        tokenizer = Tokenizer.from_pretrained(source)
    with naming("model.pretrained", pretrained):
        sizes = model_config(config, tokenizer)
    require_tokenizer(config, tokenizer, sizes)


@contextmanager
def naming(key: str, value: str | None) -> Iterator[None]:
    """Have an error about a checkpoint begin with the setting that names the checkpoint."""
    try:
        yield
    except CheckpointError as error:
        raise ConfigError(f"{key} is {shown(value)}: {error}") from None


def require_tokenizer(config: RunConfig, tokenizer: Tokenizer, sizes: GPTConfig) -> None:
    """Check that a tokenizer has what a run's data and texts need.

    Args:
        sizes: of the run's model.

    Raises:
        ConfigError: it lacks control tokens, or a text to continue does not fit into the context.
    """
    run = config.run
    require_tokens(tokenizer, config.data.infilling)
    if run.holes and tokenizer.fim is None:
        raise ConfigError("run.holes is given, but the tokenizer has no fill-in-the-middle tokens")
    for name, ids in text_prompts(tokenizer, run):
        if not ids:
            raise ConfigError(f"{name} is empty: give a text to continue")
        if len(ids) + run.sample_tokens > sizes.n_positions:
            raise ConfigError(
                f"{name} has {len(ids):,} tokens, to which run.sample_tokens adds "
                f"{run.sample_tokens:,}: together they must fit into the context of "
                f"{sizes.n_positions:,}"
            )


def notes(config: RunConfig, training: Samples) -> list[str]:
    """What a run's settings ask for and its steps or data will not bring, a sentence each."""
    run, infilling, found = config.run, config.data.infilling, []
    warmup = config.schedule.warmup_steps
    if warmup >= run.steps:
        found.append(
            f"schedule.warmup_steps is {warmup:,} and run.steps is {run.steps:,}: the learning "
            "rate grows to the end of the run"
        )
    existing = config.tokenizer.source or config.model.pretrained
    if existing is not None and config.tokenizer.vocab_size != TokenizerConfig.vocab_size:
        found.append(
            f"tokenizer.vocab_size has no effect: the tokenizer is that of {existing}, and none is "
            "trained"
        )
    if run.sample_every and not run.prompts and not run.holes:
        found.append("run.sample_every has no effect without run.prompts or run.holes")
    epochs = -(-run.steps * run.batch_size // len(training))  # begun
    is_late = infilling.late_rate is not None and infilling.late_epoch > 0
    if is_late and infilling.late_epoch >= epochs:
        found.append(
            f"data.infilling.late_epoch is {infilling.late_epoch:,}, but the run has {epochs:,} "
            "epochs, counted from 0: late_rate has no effect"
        )
    rates = [infilling.rate_in(epoch) for epoch in range(min(epochs, infilling.late_epoch + 1))]
    if any(rates) and not training.can_infill():
        found.append(
            f"data.infilling.rate is {max(rates):g}, but no hole can be cut: the documents have "
            f"prompts, or data.length, {config.data.length:,}, leaves no room"
        )
    return found
