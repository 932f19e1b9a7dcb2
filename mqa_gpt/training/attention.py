"""Attention that stays inside the documents of a packed sequence."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mqa_gpt.attention import causal_mask
from mqa_gpt.model import GPT, MultiQueryAttention


class DocumentAttention:
    """An attention backend that also hides the other documents of a sequence.

    Positions go on counting from the start of the sequence, as where documents see each other.

    Attributes:
        documents: (B, T) integers, the number of each token's document, set before a forward.
    """

    documents: Tensor | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, start: int | Tensor, scale: float, dropout_p: float
    ) -> Tensor:
        """See `mqa_gpt.attention`; without a cache, so S is T."""
        B, T, H, _ = q.shape
        assert self.documents is not None
        same = self.documents[:, :, None] == self.documents[:, None]  # (B, T, T)
        mask = (causal_mask(start, T, T, q.device) & same)[:, None]  # (B, 1, T, T)
        G, D = k.shape[2:]
        k, v = (  # (B, H, T, D), a view if G is 1
            x.transpose(1, 2)[:, :, None].expand(B, G, H // G, T, D).flatten(1, 2) for x in (k, v)
        )
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask, dropout_p, scale=scale)
        return y.transpose(1, 2)  # (B, T, H, D)


def attend_inside_documents(model: GPT) -> DocumentAttention:
    """Let every layer of a model use one `DocumentAttention`; returns it."""
    attend = DocumentAttention()
    for module in model.modules():
        if isinstance(module, MultiQueryAttention):
            module.attend = attend
    return attend
