"""collect: what the explorer shows of one text, as plain values that JSON can hold.

The text is written first, which is timed, with all that makes generation fast. Then prompt and new
tokens are read once more, in one recorded pass: its attention, residual streams and logits are what
is shown. In float32 they are those of the generation up to rounding.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from typing import Any, Unpack

import torch
from torch import Tensor

from mqa_gpt.cache import cache_bytes
from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import InputError, PromptError, require_int
from mqa_gpt.fast.int8 import is_quantized
from mqa_gpt.fast.int8_cache import Int8KVCache
from mqa_gpt.generation.batching import EnginePool
from mqa_gpt.generation.completion import Completion, Generation, Stats
from mqa_gpt.generation.prompts import Options, hole_request, text_requests
from mqa_gpt.generation.request import Request
from mqa_gpt.generation.score import token_logprobs
from mqa_gpt.llm import LLM
from mqa_gpt.model import GPT
from mqa_gpt.research import record
from mqa_gpt.research.heads import PROBS, regions
from mqa_gpt.research.lens import as_row, layer_logits
from mqa_gpt.tokenizer import Tokenizer

ALTERNATIVES = 8  # likeliest next tokens that are shown at each position
MOST_ATTENTION = 24_000_000  # bytes, one for each pair of tokens and head; base64 adds a third


def collect(
    llm: LLM,
    prompt: str | None = None,
    *,
    infill: tuple[str, str] | None = None,
    mode: str = "psm",
    max_new_tokens: int = 32,
    special_tokens: bool = True,
    layer: int = 0,
    head: int = 0,
    name: str = "",
    **options: Unpack[Options],
) -> dict[str, Any]:
    """Continue a prompt or fill a hole, and look inside.

    Args:
        prompt: a text to continue; or else
        infill: the texts before and after a hole to fill, in the order of `mode`, as `LLM.infill`.
        max_new_tokens: at most this many, at least 1.
        special_tokens: as in `LLM.generate`.
        layer, head: whose attention is shown first.
        name: what the page calls the model.
        options: see `mqa_gpt.Options`.

    Returns:
        With T = prompt and new tokens, position i telling what is known once token i is read:

        - `ids`, `parts` (T,): the tokens, and where each is from: "prompt", "prefix", "suffix",
          "control" or "new"; `texts`: by id, with the bytes of cut characters as `\\xf0`.
        - `logprobs`, `ranks` (T,): natural log of each token's probability at temperature 1, and
          its place among all, 1 for the likeliest; None for the first.
        - `next`: `ids` and `probabilities` (T, 8) of the likeliest next tokens.
        - `lens`: `ids` and `probabilities` (L + 1, T): the likeliest next token if the model ended
          after the embedding (entry 0) or layer i (entry i + 1).
        - `attention`: base64 of (L, H, T (T + 1) / 2) unsigned bytes, 255 times the probabilities,
          each query's row up to itself.
        - `cache`: dtype, and bytes per token with one K/V head (`mqa`) and one per query head
          (`mha`); `seconds` of prefill and decode; `model`, `mode`, `prompt_tokens`,
          `finish_reason`, `selected`.

    Raises:
        PromptError: an empty or unusable text, or an unusable option.
        InputError: a layer or head that the model does not have, or more attention than fits in a
            page.
    """
    config = llm.model.config
    layer = require_int(InputError, "layer", layer, 0, config.n_layer - 1)
    head = require_int(InputError, "head", head, 0, config.n_head - 1)
    require_int(PromptError, "max_new_tokens", max_new_tokens, 1)
    wanted = {**options, "max_new_tokens": max_new_tokens}
    request = _request(llm, prompt, infill, mode, special_tokens, wanted)
    _require_small(config, len(request.prompt) + request.max_new_tokens)
    completion, stats = _generate(llm, request)
    ids = [*request.prompt, *completion.token_ids]
    found = _read(llm.model, ids)
    used = {*ids, *chain(*found["next"]["ids"], *found["lens"]["ids"])}
    decode_seconds = stats.total_seconds - (stats.first_token_seconds or 0.0)
    return {
        "model": _facts(llm, name),
        "mode": "prompt" if infill is None else mode,
        "prompt_tokens": len(request.prompt),
        "finish_reason": completion.finish_reason,
        "ids": ids,
        "parts": _parts(llm.tokenizer, request.prompt, infill)
        + ["new"] * len(completion.token_ids),
        **found,
        "texts": {str(id_): token_text(llm.tokenizer, id_) for id_ in sorted(used)},
        "cache": _cache(llm.model),
        "seconds": {"prefill": stats.first_token_seconds, "decode": decode_seconds},
        "selected": {"layer": layer, "head": head},
    }


def _request(
    llm: LLM,
    prompt: str | None,
    infill: tuple[str, str] | None,
    mode: str,
    special_tokens: bool,
    options: Mapping[str, Any],
) -> Request:
    config, tokenizer = llm.model.config, llm.tokenizer
    if (prompt is None) == (infill is None):
        raise PromptError("give a prompt, or infill=(prefix, suffix): one of the two")
    if prompt == "" or infill == ("", ""):
        raise PromptError("the text is empty: there is nothing to explore")
    if infill is not None:
        return hole_request(config, tokenizer, *infill, options, mode=mode)[0]
    assert prompt is not None
    return text_requests(config, tokenizer, [prompt], options, special_tokens=special_tokens)[0]


def _require_small(config: GPTConfig, T: int) -> None:
    """InputError if the attention of T tokens is more than a page should hold."""
    heads = config.n_layer * config.n_head
    if heads * T * (T + 1) // 2 > MOST_ATTENTION:
        most = (math.isqrt(1 + 8 * (MOST_ATTENTION // heads)) - 1) // 2
        raise InputError(
            f"prompt and new tokens are up to {T:,}: a page for {heads:,} heads holds the "
            f"attention of {most:,}; shorten the text or lower max_new_tokens"
        )


def _generate(llm: LLM, request: Request) -> tuple[Completion, Stats]:
    """Write the text twice; the first time compiles, allocates and records CUDA graphs."""
    pool = EnginePool()
    Generation(llm.model, llm.tokenizer, [request], pool=pool).run()
    generation = Generation(llm.model, llm.tokenizer, [request], pool=pool)
    (completion,) = generation.run()
    return completion, generation.stats


@torch.no_grad()
def _read(model: GPT, ids: list[int]) -> dict[str, Any]:
    """Everything that one recorded pass over the tokens tells."""
    first, streams = "transformer.h.0.resid_pre", "transformer.h.*"
    with record(model, [PROBS, first, streams]) as acts:
        logits = model(as_row(model, ids))[0].float()  # (T, V)
    T, V = logits.shape
    best = logits.softmax(-1).topk(min(ALTERNATIVES, V))  # (T, 8)
    chosen = torch.tensor(ids[1:], device=logits.device)  # (T - 1,)
    logprobs, _ = token_logprobs(logits[:-1], chosen)
    own = logits[:-1].gather(1, chosen[:, None])
    ranks = (logits[:-1] > own).sum(-1) + 1
    every = torch.cat([acts[first][None], acts[streams]])[:, 0]  # (L + 1, T, C)
    lens = [layer.softmax(-1).max(-1) for layer in layer_logits(model, every)]
    rows, columns = torch.tril_indices(T, T, device=logits.device)
    attention = acts[PROBS][:, 0, :, rows, columns]  # (L, H, T (T + 1) / 2)
    integers = (attention.float() * 255).round().to(torch.uint8).cpu()
    return {
        "logprobs": [None, *_rounded(logprobs)],
        "ranks": [None, *ranks.tolist()],
        "next": {"ids": best.indices.tolist(), "probabilities": _rounded(best.values)},
        "lens": {
            "ids": [one.indices.tolist() for one in lens],
            "probabilities": [_rounded(one.values) for one in lens],
        },
        "attention": base64.b64encode(integers.numpy().tobytes()).decode(),
    }


def _rounded(x: Tensor) -> Any:
    """Nested lists of the numbers to five decimals."""
    if x.ndim > 1:
        return [_rounded(row) for row in x]
    return [round(number, 5) for number in x.tolist()]


def _parts(
    tokenizer: Tokenizer, prompt: tuple[int, ...], infill: tuple[str, str] | None
) -> list[str]:
    """Where each token of the prompt is from."""
    if infill is not None:
        return regions(tokenizer, list(prompt))
    return ["control" if id_ in tokenizer.special_ids else "prompt" for id_ in prompt]


def token_text(tokenizer: Tokenizer, id_: int) -> str:
    """A token's text; bytes that are no character by themselves are spelled out, as `\\xf0`."""
    data = tokenizer.decode_bytes([id_], skip_special_tokens=False)
    return data.decode(errors="backslashreplace") or f"[{id_}]"  # a padding row has no text


def _facts(llm: LLM, name: str) -> dict[str, Any]:
    model, config = llm.model, llm.model.config
    keys = ["n_layer", "n_head", "n_kv_head", "head_dim", "n_positions", "parameters"]
    keys += ["tie_word_embeddings"]
    return {
        "name": name,
        "dtype": "int8" if is_quantized(model) else _dtype_name(model.dtype),
        "device": str(model.device),
        "threads": torch.get_num_threads() if model.device.type == "cpu" else None,
        **{key: getattr(config, key) for key in keys},
    }


def _cache(model: GPT) -> dict[str, Any]:
    dtype = torch.int8 if issubclass(model.cache_class, Int8KVCache) else model.dtype
    ways = {"mqa": True, "mha": False}
    sizes = {
        way: cache_bytes(replace(model.config, multi_query=shared), dtype)
        for way, shared in ways.items()
    }
    return {"dtype": _dtype_name(dtype), "bytes_per_token": sizes}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
