"""Proof: a checkpoint in this implementation and in transformers, compared number by number.

Both get the same prompts. Ours generates greedily, all prompts in one ragged batch with a cache.
transformers (eager attention) then computes the logits of every position of our sequences, each
sequence alone and without a cache, and generates from each prompt by itself. So batching, cache
and decoding are on one side of the comparison only.

What must hold depends on the precision:

    float32     logits within 2e-5 of the largest; all tokens equal
    unscaled    float32 without `scale_attn_weights` is ill-conditioned: our logits may be twice as
                far from transformers in float64 as transformers in float32 is; all tokens equal
    16 bit      our logits may be twice as far from transformers in float32 as transformers in the
                same 16-bit type is; the first different token is reported, but does not fail
    8 bit       (`quantize`, `cache_dtype`) is an approximation: how far logits, loss and tokens are
                from those of the checkpoint itself is reported, and only NaN or infinity fails
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mqa_gpt.attention import acting_backend
from mqa_gpt.cache import KVCache
from mqa_gpt.checkpoints.headers import read_config
from mqa_gpt.checkpoints.hub import resolve
from mqa_gpt.checkpoints.load import load_model
from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import InputError, PromptError, is_int, shown
from mqa_gpt.fast.int8 import says_quantized
from mqa_gpt.fast.int8_cache import cache_class
from mqa_gpt.generation.loop import generate, greedy_steps
from mqa_gpt.generation.request import make_requests
from mqa_gpt.machine import INSTALL_PEERS, version
from mqa_gpt.model import GPT
from mqa_gpt.progress import status
from mqa_gpt.tokenizer import TOKENIZER_FILE, Tokenizer
from mqa_gpt.verify.report import Divergence, PromptReport, VerifyReport

FLOAT32_TOLERANCE = 2e-5

# The default prompts, of several lengths, since they run as one ragged batch.
CODE_PROMPTS = (
    "def print_hello_world():",
    'import os\n\n\ndef newest_file(folder):\n    """Return the path of the newest file."""\n',
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "for",
)
RANDOM_PROMPT_LENGTHS = (9, 33, 1, 20)  # where a checkpoint has no tokenizer


def verify(
    name_or_dir: str | PathLike[str],
    *,
    revision: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    backend: str = "auto",
    quantize: str | None = None,
    cache_dtype: str | None = None,
    prompts: Sequence[str] | Sequence[Sequence[int]] | None = None,
    max_new_tokens: int = 64,
) -> VerifyReport:
    """Compare a checkpoint with transformers' GPTBigCode; the module's docstring has the rules.

    The two models are in memory one after the other. A 16-bit reference is converted to float32 at
    the end, which takes twice the model's memory.

    Args:
        name_or_dir, revision, device, dtype, backend, quantize: see
            `mqa_gpt.checkpoints.load.load_model`; the reference is never quantized.
        cache_dtype: see `LLM.load`. With it, all our logits are computed token by token from the
            cache.
        prompts: texts or lists of token ids, whose loss is computed too; None takes a few pieces of
            code, or random ids where the checkpoint has no tokenizer.
        max_new_tokens: how many greedy tokens to compare per prompt; end tokens do not stop.

    Raises:
        InputError: transformers is missing, or is a version that cannot be the reference.
        CheckpointError, ConfigError, PromptError: see `load_model` and `generate`.
    """
    new_cache_class = cache_class(cache_dtype)
    approximate = quantize is not None or cache_dtype is not None
    transformers_version = require_transformers()
    folder = resolve(name_or_dir, revision)
    config = read_config(folder)
    if says_quantized(config):
        raise InputError(
            f"{folder} holds 8-bit weights, which transformers does not read: verify the "
            "checkpoint that they were made from, with quantize='int8' (--quantize int8)"
        )
    has_tokenizer = (folder / TOKENIZER_FILE).is_file()
    tokenizer = Tokenizer.from_pretrained(folder) if has_tokenizer else None
    rows = _token_ids(config, tokenizer, prompts, folder, max_new_tokens)
    max_new_tokens = int(max_new_tokens)  # NumPy's integers wrap around

    with status() as say:
        say("loading")
        model = load_model(folder, device=device, dtype=dtype, backend=backend, quantize=quantize)
        model.cache_class = new_cache_class
        model_dtype, model_device = model.dtype, model.device
        say("computing")
        new_ids, logits, as_users_get = _ours(model, rows, max_new_tokens)
        del model

        # The last token is only compared; nothing is computed from it.
        sequences = [row + new[:-1] for row, new in zip(rows, new_ids, strict=True)]
        exact_dtype = _exact_dtype(config, model_dtype)
        with quiet_transformers():
            say("loading in transformers")
            reference, source = _load_reference(folder, config, model_dtype)
            reference.to(model_device)
            say("computing in transformers")
            expected = _reference_logits(reference, sequences)
            greedy = [_reference_greedy(reference, row, max_new_tokens) for row in rows]
            exact: list[Tensor] | None = None
            if exact_dtype is not None:  # the same rounded weights in higher precision
                say(f"computing in transformers in {str(exact_dtype).removeprefix('torch.')}")
                # transformers' eager softmax is float32 even in float64; its sdpa's is not.
                reference.set_attn_implementation(
                    "sdpa" if exact_dtype == torch.float64 else "eager"
                )
                exact = _reference_logits(reference.to(exact_dtype), sequences)
        del reference

    nearest = exact or expected
    limit: float | None
    if exact is None or approximate:
        rule = "max |ours - transformers| over max |transformers|"
        largest = max(e.abs().max().item() for e in nearest)
        # A model whose logits are all 0 has no scale.
        error = _largest_difference(logits, nearest) / (largest or 1.0)
        limit = None if approximate else FLOAT32_TOLERANCE
    else:
        name = str(exact_dtype).removeprefix("torch.")
        rule = f"distance from transformers in {name}; the limit is twice its own in this dtype"
        error = _largest_difference(logits, exact)
        limit = 2 * _largest_difference(expected, exact)
    return VerifyReport(
        model=str(name_or_dir),
        dtype=str(model_dtype).removeprefix("torch."),
        device=str(model_device),
        backend=acting_backend(backend, model_device, model_dtype, config.head_dim),
        asked_backend=backend,
        quantize=quantize,
        cache_dtype=cache_dtype,
        reference=f"transformers {transformers_version}, eager; {source}",
        rule=rule,
        logits_error=error,
        logits_limit=limit,
        loss=_loss(rows, logits),
        reference_loss=_loss(rows, nearest),
        tokens_must_be_equal=not approximate and model_dtype in (torch.float32, torch.float64),
        prompts=[
            _compare(tokenizer, *parts)
            for parts in zip(rows, as_users_get, greedy, logits, nearest, strict=True)
        ],
    )


def require_transformers() -> str:
    """The installed version of transformers.

    Raises:
        InputError: there is none, or it is too old, or one that computes wrong logits.
    """
    found = version("transformers")
    if found is None:
        raise InputError(
            "verifying compares with transformers, which is not installed: "
            f"run {INSTALL_PEERS} in the checkout"
        )
    numbers = tuple(int(n) for n in re.findall(r"\d+", found)[:3])
    if (4, 54, 0) <= numbers <= (4, 55, 0):
        raise InputError(
            f"transformers {found} cannot be the reference: 4.54.0 to 4.55.0 multiply attention "
            "scores by the root of the head dim instead of dividing by it; "
            f"run {INSTALL_PEERS} in the checkout"
        )
    if numbers < (5,):
        raise InputError(
            f"transformers {found} is too old to be the reference: "
            f"run {INSTALL_PEERS} in the checkout"
        )
    return found


def _token_ids(
    config: GPTConfig,
    tokenizer: Tokenizer | None,
    prompts: Sequence[str] | Sequence[Sequence[int]] | None,
    folder: Path,
    max_new_tokens: int,
) -> list[list[int]]:
    """The prompts as ids; the default ones are cut to fit the context."""
    if not is_int(max_new_tokens) or max_new_tokens < 1:
        raise PromptError(
            f"max_new_tokens is {shown(max_new_tokens)}: it must be an integer above 0"
        )
    rows: list[Any]
    if prompts is not None:
        if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Iterable):
            raise PromptError(f"prompts is {shown(prompts)}: give a list of texts or of token ids")
        rows = list(prompts)
        if any(isinstance(row, str) for row in rows):
            tokenizer = tokenizer or Tokenizer.from_pretrained(folder)  # its error names the file
            rows = [tokenizer.encode(row) if isinstance(row, str) else row for row in rows]
        if not rows:
            raise PromptError("prompts is empty: give at least one prompt, or None")
    else:
        if tokenizer is not None:
            rows = [tokenizer.encode(text) for text in CODE_PROMPTS]
        else:
            generator = torch.Generator().manual_seed(0)
            rows = [
                torch.randint(config.vocab_size, (length,), generator=generator).tolist()
                for length in RANDOM_PROMPT_LENGTHS
            ]
        rows = [row[: max(1, config.n_positions - max_new_tokens)] for row in rows]
    return [list(request.prompt) for request in make_requests(config, rows, max_new_tokens)]


@torch.inference_mode()
def _ours(
    model: GPT, rows: list[list[int]], max_new_tokens: int
) -> tuple[list[list[int]], list[Tensor], list[list[int]]]:
    """Our new tokens, per row the logits of each position as (positions, V) on the CPU, and the new
    tokens as users get them.

    Logits within the prompt are those of a plain forward pass. From the prompt's last position on,
    they are what the tokens were chosen by: on a CPU those of the compiled forward pass.
    """
    within = [_within(model, row).cpu() for row in rows]
    ids, logits = zip(*greedy_steps(model, rows, max_new_tokens), strict=True)
    new_ids = torch.stack(ids, dim=1).tolist()
    chosen_by = torch.stack(logits, dim=1).cpu()  # (B, N, V)
    as_users_get = generate(model, rows, max_new_tokens)
    rows_of_logits = [torch.cat(parts) for parts in zip(within, chosen_by, strict=True)]
    return new_ids, rows_of_logits, as_users_get


def _within(model: GPT, row: list[int]) -> Tensor:
    """Logits (positions, V) of a prompt's tokens except the last."""
    ids = torch.tensor([row], device=model.device)
    if model.cache_class is KVCache:
        return model(ids)[0, :-1]
    cache = model.new_cache(1, len(row))  # token by token, so that attention reads it
    steps = [model(ids[:, i : i + 1], cache=cache)[0] for i in range(len(row))]
    return torch.cat(steps)[:-1]


def _exact_dtype(config: GPTConfig, dtype: torch.dtype) -> torch.dtype | None:
    """The dtype that both sides' errors are measured from; None to measure one from the other."""
    if dtype in (torch.bfloat16, torch.float16):
        return torch.float32
    return None if config.scale_attn_weights or dtype == torch.float64 else torch.float64


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, and no notes about a checkpoint that our own reader has checked."""
    logging: Any = import_module("transformers.utils.logging")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _load_reference(folder: Path, config: GPTConfig, dtype: torch.dtype) -> tuple[Any, str]:
    """transformers' model on the CPU, and how it got its weights.

    The proof is strongest where transformers reads the weights itself. It cannot read some old
    layouts (such as original SantaCoder's), and then gets them from our reader. The config is ours
    in either case: its sizes and switches without the other keys, which can make transformers
    quantize, import code or fail.
    """
    transformers: Any = import_module("transformers")
    from_pretrained = partial(
        transformers.GPTBigCodeForCausalLM.from_pretrained,
        config=transformers.GPTBigCodeConfig(
            **{key: value for key, value in dataclasses.asdict(config).items() if key != "extra"}
        ),
        dtype=dtype,
        attn_implementation="eager",
        use_safetensors=True,
        local_files_only=True,
    )
    try:
        reference, info = from_pretrained(folder, output_loading_info=True)
        unused = {
            name
            for name in info["unexpected_keys"]
            if not name.endswith((".attn.bias", ".attn.masked_bias"))
        }
        is_complete = not (unused or info["missing_keys"] or info["mismatched_keys"])
    except Exception:  # whatever it raises, it cannot read the folder
        is_complete = False
    if is_complete:
        source = "it read the checkpoint itself"
    else:
        weights = load_model(folder, dtype=dtype, device="cpu").state_dict()
        reference = from_pretrained(None, state_dict=weights)
        source = "it cannot read this layout, so mqa_gpt's reader gave it the weights"
    # Greedy is the largest logit and nothing else, whatever generation_config.json asks for.
    reference.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return reference.eval(), source


@torch.inference_mode()
def _reference_logits(reference: Any, sequences: list[list[int]]) -> list[Tensor]:
    """Per sequence (positions, V), CPU."""
    return [
        reference(torch.tensor([ids], device=reference.device), use_cache=False).logits[0].cpu()
        for ids in sequences
    ]


@torch.inference_mode()
def _reference_greedy(reference: Any, row: list[int], count: int) -> tuple[list[int], list[float]]:
    """transformers' greedy tokens, and by how much each logit exceeded the second largest."""
    ids = torch.tensor([row], device=reference.device)
    output = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),  # otherwise id 0 in a prompt counts as padding
        max_new_tokens=count,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    first, second = torch.cat(output.logits).double().topk(2).values.unbind(-1)  # (N,) each
    return output.sequences[0, len(row) :].tolist(), (first - second).tolist()


def _compare(
    tokenizer: Tokenizer | None,
    row: list[int],
    ours: list[int],
    reference: tuple[list[int], list[float]],
    logits: Tensor,
    expected: Tensor,
) -> PromptReport:
    theirs, margins = reference
    pairs = list(zip(ours, theirs, strict=True))
    equal = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))

    def text(*ids: int) -> str | None:
        return None if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=False)

    divergence = None
    if equal < len(pairs):
        a, b = pairs[equal]
        divergence = Divergence(equal, a, b, text(a), text(b), margins[equal])
    absolute = (logits.double() - expected.double()).abs().amax(-1)  # (positions,)
    scale = expected.double().abs().amax(-1)  # (positions,)
    relative = absolute / torch.where(scale == 0, 1.0, scale)
    return PromptReport(
        name=text(*row) or " ".join(map(str, row)),
        prompt_tokens=len(row),
        new_tokens=len(ours),
        equal_tokens=equal,
        divergence=divergence,
        absolute_error=absolute.tolist(),
        relative_error=relative.tolist(),
    )


def _loss(rows: list[list[int]], logits: list[Tensor]) -> float | None:
    """Mean cross-entropy of the prompts' tokens after the first, in nats; None without any."""
    losses = [
        F.cross_entropy(of_row[: len(row) - 1].double(), torch.tensor(row[1:]), reduction="sum")
        for row, of_row in zip(rows, logits, strict=True)
        if len(row) > 1
    ]
    count = sum(len(row) - 1 for row in rows)
    return torch.stack(losses).sum().item() / count if count else None


def _largest_difference(a: list[Tensor], b: list[Tensor]) -> float:
    """max |a - b| over all of the tensors; NaN anywhere gives NaN."""
    pairs = zip(a, b, strict=True)
    return torch.stack([(x.double() - y.double()).abs().max() for x, y in pairs]).max().item()
