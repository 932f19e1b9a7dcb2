from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import GPTBigCodeConfig

from mqa_gpt.checkpoints.load import empty_model
from mqa_gpt.config import ACTIVATIONS, PRESETS, GPTConfig
from mqa_gpt.errors import ConfigError
from tests.helpers import tiny_config

# What bigcode/santacoder publishes: a subclass of GPT-2 with code of its own.
SANTACODER = {
    "activation_function": "gelu_fast",
    "architectures": ["GPT2LMHeadCustomModel"],
    "attention_head_type": "multiquery",
    "auto_map": {
        "AutoConfig": "configuration_gpt2_mq.GPT2CustomConfig",
        "AutoModelForCausalLM": "modeling_gpt2_mq.GPT2LMHeadCustomModel",
    },
    "bos_token_id": 49152,
    "eos_token_id": 49152,
    "model_type": "gpt2",
    "n_embd": 2048,
    "n_head": 16,
    "n_inner": 8192,
    "n_layer": 24,
    "n_positions": 2048,
    "reorder_and_upcast_attn": False,
    "scale_attn_by_inverse_layer_idx": False,
    "summary_type": "cls_index",
    "torch_dtype": "float32",
    "vocab_size": 49280,
}


def test_the_defaults_are_those_of_transformers() -> None:
    theirs = GPTBigCodeConfig()
    ours = GPTConfig().to_dict()
    ours.pop("architectures")
    assert ours == {key: getattr(theirs, key) for key in ours}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("bigcode/tiny_starcoder_py", 164_144_128),
        ("bigcode/gpt_bigcode-santacoder", 1_124_886_528),
        ("bigcode/starcoderbase-1b", 1_137_207_296),
        ("bigcode/starcoderbase-3b", 3_043_311_104),
        ("bigcode/starcoderbase-7b", 7_327_263_232),
        ("bigcode/starcoderbase", 15_517_456_384),
        ("bigcode/starcoder", 15_517_456_384),
        ("ibm-granite/granite-20b-code-base-8k", 20_066_993_152),
    ],
)
def test_an_official_shape_has_the_published_number_of_parameters(
    name: str, parameters: int
) -> None:
    model = empty_model(GPTConfig.preset(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_every_official_shape_is_known_with_and_without_its_owner() -> None:
    for name in PRESETS:
        assert GPTConfig.preset(name) == GPTConfig.preset(f"bigcode/{name}")


def test_an_unknown_shape_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'starcoder3' is not .* starcoderbase-7b"):
        GPTConfig.preset("starcoder3")


def test_derived_sizes() -> None:
    config = tiny_config(n_embd=60, n_head=3, n_inner=None, eos_token_id=[3, 4])
    assert (config.head_dim, config.n_kv_head, config.inner_size) == (20, 1, 240)
    assert config.end_token_ids == (3, 4)
    config = tiny_config(n_embd=60, n_head=3, n_inner=77, multi_query=False, eos_token_id=None)
    assert (config.n_kv_head, config.inner_size, config.end_token_ids) == (3, 77, ())
    assert tiny_config(eos_token_id=5).end_token_ids == (5,)


SIZES = ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"]
PROBABILITIES = ["resid_pdrop", "embd_pdrop", "attn_pdrop"]
SWITCHES = ["scale_attn_weights", "multi_query", "tie_word_embeddings"]
NO_NUMBERS = [None, "1", [1], {}, True, float("nan"), float("inf"), 10**400]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[(key, v) for key in SIZES for v in (0, -1, 8.0, "8", True, [8], 2**28 + 1, 10**30)],
        *[(key, None) for key in SIZES if key != "n_inner"],
        *[(key, v) for key in PROBABILITIES for v in (-0.1, 1, 1.5, *NO_NUMBERS)],
        *[("layer_norm_epsilon", v) for v in (0, -1e-5, *NO_NUMBERS)],
        *[("initializer_range", v) for v in (-0.02, *NO_NUMBERS)],
        *[(key, v) for key in SWITCHES for v in (None, 0, 1, "true", [])],
        *[("activation_function", v) for v in ("silu", "GELU", None, 1, ["gelu"], {"gelu": 1})],
        *[(key, v) for key in ("bos_token_id", "pad_token_id") for v in (1.0, "1", True, [1])],
        *[("eos_token_id", v) for v in (1.0, "1", True, ["1"], [1, None], {"a": 1})],
    ],
)
def test_an_unusable_value_is_named_with_its_key_and_what_is_accepted(
    key: str, value: object
) -> None:
    with pytest.raises(ConfigError, match=f"^{key} is .*: (it must be|expected one of)"):
        GPTConfig.from_dict({key: value})


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ConfigError, match="n_embd is 768 and n_head is 7"):
        GPTConfig.from_dict({"n_head": 7})


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "", None, ["gpt_bigcode"], 3])
def test_another_architecture_is_refused_by_name(model_type: object) -> None:
    with pytest.raises(ConfigError, match=r"^model_type is .*: expected 'gpt_bigcode'"):
        GPTConfig.from_dict({"model_type": model_type})


def test_cross_attention_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"add_cross_attention is True: .* expected false"):
        GPTConfig.from_dict({"add_cross_attention": True})
    assert GPTConfig.from_dict({"add_cross_attention": False}).extra


@pytest.mark.parametrize("values", [[], "gpt_bigcode", 3, None])
def test_a_config_that_is_no_object_is_refused(values: Any) -> None:
    with pytest.raises(ConfigError, match="a config must be a JSON object"):
        GPTConfig.from_dict(values)


def test_a_value_is_shown_short_and_without_control_characters() -> None:
    with pytest.raises(ConfigError) as caught:
        GPTConfig.from_dict({"activation_function": "\x1b[2J\n" + "x" * 100_000})
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_one_of_transformers(activation: str) -> None:
    from transformers.activations import ACT2FN

    assert activation in ACT2FN
    assert tiny_config(activation_function=activation).activation_function == activation


def test_keys_without_effect_are_kept_when_the_config_is_written_again() -> None:
    legacy = {
        "inference_runner": 0,
        "pre_allocate_kv_cache": False,
        "validate_runner_input": True,
        "pad_key_length": True,
        "max_batch_size": None,
        "max_sequence_length": None,
        "runner_max_sequence_length": None,
        "summary_use_proj": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "attention_softmax_in_fp32": True,
        "scale_attention_softmax_in_fp32": True,
        "architectures": ["GPTBigCodeForCausalLM"],
        "transformers_version": "4.28.1",
        "a key from the future": {"nested": [1, None]},
    }
    config = tiny_config(**legacy)
    written = json.loads(config.to_json())
    assert legacy.items() <= written.items()
    assert GPTConfig.from_dict(written) == config


def test_what_is_written_is_the_same_model_to_transformers() -> None:
    config = tiny_config(
        activation_function="gelu",
        n_inner=91,
        multi_query=False,
        scale_attn_weights=False,
        tie_word_embeddings=False,
        eos_token_id=[1, 2],
        pad_token_id=5,
    )
    theirs = GPTBigCodeConfig.from_dict(json.loads(config.to_json()))
    assert theirs.model_type == "gpt_bigcode"
    ours = config.to_dict()
    assert {key: getattr(theirs, key) for key in ours} == ours


def test_general_names_of_the_sizes_are_understood_as_in_transformers() -> None:
    names = {
        "hidden_size": 60,
        "max_position_embeddings": 99,
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
    }
    theirs = GPTBigCodeConfig(**names)
    ours = GPTConfig.from_dict(names)
    for key in ("n_embd", "n_positions", "n_head", "n_layer"):
        assert getattr(ours, key) == getattr(theirs, key)
    assert not names.keys() & ours.to_dict().keys()


def test_two_names_of_one_size_must_agree() -> None:
    with pytest.raises(ConfigError, match="hidden_size is 64 and n_embd is 60"):
        GPTConfig.from_dict({"hidden_size": 64, "n_embd": 60, "n_head": 3})


def test_original_santacoder_becomes_a_gpt_bigcode_config() -> None:
    config = GPTConfig.from_dict(SANTACODER)
    assert config.multi_query
    assert (config.head_dim, config.inner_size) == (128, 8192)
    written = config.to_dict()
    assert written["model_type"] == "gpt_bigcode"
    assert written["architectures"] == ["GPTBigCodeForCausalLM"]
    assert written["summary_type"] == "cls_index"
    assert not {"attention_head_type", "auto_map"} & written.keys()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_head_type", "multihead"),
        ("attention_head_type", None),
        ("scale_attn_by_inverse_layer_idx", True),
    ],
)
def test_a_santacoder_config_of_another_computation_is_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{key} is .*: accepted with model_type 'gpt2'"):
        GPTConfig.from_dict(SANTACODER | {key: value})


def test_the_default_end_token_is_not_kept_for_a_vocabulary_without_it() -> None:
    assert (GPTConfig().bos_token_id, GPTConfig().eos_token_id) == (50256, 50256)
    small = GPTConfig(vocab_size=50256)
    assert (small.bos_token_id, small.eos_token_id, small.end_token_ids) == (None, None, ())
    assert GPTConfig(vocab_size=4096, eos_token_id=7).eos_token_id == 7
    assert GPTConfig(vocab_size=4096, eos_token_id=[7, 50256]).end_token_ids == (7, 50256)
