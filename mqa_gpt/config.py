"""GPTConfig: the sizes and switches of one model, under the names of Hugging Face's config.json."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mqa_gpt.errors import ConfigError, Range, in_ranges, is_int, shown

# The formula of each name that a config.json may use. GELU is x * Phi(x) with the normal
# distribution's Phi; gelu_tanh approximates Phi (Hendrycks and Gimpel 2016, equation 2), and its
# three names differ only by rounding.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}

MODEL_TYPE = "gpt_bigcode"
ARCHITECTURE = "GPTBigCodeForCausalLM"

# The general names that transformers also accepts for its models' sizes.
ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}

# Far above any model's sizes, and low enough that no product of two overflows 64 bits.
MAX_SIZE = 2**28

SIZE = Range(1, MAX_SIZE)
SHARE = Range(0, math.nextafter(1, 0), "from 0 to below 1")

RANGES = {
    **dict.fromkeys(("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"), SIZE),
    "n_inner": SIZE._replace(optional=True),
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), SHARE),
    "layer_norm_epsilon": Range(math.nextafter(0, 1), words="above 0"),
    "initializer_range": Range(0, words="0 or above"),
}

# GPT-2's end-of-text token, the last of the default vocabulary.
DEFAULT_END = 50256


@dataclass(frozen=True)
class GPTConfig:
    """The sizes and switches of one model; field names and defaults are `GPTBigCodeConfig`'s.

    Keys of a `config.json` that do not change the computation (training notes, legacy switches
    without effect) are kept in `extra`, so that saving a loaded model loses nothing. The default
    end-of-text id becomes None where the vocabulary is too small to have it.

    Raises:
        ConfigError: a value is of the wrong type, out of range, or contradicts another.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_pytorch_tanh"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    multi_query: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = DEFAULT_END
    eos_token_id: int | list[int] | None = DEFAULT_END
    pad_token_id: int | None = None
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for key, value in in_ranges(ConfigError, vars(self), RANGES).items():
            object.__setattr__(self, key, value)
        if self.n_embd % self.n_head:
            raise ConfigError(
                f"n_embd is {self.n_embd} and n_head is {self.n_head}: "
                "n_embd must be a multiple of n_head"
            )
        name = self.activation_function
        if not isinstance(name, str) or name not in ACTIVATIONS:
            raise ConfigError(
                f"activation_function is {shown(name)}: expected one of {', '.join(ACTIVATIONS)}"
            )
        for key in ("scale_attn_weights", "multi_query", "tie_word_embeddings"):
            if not isinstance(getattr(self, key), bool):
                raise ConfigError(f"{key} is {shown(getattr(self, key))}: it must be true or false")
        for key in ("bos_token_id", "pad_token_id"):
            value = getattr(self, key)
            if value is not None and not is_int(value):
                raise ConfigError(f"{key} is {shown(value)}: it must be an integer or null")
            object.__setattr__(self, key, None if value is None else int(value))
            if value == DEFAULT_END and self.vocab_size <= DEFAULT_END:
                object.__setattr__(self, key, None)  # the default is of the default vocabulary
        eos = self.eos_token_id
        if eos == DEFAULT_END and self.vocab_size <= DEFAULT_END:
            object.__setattr__(self, "eos_token_id", None)
        if eos is not None and not all(map(is_int, eos if isinstance(eos, list) else [eos])):
            raise ConfigError(
                f"eos_token_id is {shown(eos)}: it must be an integer, a list of integers or null"
            )
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", list(map(int, self.eos_token_id)))
        elif self.eos_token_id is not None:
            object.__setattr__(self, "eos_token_id", int(self.eos_token_id))

    @cached_property
    def head_dim(self) -> int:
        """D: the width of one head."""
        return self.n_embd // self.n_head

    @cached_property
    def n_kv_head(self) -> int:
        """G: key/value heads, 1 in multi-query attention."""
        return 1 if self.multi_query else self.n_head

    @cached_property
    def inner_size(self) -> int:
        """F: the width of the MLP."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(self.parameters_by_part.values())

    @property
    def parameters_by_part(self) -> dict[str, int]:
        """How many numbers are trained in each part; a tied head is the token embedding again."""
        L, C, F, V = self.n_layer, self.n_embd, self.inner_size, self.vocab_size
        qkv = C + 2 * self.n_kv_head * self.head_dim
        return {
            "token embedding": V * C,
            "position embedding": self.n_positions * C,
            "attention": L * ((C * qkv + qkv) + (C * C + C)),
            "MLP": L * ((C * F + F) + (F * C + C)),
            "norms": L * 4 * C + 2 * C,
            "head": 0 if self.tie_word_embeddings else V * C,
        }

    @cached_property
    def end_token_ids(self) -> tuple[int, ...]:
        """`eos_token_id` as a tuple, whatever form the config gives it in."""
        ids = self.eos_token_id
        return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GPTConfig:
        """Read the contents of a `config.json`; keys without a field here go into `extra`.

        Also accepts original SantaCoder's form, `model_type` "gpt2" with `attention_head_type`
        "multiquery", which is this architecture under an older name.

        Raises:
            ConfigError: not a gpt_bigcode config, or a value is unusable; names key and value.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"a config must be a JSON object, not {shown(values)}")
        values = dict(values)
        model_type = values.pop("model_type", MODEL_TYPE)
        if model_type == "gpt2" and "attention_head_type" in values:
            _convert_santacoder(values)
        elif model_type != MODEL_TYPE:
            hint = "; `mqa-gpt convert` turns GPT-2 into that" if model_type == "gpt2" else ""
            raise ConfigError(f"model_type is {shown(model_type)}: expected {MODEL_TYPE!r}{hint}")
        if values.get("add_cross_attention"):
            raise ConfigError(
                f"add_cross_attention is {shown(values['add_cross_attention'])}: this model has no "
                "encoder to attend to; expected false"
            )
        for alias, key in ALIASES.items():
            if alias in values:
                value = values.pop(alias)
                if values.setdefault(key, value) != value:
                    raise ConfigError(
                        f"{alias} is {shown(value)} and {key} is {shown(values[key])}: they are "
                        "two names of one size"
                    )
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        extra = {key: value for key, value in values.items() if key not in known}
        return cls(**{key: value for key, value in values.items() if key in known}, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """The contents of a `config.json` that transformers reads as the same model."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        extra = values.pop("extra")
        return {"architectures": [ARCHITECTURE], **extra, "model_type": MODEL_TYPE, **values}

    def to_json(self) -> str:
        """`to_dict` as the text of a `config.json`."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def preset(cls, name: str) -> GPTConfig:
        """The config of a published checkpoint, by its name on the hub, with or without the owner.

        Raises:
            ConfigError: no such preset; lists them.
        """
        short = name.split("/")[-1]
        if short not in PRESETS:
            raise ConfigError(f"{shown(name)} is not a preset: there are {', '.join(PRESETS)}")
        n_layer, n_head, n_embd, vocab_size, n_positions, activation, end = PRESETS[short]
        return cls(
            n_layer=n_layer,
            n_head=n_head,
            n_embd=n_embd,
            vocab_size=vocab_size,
            n_positions=n_positions,
            activation_function=activation,
            bos_token_id=end,
            eos_token_id=end,
        )


# n_layer, n_head, n_embd, vocab_size, n_positions, activation_function, end-of-text id.
# Of the Granite family only the 20B model has this architecture.
PRESETS = {
    "tiny_starcoder_py": (20, 12, 768, 49152, 8192, "gelu_pytorch_tanh", 0),
    "gpt_bigcode-santacoder": (24, 16, 2048, 49280, 2048, "gelu_pytorch_tanh", 49152),
    "starcoderbase-1b": (24, 16, 2048, 49152, 8192, "gelu_pytorch_tanh", 0),
    "starcoderbase-3b": (36, 22, 2816, 49152, 8192, "gelu_pytorch_tanh", 0),
    "starcoderbase-7b": (42, 32, 4096, 49152, 8192, "gelu", 0),
    "starcoderbase": (40, 48, 6144, 49152, 8192, "gelu", 0),
    "starcoder": (40, 48, 6144, 49152, 8192, "gelu", 0),
    "granite-20b-code-base-8k": (52, 48, 6144, 49152, 8192, "gelu", 0),
}


def _convert_santacoder(values: dict[str, Any]) -> None:
    """Turn the config of original SantaCoder, a subclass of GPT-2, into a gpt_bigcode config."""
    kind = values.pop("attention_head_type")
    if kind != "multiquery":  # "multihead" has GPT-2's own order of Q, K and V
        raise ConfigError(
            f"attention_head_type is {shown(kind)}: accepted with model_type 'gpt2' is 'multiquery'"
        )
    if values.get("scale_attn_by_inverse_layer_idx"):  # gpt_bigcode ignores it, GPT-2 does not
        raise ConfigError(
            "scale_attn_by_inverse_layer_idx is true: accepted with model_type 'gpt2' is false"
        )
    values["multi_query"] = True
    for key in ("architectures", "auto_map"):  # they name the classes of the older form
        values.pop(key, None)
