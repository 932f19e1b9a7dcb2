"""GPT-2 with multi-query attention, the architecture of StarCoder, from ids to logits.

GPT-2 (Radford et al. 2019) is a stack of blocks between an embedding and a projection back to the
vocabulary. Multi-query attention (Shazeer 2019) changes one thing in it: the H query heads of a
layer share one key/value head, so the cache that decoding reads at every step is H times smaller.

Dimensions, used in every shape below and throughout the project:

    B  rows of the batch               H  query heads (n_head)
    T  new positions in this call      G  key/value heads: 1 in MQA, H in MHA
    S  cached + new positions          D  head dim, C / H
    V  vocabulary                      C  width of the residual stream (n_embd)
    L  layers (n_layer)                F  width of the MLP (n_inner)

Module and parameter names are those of the published checkpoints, so `state_dict` keys, hooks and
papers that name a layer of transformers' GPTBigCode mean the same thing here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from os import PathLike

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mqa_gpt.attention import Attention, auto_attention, positions_from, select_attention
from mqa_gpt.cache import KVCache
from mqa_gpt.config import ACTIVATIONS, GPTConfig
from mqa_gpt.errors import PromptError, shown


class MultiQueryAttention(nn.Module):
    """Causal self-attention whose H query heads share G key/value heads."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5 if config.scale_attn_weights else 1.0
        self.attn_pdrop = config.attn_pdrop
        kv_size = 2 * config.n_kv_head * config.head_dim
        self.c_attn = nn.Linear(config.n_embd, config.n_embd + kv_size)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)
        self.attend: Attention = auto_attention  # until `GPT.set_backend`

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """qkv (B, T, C + 2GD) -> q (B, T, H, D) and kv (B, T, G, 2D), K with V per head."""
        B, T, _ = qkv.shape
        H, G, D = self.n_head, self.n_kv_head, self.head_dim
        if G == 1:  # all queries, then the one K and the one V
            q, kv = qkv[..., : H * D], qkv[..., H * D :]
            return q.view(B, T, H, D), kv.view(B, T, 1, 2 * D)
        qkv = qkv.view(B, T, H, 3 * D)  # G is H here: q, K and V head by head
        return qkv[..., :D], qkv[..., D:]

    def forward(self, x: Tensor, start: int | Tensor, cache: KVCache | None) -> Tensor:
        """x (B, T, C), whose first token stands at position `start` -> (B, T, C)."""
        q, kv = self.split(self.c_attn(x))  # (B, T, H, D), (B, T, G, 2D)
        if cache is not None:
            kv = cache.append(self.layer, kv)  # (B, S, G, 2D)
        k, v = kv.chunk(2, dim=-1)  # (B, S, G, D) each
        dropout_p = self.attn_pdrop if self.training else 0.0
        y = self.attend(q, k, v, start, self.scale, dropout_p)  # (B, T, H, D)
        return self.resid_dropout(self.c_proj(y.flatten(2)))  # (B, T, C)


FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu
}  # fmt: skip


class MLP(nn.Module):
    """Two linear layers with an activation between them, applied to each position by itself."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation = config.activation_function
        self.c_fc = nn.Linear(config.n_embd, config.inner_size)
        self.c_proj = nn.Linear(config.inner_size, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def activate(self, x: Tensor) -> Tensor:
        """The nonlinearity: x (B, T, F) -> (B, T, F)."""
        return FORMULAS[ACTIVATIONS[self.activation]](x)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        return self.dropout(self.c_proj(self.activate(self.c_fc(x))))  # (B, T, C)


class Block(nn.Module):
    """One layer: attention, then MLP, each with pre-norm, added to the residual stream."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = MultiQueryAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, start: int | Tensor, cache: KVCache | None) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x), start, cache)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Embeddings, L blocks and the final normalisation: ids to hidden states."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """ids (B, T) -> (B, T, C); a cache grows by T positions per row."""
        T = ids.shape[1]
        if cache is not None:
            cache.require_room(T)
        start = 0 if cache is None else cache.start
        positions = positions_from(start, T, ids.device)  # (1 or B, T)
        x = self.drop(self.wte(ids) + self.wpe(positions))  # (B, T, C)
        for block in self.h:
            x = block(x, start, cache)
        if cache is not None:
            cache.advance(T)
        return self.ln_f(x)


class GPT(nn.Module):
    """The whole model. `GPT(config)` has random weights; `GPT.from_pretrained` reads a checkpoint.

    The model keeps no state between calls: what it has seen is in the `KVCache` that the caller
    passes. It neither samples nor tokenizes (see `generate` and `Tokenizer`).

    Args:
        config: sizes and switches.
        backend: "reference", "sdpa", "triton" or "auto" (see `mqa_gpt.attention`).
    """

    def __init__(self, config: GPTConfig, backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.cache_class = KVCache  # of `new_cache`
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        self._init_weights()
        self.set_backend(backend)

    def _init_weights(self) -> None:
        """N(0, initializer_range), biases 0; LayerNorms stay. What writes to the residual stream is
        scaled by (2L)^-0.5, so that its variance does not grow with depth (Radford et al. 2019)."""
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=std / math.sqrt(2 * self.config.n_layer))
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=std)

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.transformer.ln_f.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype, also that of activations and logits."""
        return self.transformer.ln_f.weight.dtype

    def set_backend(self, backend: str) -> None:
        """Choose every layer's attention; InputError if it is unknown or cannot run here."""
        attend = select_attention(backend, self.device)
        for module in self.modules():
            if isinstance(module, MultiQueryAttention):
                module.attend = attend

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache for this model; see `KVCache`."""
        dtype, device = self.dtype, self.device
        return self.cache_class(self.config, batch_size, max_length, dtype=dtype, device=device)

    def forward(
        self, ids: Tensor, cache: KVCache | None = None, logits_at: Tensor | None = None
    ) -> Tensor:
        """Logits of the token after each position.

        Args:
            ids: (B, T) int64 tokens. With a cache they continue its rows, and it holds T more
                positions per row afterwards; without one they start at position 0.
            cache: what came before, or None.
            logits_at: (B,) int64 indices into T. The vocabulary projection is the widest product
                of the model; this computes it only where it is read. Empty, (0,): nowhere.

        Returns:
            (B, T, V), or (B, V) or (0, V) with `logits_at`, in the model's dtype.

        Raises:
            PromptError: `ids` is not a (B, T) tensor, or longer than the context.
            ValueError: the tokens do not fit into the cache.
            IndexError: a token is not in the vocabulary.
        """
        limit, is_ids = self.config.n_positions, isinstance(ids, Tensor) and ids.ndim == 2
        if not is_ids or ids.dtype not in (torch.int64, torch.int32) or ids.shape[1] > limit:
            what = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else shown(ids)
            raise PromptError(f"ids are {what}: expected int64 (B, T) with T at most {limit}")
        x = self.transformer(ids, cache)  # (B, T, C)
        if logits_at is not None:
            x = x[torch.arange(len(logits_at), device=x.device), logits_at]  # (B, C) or (0, C)
        return self.lm_head(x)  # (B, T, V), (B, V) or (0, V)

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | PathLike[str],
        *,
        revision: str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        backend: str = "auto",
        quantize: str | None = None,
    ) -> GPT:
        """Load a checkpoint from a hub name or a folder; see `mqa_gpt.checkpoints.load`."""
        from mqa_gpt.checkpoints.load import load_model

        return load_model(
            name_or_dir,
            revision=revision,
            dtype=dtype,
            device=device,
            backend=backend,
            quantize=quantize,
        )

    def save_pretrained(
        self, folder: str | PathLike[str], *, max_shard_size: int | str = "5GB"
    ) -> None:
        """Write a checkpoint that transformers loads; see `mqa_gpt.checkpoints.save.save_model`."""
        from mqa_gpt.checkpoints.save import save_model

        save_model(self, folder, max_shard_size=max_shard_size)
