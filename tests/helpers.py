"""What several test files share: small random models and their transformers twins, for tests that
compare the two; a tokenizer of bytes; data that is not part of the repository."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, GPTBigCodeConfig, GPTBigCodeForCausalLM

from mqa_gpt import GPT, GPTConfig
from mqa_gpt.generation.batching import Engine, Token
from mqa_gpt.generation.loop import greedy_steps
from mqa_gpt.generation.request import RequestOptions
from mqa_gpt.sampling import GREEDY, SamplingParams

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Tensors = dict[str, Tensor]

SPECIALS = ("<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>")


def shared_data(name: str) -> Path:
    """A file or folder next to the repository, too large to be in it; skips the test without it."""
    path = Path(__file__).parents[2] / "shared" / "data" / name
    if not path.exists():
        pytest.skip(f"shared/data/{name}, which is not part of the repository, is not next to it")
    return path


def byte_tokenizer(*specials: str, pair: str = "") -> tokenizers.Tokenizer:
    """One token per byte after the special ones, and one more for a pair of letters if given.

    Every character beyond ASCII is spread over several tokens.
    """
    entries = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()), *([pair] if pair else [])]
    ids = {entry: id_ for id_, entry in enumerate(entries)}
    tokenizer = tokenizers.Tokenizer(models.BPE(ids, [(pair[0], pair[1])] if pair else []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(specials))
    return tokenizer


def tiny_config(**changes: object) -> GPTConfig:
    """A small config whose sizes are all different, so that a mixed-up pair of them shows.

    Attention is peaked and depends on position: at the usual initializer_range of 0.02 all scores
    are about zero, and a wrong scale or mask would hardly move the logits.
    """
    values: dict[str, object] = {
        "vocab_size": 97,
        "n_positions": 112,
        "n_embd": 60,
        "n_layer": 2,
        "n_head": 3,
        "n_inner": 136,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.4,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    return GPTConfig.from_dict(values | changes)


def reference_model(
    config: GPTConfig, seed: int = 0, *, attention: str = "eager"
) -> GPTBigCodeForCausalLM:
    """transformers' model for `config`, float32, in eval mode, every parameter random.

    That includes biases and LayerNorms, whose usual 0 and 1 would hide that one is left out.
    """
    torch.manual_seed(seed)
    reference = GPTBigCodeForCausalLM._from_config(
        GPTBigCodeConfig(**config.to_dict()), attn_implementation=attention
    )
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if parameter.ndim == 1:
                center = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
                parameter.normal_(center, 0.3)
    # No end token, no special cases: greedy is the largest logit and nothing else.
    reference.generation_config = GenerationConfig(pad_token_id=0)
    return reference.eval()


def our_model(reference: GPTBigCodeForCausalLM, config: GPTConfig, backend: str = "auto") -> GPT:
    """`GPT` with the reference's weights and dtype, in eval mode."""
    model = GPT(config, backend=backend).to(reference.dtype)
    model.load_state_dict(reference.state_dict())
    return model.eval()


def random_ids(config: GPTConfig, *shape: int, seed: int = 0) -> Tensor:
    """Token ids of the given shape, int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, shape, generator=generator)


def random_prompts(config: GPTConfig, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """One random prompt per length."""
    ids = random_ids(config, len(lengths), max(lengths), seed=seed).tolist()
    return [row[:n] for row, n in zip(ids, lengths, strict=True)]


def left_padded(prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """The batch as transformers wants it: padding in front, a mask, and positions that skip it."""
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding])
    return {
        "input_ids": torch.tensor(
            [[0] * n + list(prompt) for n, prompt in zip(padding, prompts, strict=True)]
        ),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }


@torch.no_grad()
def reference_greedy(
    reference: GPTBigCodeForCausalLM, prompts: Sequence[Sequence[int]], new_tokens: int
) -> tuple[Tensor, Tensor]:
    """transformers' `generate` on the left-padded batch: ids (B, N), logits (B, N, V)."""
    batch = left_padded(prompts)
    output = reference.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=new_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences[:, -new_tokens:], torch.stack(output.logits, dim=1)


def our_greedy(
    model: GPT, prompts: Sequence[Sequence[int]], new_tokens: int
) -> tuple[Tensor, Tensor]:
    """The same with our plain loop."""
    ids, logits = zip(*greedy_steps(model, prompts, new_tokens), strict=True)
    return torch.stack(ids, dim=1), torch.stack(logits, dim=1)


def tiny_model(backend: str = "auto", **changes: object) -> GPT:
    """Our model of `tiny_config(**changes)` with the weights of `reference_model`."""
    config = tiny_config(**changes)
    return our_model(reference_model(config), config, backend)


def engine_tokens(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    sampling: SamplingParams = GREEDY,
    *,
    slots: int | None = None,
    prefill_chunk: int | None = None,
    **options: Any,
) -> Iterator[Token]:
    """The tokens that the engine makes, in its order.

    Args:
        max_new_tokens: one number for all prompts, or one each.
        slots: rows that run at a time; None for all.
        options: of `RequestOptions`.
    """
    counts = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    requests = [
        RequestOptions(model.config, count, sampling, **options).request(prompt, f"prompt {i}")
        for i, (prompt, count) in enumerate(zip(prompts, counts, strict=True))
    ]
    engine = Engine.for_requests(model, requests, slots=slots, prefill_chunk=prefill_chunk)
    for request in requests:
        engine.add(request)
    while engine.is_busy:
        yield from engine.step()


def by_row(tokens: Iterable[Token]) -> dict[int, list[tuple[int, str | None]]]:
    """Each row's ids, and how it ended."""
    rows: dict[int, list[tuple[int, str | None]]] = {}
    for token in tokens:
        rows.setdefault(token.row, []).append((token.id, token.finished))
    return rows


@contextmanager
def shapes_fed(module: torch.nn.Module) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of the first argument that a module is called with, inside the block."""
    shapes: list[tuple[int, ...]] = []
    hook = module.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    try:
        yield shapes
    finally:
        hook.remove()


def error(ours: Tensor, reference: Tensor) -> float:
    """max |ours - reference|, computed in float64; NaN anywhere gives NaN."""
    return (ours.double() - reference.double()).abs().max().item()


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """`error` over the largest reference value."""
    return error(ours, reference) / reference.double().abs().max().item()


def write_checkpoint(folder: Path, tensors: Tensors, config: GPTConfig | dict[str, Any]) -> Path:
    """A checkpoint with one file of weights."""
    folder.mkdir(exist_ok=True)
    values = config.to_dict() if isinstance(config, GPTConfig) else config
    (folder / "config.json").write_text(json.dumps(values))
    contiguous = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def weights_of(reference: GPTBigCodeForCausalLM) -> Tensors:
    """What transformers writes: without the tied head."""
    tensors = dict(reference.state_dict())
    if reference.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def assert_same_weights(model: GPT, other: torch.nn.Module) -> None:
    mine, its = model.state_dict(), other.state_dict()
    assert mine.keys() == its.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == its[name].dtype, name
        assert torch.equal(tensor, its[name]), name
