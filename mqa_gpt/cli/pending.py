"""What the library is about to offer, in one place until it does; then this file goes.

Each function becomes the plain call that its docstring names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import PromptError, shown
from mqa_gpt.generation.request import check_request
from mqa_gpt.sampling import SamplingParams
from mqa_gpt.tokenizer import Tokenizer

NEW = ("truncate", "min_new_tokens", "ignore_eos", "filename", "repository", "names", "per_prompt")


def call(method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """`method(*arguments, **options)`."""
    known = {*inspect.signature(method).parameters, *_known_options()}
    for name in NEW:
        value = options.get(name)
        is_used = any(value) if name == "per_prompt" and value else value and name != "names"
        if name not in known and not is_used:
            options.pop(name, None)
    return method(*arguments, **_sampling(options))


def check_options(
    config: GPTConfig,
    max_new_tokens: int | None,
    n: int,
    stop: str | Sequence[str] | None = None,
    min_new_tokens: int = 0,
    ignore_eos: bool = False,
    **sampling: Any,
) -> None:
    """`make_requests(config, [], max_new_tokens, SamplingParams(**sampling), n=n, stop=stop,
    min_new_tokens=min_new_tokens)`, and a check of `ignore_eos`."""
    texts: Any = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise PromptError(f"stop is {shown(stop)}: it must be a non-empty text or several")
    if not isinstance(ignore_eos, bool):
        raise PromptError(f"ignore_eos is {shown(ignore_eos)}: it must be true or false")
    check_request(
        config,
        [],
        1 if max_new_tokens is None else max_new_tokens,
        SamplingParams(**_sampling(sampling)),
        n,
    )


def same_vocabulary(one: Tokenizer, other: Tokenizer) -> bool:
    """`one.same_vocabulary(other)`."""
    compare = getattr(one, "same_vocabulary", None)
    return True if compare is None else compare(other)


def unknown_markers(tokenizer: Tokenizer, text: str) -> list[str]:
    """`tokenizer.unknown_markers(text)`."""
    find = getattr(tokenizer, "unknown_markers", None)
    return [] if find is None else find(text)


def min_tokens(tokenizer: Tokenizer, text: str) -> int:
    """`tokenizer.min_tokens(text)`."""
    bound = getattr(tokenizer, "min_tokens", None)
    return 0 if bound is None else bound(text)


def _known_options() -> set[str]:
    from mqa_gpt.generation.completion import Options

    return set(Options.__annotations__)


def _sampling(options: dict[str, Any]) -> dict[str, Any]:
    """Without filters that are off or have no effect, which `SamplingParams` will accept."""
    off: dict[str, Any] = {}
    if options.get("top_k") in (0, -1):
        off["top_k"] = None
    if options.get("temperature") == 0:
        off |= dict.fromkeys(("top_k", "top_p", "min_p"))
    return options | off
