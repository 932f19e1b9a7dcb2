"""Prefill: read the prompts into the cache, in passes that are large but fit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mqa_gpt.cache import KVCache
from mqa_gpt.fast.compiled import compiled_forward, is_known
from mqa_gpt.model import GPT

# Positions of all rows together in one forward pass: enough to keep the arithmetic units busy, few
# enough that the activations (F numbers each) stay small next to the weights.
PREFILL_POSITIONS = 8192

# On a CPU, few enough that one MLP activation (B, T, F) fits in cache, in bytes.
CPU_PREFILL_BYTES = 6 << 20

# Attention is slow with fewer positions of a row than this.
MIN_CHUNK = 32


@torch.inference_mode()
def prefill(
    model: GPT, cache: KVCache, prompts: Sequence[Sequence[int]], chunk: int | None = None
) -> Tensor:
    """Read the prompts into an empty cache; the logits (B, V) after each prompt's last token.

    Rows are padded on the right to the longest; the cache, told their true lengths, hides the
    padding. They are fed in chunks, without the last rows once these have ended, so with the
    longest prompts first little padding is computed.

    The compiled forward pass needs no padding: it reads them one after the other.

    Args:
        chunk: positions per row and forward pass; None for what is fast on the model's device.
    """
    compiled = compiled_forward(model)
    if compiled is not None and is_known(cache):
        return compiled.read(prompts, cache, None if chunk is None else chunk * len(prompts))
    device = cache.kv.device
    if chunk is None:
        positions = PREFILL_POSITIONS
        if device.type == "cpu":
            positions = CPU_PREFILL_BYTES // (model.config.inner_size * cache.dtype.itemsize)
        chunk = max(positions // len(prompts), MIN_CHUNK)
    lengths = [len(prompt) for prompt in prompts]
    width = max(lengths)
    is_ragged = min(lengths) < width
    if is_ragged:
        cache.limit(lengths)
    ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts])
    ids = ids.to(device)  # (B, width)
    last = torch.tensor(lengths, device=device) - 1  # (B,)
    logits: Tensor | None = None  # (B, V)
    for begin in range(0, width, chunk):
        b = max(row for row, length in enumerate(lengths) if length > begin) + 1
        piece = ids[:b, begin : begin + chunk]  # (b, T)
        end = begin + piece.shape[1]
        view = cache if b == len(prompts) else cache.rows(0, [begin] * b)
        if any(begin < length <= end for length in lengths):
            at = (last[:b] - begin).clamp(0, end - begin - 1)  # (b,)
            new = model(piece, cache=view, logits_at=at)  # (b, V)
            if logits is not None:
                # A row that ends in a later chunk is replaced again there.
                new = torch.where((last[:b] >= begin)[:, None], new, logits[:b])
                new = torch.cat((new, logits[b:]))
            logits = new  # of all rows the first time, since no row has ended before
        else:
            model(piece, cache=view, logits_at=last[:0])
        if view is not cache:
            cache.advance(end - begin)
    if is_ragged:
        cache.set_lengths(lengths)
    assert logits is not None
    return logits
