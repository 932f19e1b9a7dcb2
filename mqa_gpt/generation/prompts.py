"""From texts and options to requests."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypedDict

from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import PromptError, require_text, shown
from mqa_gpt.fim import check_mode, infill_prompt, truncated_infill_prompt
from mqa_gpt.generation.request import Request, RequestOptions, all_problems
from mqa_gpt.generation.speculative import Drafter
from mqa_gpt.sampling import SamplingParams
from mqa_gpt.tokenizer import Tokenizer


class Options(TypedDict, total=False):
    """The options that every way of generating takes.

    The first six are those of `SamplingParams`. `stop` is a text or several, any of which ends a
    completion, as the control token of that name does too. A completion has at least
    `min_new_tokens`; with `ignore_eos` the model's end tokens do not end it. `logprobs` is how many
    log-probabilities to report per token besides the chosen token's own. `draft`
    proposes tokens for speculative decoding; the output stays the same (`PromptLookup`,
    `DraftModel`).
    """

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    seed: int | None
    stop: str | Sequence[str] | None
    min_new_tokens: int
    ignore_eos: bool
    logprobs: int | None
    draft: Drafter | None


def request_options(
    config: GPTConfig,
    tokenizer: Tokenizer | None,
    options: Mapping[str, Any],
    *,
    n: int = 1,
    truncate: bool = False,
    end_ids: Collection[int] = (),
) -> RequestOptions:
    """Options as texts are completed with them, all of them checked.

    Args:
        tokenizer: None only to check the options.
        options: by the names of `Options`, and `max_new_tokens`.
        n, truncate: see `RequestOptions`.
        end_ids: tokens that end a row, besides the checkpoint's end tokens.

    Raises:
        TypeError: an unknown option.
        PromptError: one that cannot be used.
    """
    options = dict(options)
    count = options.pop("max_new_tokens", 64)
    for name in sorted(options.keys() - Options.__annotations__.keys()):
        raise TypeError(
            f"unknown option {shown(name)}: expected one of {', '.join(Options.__annotations__)}"
        )
    stop, ignore_eos = options.pop("stop", None), options.pop("ignore_eos", False)
    stops = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, Sequence) or not all(isinstance(t, str) and t for t in stops):
        raise PromptError(f"stop is {shown(stop)}: it must be a non-empty string or a list of them")
    for text in stops:
        require_text("stop", text)
    if not isinstance(ignore_eos, bool):
        raise PromptError(f"ignore_eos is {shown(ignore_eos)}: it must be True or False")
    ends: set[int | None] = set() if ignore_eos else {*end_ids, *config.end_token_ids}
    if tokenizer is not None:
        ends |= set() if ignore_eos else {tokenizer.end_of_text_id}
        # A control token leaves no text in which its name could be found.
        ends |= {tokenizer.control_id(text) for text in stops}
    params = fields(SamplingParams)
    return RequestOptions(
        config,
        count,
        SamplingParams(**{f.name: options.pop(f.name) for f in params if f.name in options}),
        n=n,
        # Not all are in the vocabulary: a config may name any.
        end_ids={id_ for id_ in ends if id_ is not None and 0 <= id_ < config.vocab_size},
        stop=tuple(stops),
        drafter=options.pop("draft", None),
        truncate=truncate,
        **options,
    )


def text_requests(
    config: GPTConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[str | tuple[str, str]],
    options: Mapping[str, Any],
    *,
    n: int = 1,
    truncate: bool = False,
    special_tokens: bool = True,
    mode: str | None = None,
    names: Sequence[str] | None = None,
    per_prompt: Sequence[Mapping[str, Any]] | None = None,
) -> list[Request]:
    """Requests for texts to continue, and for pairs (prefix, suffix) to infill.

    Args:
        options, n, truncate: see `request_options`.
        special_tokens: whether control tokens spelled out in a text act as such.
        mode: of infilling, "psm" or "spm"; None refuses pairs.
        names: of the prompts in messages; "prompt 0", "prompt 1", ... if None.
        per_prompt: per-prompt options, which override the common ones.

    Raises:
        TypeError: an unknown option.
        PromptError: an option or prompts that cannot be used, all of which it names.
        CheckpointError: a pair, where the tokenizer has no infilling tokens.
    """
    common = request_options(config, tokenizer, options, n=n, truncate=truncate)
    if mode is not None:
        check_mode(mode)
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence):
        raise PromptError(
            f"prompts are {shown(prompts)}: expected a list of texts, or a text for LLM.generate"
        )
    names = names or [f"prompt {i}" for i in range(len(prompts))]
    for what, others in (("names", names), ("per_prompt", per_prompt)):
        if others is not None and len(others) != len(prompts):
            raise PromptError(f"there are {len(others)} {what} for {len(prompts)} prompts")
    start = [] if tokenizer.end_of_text_id is None else [tokenizer.end_of_text_id]
    requests: list[Request] = []
    problems: dict[str, PromptError] = {}
    for i, (name, text) in enumerate(zip(names, prompts, strict=True)):
        own, asked = options, common
        try:
            if per_prompt and per_prompt[i]:
                own = {**options, **per_prompt[i]}
                asked = request_options(config, tokenizer, own, n=n, truncate=truncate)
            if isinstance(text, tuple) and len(text) == 2:
                if mode is None:
                    raise PromptError(f"{name} is a pair: infill and generate_many take pairs")
                request, _ = hole_request(
                    config, tokenizer, *text, own, n=n, truncate=truncate, name=name, mode=mode
                )
            else:
                if truncate and isinstance(text, str):  # its end fills the context
                    text = text[-config.n_positions * tokenizer.max_token_bytes :]
                _require_short(config, tokenizer, text=text)
                ids = tokenizer.encode(text, special_tokens=special_tokens)
                request = asked.request(ids or start, name)
            requests.append(request)
        except PromptError as error:  # about the prompt, or about an option of its own
            is_named = str(error).startswith(name)
            problems[name] = error if is_named else PromptError(f"{name}: {error}")
    if problems:
        raise all_problems(problems)
    return requests


def hole_request(
    config: GPTConfig,
    tokenizer: Tokenizer,
    prefix: str,
    suffix: str,
    options: Mapping[str, Any],
    *,
    n: int = 1,
    truncate: bool = False,
    name: str = "prompt 0",
    **named: Any,
) -> tuple[Request, tuple[int, int]]:
    """The request to fill a hole, and the tokens of prefix and suffix that were cut off.

    Args:
        options, n, truncate: see `request_options`.
        name: the prompt's name in messages.
        named: mode, file_name and repo_name of `infill_prompt`.
    """
    # A filling ends at any control token: it means that the middle is complete.
    asked = request_options(config, tokenizer, options, n=n, end_ids=tokenizer.special_ids)
    context, cut, count = config.n_positions, (0, 0), asked.max_new_tokens
    room = context - (1 if count is None else count)
    if truncate:
        fitted = truncated_infill_prompt(tokenizer, prefix, suffix, room, **named)
        ids, cut = fitted.ids, (fitted.cut_prefix, fitted.cut_suffix)
    else:
        _require_short(config, tokenizer, prefix=prefix, suffix=suffix)
        ids = infill_prompt(tokenizer, prefix, suffix, **named)
        if 0 < room < len(ids):
            raise PromptError(
                f"prefix and suffix take {len(ids):,} tokens and max_new_tokens is "
                f"{context - room:,}: together they exceed the context of {context:,} tokens; "
                "truncate=True (--truncate) leaves out what is farthest from the hole"
            )
    return asked.request(ids, name), cut


def _require_short(config: GPTConfig, tokenizer: Tokenizer, **texts: str) -> None:
    """PromptError for a text that is too long for the context, before it is tokenized."""
    for name, text in texts.items():
        # A character is at least a byte; what is no text is refused by `encode`.
        size, context = len(text) if isinstance(text, str) else 0, config.n_positions
        if size > context and size > context * tokenizer.max_token_bytes:
            raise PromptError(
                f"{name} has {size:,} characters, at least {tokenizer.min_tokens(text):,} "
                f"tokens: they exceed the context of {context:,} tokens; shorten it, or "
                "let truncate=True (--truncate) cut it"
            )
