"""Generation from token ids: what is asked for, whether it can be, and which loop does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from torch import Tensor

from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import PromptError, is_int, shown
from mqa_gpt.generation.decode import Token, stream_plain
from mqa_gpt.generation.decode_graph import can_replay, stream_replayed
from mqa_gpt.generation.speculative import Drafter, check_draft, stream_drafted
from mqa_gpt.model import GPT
from mqa_gpt.sampling import GREEDY, SamplingParams

# A prompt's samples are held until the last of them is finished, with 64 tokens some 8 kB each:
# this many take most of a gigabyte, and what estimates of pass@k ask for is far below.
MAX_SAMPLES = 100_000


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]] | Tensor,
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    n: int = 1,
    eos_token_id: int | Sequence[int] | None = None,
    draft: Drafter | None = None,
    prefill_chunk: int | None = None,
) -> list[list[int]]:
    """Continue each prompt; greedy unless a temperature is given.

    Args:
        model: in eval mode, or dropout stays active.
        prompts: token ids, rows of any lengths; an empty row starts from `bos_token_id`.
        max_new_tokens: at most this many per row.
        temperature, top_k, top_p, min_p, repetition_penalty, seed: see `SamplingParams`.
        n: samples per prompt, all from one prefill of it; at most `MAX_SAMPLES`.
        eos_token_id: the token or tokens that end a row; None never stops early.
        draft: what guesses ahead so that the same tokens take fewer steps
            (`mqa_gpt.generation.speculative`).
        prefill_chunk: positions per row and forward pass while the prompts are read; None for what
            is fast on the model's device. A small number helps where the activations of a large
            batch of long prompts do not fit into memory.

    Returns:
        The new tokens of each row, the end token included where there is one; prompt i's sample j
        is row i * n + j.

    Raises:
        PromptError: a token outside the vocabulary, a prompt that leaves no room for
            `max_new_tokens` in the context, or an unusable option.
        FloatingPointError: a row's largest logit is NaN or infinite.
    """
    sampling = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    ends = () if eos_token_id is None else eos_token_id
    ends = ends if isinstance(ends, Sequence) else (ends,)
    if not all(is_int(token) for token in ends):
        raise PromptError(
            f"eos_token_id is {shown(eos_token_id)}: it must be a token id, a list of them or None"
        )
    if prefill_chunk is not None and (not is_int(prefill_chunk) or prefill_chunk < 1):
        raise PromptError(
            f"prefill_chunk is {shown(prefill_chunk)}: it must be an integer of at least 1, or None"
        )
    prompts = check_request(model.config, prompts, max_new_tokens, sampling, n)
    check_draft(draft, model.config)
    rows: list[list[int]] = [[] for _ in range(len(prompts) * n)]
    stream = stream_tokens if draft is None else partial(stream_drafted, draft=draft)
    for token in stream(
        model,
        prompts,
        max_new_tokens,
        sampling=sampling,
        n=n,
        should_stop=lambda token: token.id in ends,
        prefill_chunk=prefill_chunk,
    ):
        rows[token.row].append(token.id)
    return rows


def check_request(
    config: GPTConfig,
    prompts: Sequence[Sequence[int]] | Tensor,
    max_new_tokens: int,
    sampling: SamplingParams = GREEDY,
    n: int = 1,
    logprobs: int | None = None,
    names: Sequence[str] | None = None,
) -> list[list[int]]:
    """The prompts as lists, empty ones replaced by the start token, or PromptError.

    Arguments are those of `generate` and `stream_tokens`, and what messages call each prompt if
    not "prompt 0", "prompt 1", ...; all that can be wrong with them beyond `SamplingParams` is
    found here, before anything is computed.
    """
    if not is_int(max_new_tokens) or max_new_tokens < 0:
        raise PromptError(
            f"max_new_tokens is {max_new_tokens!r}: it must be an integer of at least 0"
        )
    if not is_int(n) or n < 1:
        raise PromptError(f"n is {n!r}: it must be an integer of at least 1")
    if n > MAX_SAMPLES:
        raise PromptError(
            f"n is {n:,}: a prompt gets at most {MAX_SAMPLES:,} samples; give it several times, "
            "with another seed each"
        )
    if n > 1 and sampling.greedy:
        raise PromptError(
            f"n is {n} but temperature is 0, which gives the same tokens {n} times: "
            "set a temperature above 0 or leave n at 1"
        )
    if logprobs is not None and not (is_int(logprobs) and 0 <= logprobs <= config.vocab_size):
        raise PromptError(
            f"logprobs is {logprobs!r}: it must be an integer from 0 to the vocabulary's "
            f"{config.vocab_size}"
        )
    if isinstance(prompts, Tensor):
        prompts = prompts.tolist()
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
        raise PromptError(
            f"prompts are {shown(prompts)}: they must be a list of lists of token ids "
            "(LLM.generate takes text)"
        )
    names = names or [f"prompt {i}" for i in range(len(prompts))]
    rows: list[list[int]] = []
    problems: dict[str, PromptError] = {}
    for name, prompt in zip(names, prompts, strict=True):
        try:
            rows.append(_check_prompt(config, prompt, max_new_tokens, name))
        except PromptError as error:
            problems[name] = error
    if problems:
        first, *others = problems
        some = ", ".join(others[:10]) + ", ..." * (len(others) > 10)
        more = f" ({len(others):,} more cannot be used: {some})" if others else ""
        raise PromptError(f"{problems[first]}{more}")
    return rows


def _check_prompt(
    config: GPTConfig, prompt: Sequence[int], max_new_tokens: int, name: str
) -> list[int]:
    """One prompt as a list, the start token if it is empty, or PromptError."""
    if isinstance(prompt, (str, bytes)) or not isinstance(prompt, Sequence):
        raise PromptError(
            f"{name} is a {type(prompt).__name__}: it must be a list of token ids "
            "(LLM.generate takes text)"
        )
    row = list(prompt)
    if not row:
        if config.bos_token_id is None:
            raise PromptError(f"{name} is empty and the config has no bos_token_id")
        row = [config.bos_token_id]
    for token in row:
        if not is_int(token) or not 0 <= token < config.vocab_size:
            raise PromptError(
                f"{name} holds {shown(token)}: token ids are integers from 0 to "
                f"{config.vocab_size - 1}"
            )
    if len(row) + max_new_tokens > config.n_positions:
        raise PromptError(
            f"{name} has {len(row)} tokens and max_new_tokens is {max_new_tokens}: "
            f"together they exceed the context of {config.n_positions} tokens; "
            "shorten the prompt or ask for fewer"
        )
    return row


def stream_tokens(
    model: GPT,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: SamplingParams = GREEDY,
    *,
    n: int = 1,
    should_stop: Callable[[Token], bool] = lambda token: False,
    logprobs: int | None = None,
    prefill_chunk: int | None = None,
) -> Iterator[Token]:
    """The tokens behind `generate`, step by step: `stream_replayed` where it can, else
    `stream_plain`.

    The steps are made of the model's modules, hooks and attention of the beginning: replace them
    between two streams, not within one.

    Args:
        prompts: what `check_request` made of them; nothing is checked here.
        should_stop: called once with each new token; True ends its row.
        logprobs: None for no log-probabilities, else how many of the most likely tokens to report
            beside the chosen one.

    Everything else is as in `generate`.
    """
    stream = stream_replayed if can_replay(model) else stream_plain
    return stream(
        model,
        prompts,
        max_new_tokens,
        sampling,
        n=n,
        should_stop=should_stop,
        logprobs=logprobs,
        prefill_chunk=prefill_chunk,
    )
