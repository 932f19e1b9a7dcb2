"""From texts and options to requests."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypedDict

from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import PromptError, require_text, shown
from mqa_gpt.fim import check_mode, infill_prompt, truncated_infill_prompt
from mqa_gpt.generation.request import Request, all_problems, make_requests, stop_texts
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


def check_options(options: Mapping[str, Any]) -> None:
    """Raise TypeError for an unknown option."""
    for name in sorted(options.keys() - Options.__annotations__.keys()):
        raise TypeError(
            f"unknown option {shown(name)}: expected one of {', '.join(Options.__annotations__)}"
        )


def text_requests(
    config: GPTConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[str | tuple[str, str]],
    options: Mapping[str, Any],
    *,
    special_tokens: bool = True,
    mode: str = "psm",
    names: Sequence[str] | None = None,
    per_prompt: Sequence[Mapping[str, Any]] | None = None,
) -> list[Request]:
    """Requests for texts to continue, and for pairs (prefix, suffix) to infill.

    Args:
        options: by the names of `Options`, with max_new_tokens, n and truncate of `make_requests`.
        special_tokens: whether control tokens spelled out in a text act as such.
        mode: of infilling, "psm" or "spm".
        names: of the prompts in messages; "prompt 0", "prompt 1", ... if None.
        per_prompt: per-prompt options, which override the common ones.

    Raises:
        PromptError: an option or prompts that cannot be used, all of which it names.
        CheckpointError: a pair, where the tokenizer has no infilling tokens.
    """
    check_mode(mode)
    names = names or [f"prompt {i}" for i in range(len(prompts))]
    for what, others in (("names", names), ("per_prompt", per_prompt)):
        if others is not None and len(others) != len(prompts):
            raise PromptError(f"there are {len(others)} {what} for {len(prompts)} prompts")
    _option_requests(config, tokenizer, [], options)  # what concerns all of them is said once
    requests: list[Request] = []
    problems: dict[str, PromptError] = {}
    for i, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        own = {**options, **(per_prompt[i] if per_prompt else {})}
        try:
            if isinstance(prompt, tuple) and len(prompt) == 2:
                requests.append(
                    hole_request(config, tokenizer, *prompt, own, name=name, mode=mode)[0]
                )
                continue
            text = prompt
            if own.get("truncate") and isinstance(text, str):  # its end fills the context
                text = text[-config.n_positions * tokenizer.max_token_bytes :]
            else:
                _require_short(config, tokenizer, text=text)
            ids = tokenizer.encode(text, special_tokens=special_tokens)
            requests += _option_requests(config, tokenizer, [ids], own, names=[name])
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
    name: str = "prompt 0",
    **named: Any,
) -> tuple[Request, tuple[int, int]]:
    """The request to fill a hole, and the tokens of prefix and suffix that were cut off.

    Args:
        options: as in `text_requests`.
        name: the prompt's name in messages.
        named: mode, file_name and repo_name of `infill_prompt`.
    """
    _option_requests(config, tokenizer, [], options)  # before their numbers are used
    context, cut, count = config.n_positions, (0, 0), options["max_new_tokens"]
    room = context - (1 if count is None else int(count))
    if options["truncate"]:
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
    # A filling ends at any control token: it means that the middle is complete.
    own = {**options, "truncate": False}
    (request,) = _option_requests(
        config, tokenizer, [ids], own, end_ids=tokenizer.special_ids, names=[name]
    )
    return request, cut


def _require_short(config: GPTConfig, tokenizer: Tokenizer, **texts: str) -> None:
    """PromptError for a text that is too long for the context, before it is tokenized."""
    for name, text in texts.items():
        require_text(name, text)
        least, context = tokenizer.min_tokens(text), config.n_positions
        if least > context:
            raise PromptError(
                f"{name} has {len(text):,} characters, at least {least:,} tokens: they exceed the "
                f"context of {context:,} tokens; shorten it, or let truncate=True (--truncate) "
                "cut it"
            )


def _option_requests(
    config: GPTConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    options: Mapping[str, Any],
    *,
    end_ids: Collection[int] = (),
    names: Sequence[str] | None = None,
) -> list[Request]:
    """Requests for prompts of ids, which may be empty, with options as in `text_requests`.

    Args:
        end_ids: tokens that end a row, besides the checkpoint's end tokens.
    """
    options = dict(options)
    stops, ignore_eos = stop_texts(options.pop("stop", None)), options.pop("ignore_eos", False)
    if not isinstance(ignore_eos, bool):
        raise PromptError(f"ignore_eos is {shown(ignore_eos)}: it must be True or False")
    drafter = options.pop("draft", None)
    chosen = {f.name: options.pop(f.name) for f in fields(SamplingParams) if f.name in options}
    end_of_text = tokenizer.end_of_text_id
    start = [] if end_of_text is None else [end_of_text]
    ends = set() if ignore_eos else {*end_ids, *start, *config.end_token_ids}
    ends = {id_ for id_ in ends if 0 <= id_ < config.vocab_size}  # a config may name others
    # A control token leaves no text in which its name could be found.
    ends |= {id_ for text in stops if (id_ := tokenizer.control_id(text)) is not None}
    return make_requests(
        config,
        [ids or start for ids in prompts],
        sampling=SamplingParams(**chosen),
        end_ids=ends,
        stop=stops,
        drafter=drafter,
        names=names,
        **options,
    )
