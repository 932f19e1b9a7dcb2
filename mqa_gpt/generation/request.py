"""Request: a prompt and its generation options, which are checked once, where they are made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import PromptError, Range, in_ranges, is_int, shown
from mqa_gpt.generation.speculative import Drafter, check_drafter
from mqa_gpt.sampling import GREEDY, SamplingParams

# A prompt's samples are held until the last of them is finished, with 64 tokens some 8 kB each:
# this many take most of a gigabyte. Estimates of pass@k need far fewer.
MAX_SAMPLES = 100_000

COUNTS = {
    "max_new_tokens": Range(0, optional=True),
    "n": Range(1, MAX_SAMPLES),
    "min_new_tokens": Range(0),
}


@dataclass(frozen=True, eq=False)  # equal only to itself: its samples share one prefill
class Request:
    """One prompt and how to continue it; `RequestOptions` makes valid ones.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: at most this many; with the prompt they fit into the context.
        sampling: how each token is chosen; its seed is apart, because rows of any seeds choose
            their tokens together.
        n: samples of the prompt, each a row of its own.
        end_ids: tokens that end a row.
        stop: texts that end a row; the engine, which sees no text, leaves them to its caller.
        min_new_tokens: `end_ids` are suppressed until a row has this many, and `stop` texts that
            begin among them do not count.
        logprobs: None, or how many of the likeliest tokens to report with the chosen one.
        drafter: proposes tokens for speculative decoding; the output stays the same.
        name: the prompt's name in messages.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingParams = GREEDY
    n: int = 1
    end_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    min_new_tokens: int = 0
    logprobs: int | None = None
    drafter: Drafter | None = None
    seed: int | None = None
    name: str = "prompt 0"


class RequestOptions:
    """What is asked of any prompt: the fields of a `Request` apart from prompt and name, checked.

    Args:
        config: of the model that will run the requests.
        max_new_tokens: None for as many as fit into the context after each prompt.
        truncate: cut the beginning of a prompt that leaves no room for `max_new_tokens`, instead
            of raising.

    Raises:
        PromptError: an option that cannot be used.
    """

    def __init__(
        self,
        config: GPTConfig,
        max_new_tokens: int | None = 64,
        sampling: SamplingParams = GREEDY,
        *,
        n: int = 1,
        end_ids: Iterable[int] = (),
        stop: str | Sequence[str] = (),
        min_new_tokens: int = 0,
        logprobs: int | None = None,
        drafter: Drafter | None = None,
        truncate: bool = False,
    ) -> None:
        if not isinstance(sampling, SamplingParams):
            raise PromptError(f"sampling is {shown(sampling)}: expected SamplingParams")
        given = {"max_new_tokens": max_new_tokens, "n": n, "min_new_tokens": min_new_tokens}
        ranges = COUNTS | {"logprobs": Range(0, config.vocab_size, optional=True)}
        counts = in_ranges(PromptError, given | {"logprobs": logprobs}, ranges)
        max_new_tokens, n, min_new_tokens, logprobs = counts.values()
        if n > 1 and sampling.greedy:
            raise PromptError(
                f"n is {n} but temperature is 0, which gives the same tokens {n} times: "
                "set a temperature above 0 or leave n at 1"
            )
        if max_new_tokens is not None and min_new_tokens > max_new_tokens:
            raise PromptError(
                f"min_new_tokens is {min_new_tokens} and max_new_tokens is {max_new_tokens}: the "
                "first must not exceed the second"
            )
        if drafter is not None:
            check_drafter(drafter, config)
        ends = frozenset(end_ids)
        if min_new_tokens and len(ends) == config.vocab_size:
            raise PromptError("all tokens are end tokens: leave min_new_tokens at 0")
        self.max_new_tokens, self.truncate = max_new_tokens, truncate
        self._config = config
        seed = sampling.seed
        if seed is not None:
            sampling = replace(sampling, seed=None)
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        self._same = (sampling, n, ends, stops, min_new_tokens, logprobs, drafter, seed)

    def request(self, prompt: Any, name: str) -> Request:
        """The request for one prompt.

        Args:
            prompt: token ids; without any it starts from `bos_token_id`.
            name: the prompt's name in messages.

        Raises:
            PromptError: they are no token ids, or do not fit into the context.
        """
        if isinstance(prompt, (str, bytes)) or not isinstance(prompt, Sequence):
            raise PromptError(
                f"{name} is a {type(prompt).__name__}: it must be a list of token ids "
                "(LLM.generate takes text)"
            )
        config, wanted = self._config, self.max_new_tokens
        if not prompt and config.bos_token_id is None:
            raise PromptError(f"{name} is empty and the config has no bos_token_id")
        ids: tuple[Any, ...] = tuple(prompt) or (config.bos_token_id,)
        for token in ids:
            if not (type(token) is int or is_int(token)) or not 0 <= token < config.vocab_size:
                raise PromptError(
                    f"{name} holds {shown(token)}: token ids are integers from 0 to "
                    f"{config.vocab_size - 1}"
                )
        # One new token at least must have room where their number is open.
        room = config.n_positions - (1 if wanted is None else wanted)
        if self.truncate and 1 <= room < len(ids):
            ids = ids[-room:]
        if len(ids) > room:
            new = "no new token fits" if wanted is None else f"{wanted:,} are wanted"
            raise PromptError(
                f"{name} has {len(ids):,} tokens and {new}: together they exceed the context of "
                f"{config.n_positions:,} tokens; shorten the prompt or ask for fewer"
            )
        most = config.n_positions - len(ids) if wanted is None else wanted
        request = Request(tuple(map(int, ids)), most, *self._same, name)
        if request.min_new_tokens > most:
            raise PromptError(
                f"{name} leaves room for {most} of min_new_tokens {request.min_new_tokens}"
            )
        return request


def make_requests(
    config: GPTConfig,
    prompts: Sequence[Sequence[int]] | Tensor,
    max_new_tokens: int | None = 64,
    sampling: SamplingParams = GREEDY,
    **options: Any,
) -> list[Request]:
    """One request per prompt, all with the same options. The model is not run.

    Args:
        prompts: token ids, rows of any lengths; an empty row starts from `bos_token_id`.
        options: the others of `RequestOptions`.

    Raises:
        PromptError: an unusable option, or unusable prompts, all of which it names.
    """
    asked = RequestOptions(config, max_new_tokens, sampling, **options)
    if isinstance(prompts, Tensor):
        is_plain = prompts.layout == torch.strided and not prompts.is_meta
        if not is_plain or prompts.ndim != 2 or prompts.is_floating_point():
            raise PromptError(
                f"prompts are a tensor {shown(list(prompts.shape))} of {prompts.dtype} "
                f"({prompts.layout}, on {prompts.device}): it must be a dense (B, T) tensor of ids"
            )
        prompts = prompts.tolist()
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
        raise PromptError(
            f"prompts are {shown(prompts)}: they must be a list of lists of token ids "
            "(LLM.generate takes text)"
        )
    requests: list[Request] = []
    problems: dict[str, PromptError] = {}
    for i, prompt in enumerate(prompts):
        try:
            requests.append(asked.request(prompt, f"prompt {i}"))
        except PromptError as error:
            problems[f"prompt {i}"] = error
    if problems:
        raise all_problems(problems)
    return requests


def all_problems(problems: dict[str, PromptError]) -> PromptError:
    """One error for the prompts that cannot be used: the first in full, the others by name."""
    first, *others = problems
    some = ", ".join(others[:10]) + ", ..." * (len(others) > 10)
    more = f" ({len(others):,} more cannot be used: {some})" if others else ""
    return PromptError(f"{problems[first]}{more}")
