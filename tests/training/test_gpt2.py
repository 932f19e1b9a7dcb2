"""`mqa_gpt.training.gpt2` against transformers' GPT2LMHeadModel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, GPTBigCodeForCausalLM

from mqa_gpt import GPT
from mqa_gpt.errors import CheckpointError, ConfigError
from mqa_gpt.training.gpt2 import is_gpt2, load_gpt2
from tests.helpers import WEIGHTS, error


def reference(**changes: Any) -> GPT2LMHeadModel:
    """A small GPT-2 with peaked attention, every parameter random, float32, in eval mode."""
    values = {
        "vocab_size": 97, "n_positions": 112, "n_embd": 60, "n_layer": 2, "n_head": 3,
        "n_inner": 136, "initializer_range": 0.4, "bos_token_id": 1, "eos_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**(values | changes), attn_implementation="eager"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                is_gain = "ln_" in name and name.endswith("weight")
                parameter.normal_(1.0 if is_gain else 0.0, 0.3)
    return model.eval()


def saved(model: GPT2LMHeadModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation_function": "gelu"},
        {"activation_function": "relu"},
        {"scale_attn_weights": False},
        {"reorder_and_upcast_attn": True},
        {"n_inner": None},
        {"tie_word_embeddings": False},
        {"layer_norm_epsilon": 0.1},
    ],
    ids=str,
)
@torch.no_grad()
def test_the_logits_are_gpt2s(changes: dict[str, Any], tmp_path: Path) -> None:
    model = reference(**changes)
    ours = load_gpt2(saved(model, tmp_path))
    ids = torch.randint(97, (3, 40))
    assert not ours.config.multi_query
    assert not ours.training
    expected = model(ids).logits
    assert error(ours(ids), expected) < 1e-5 * expected.abs().max().item()


@torch.no_grad()
def test_saved_it_is_a_model_that_transformers_loads_with_the_same_logits(tmp_path: Path) -> None:
    model = reference()
    load_gpt2(saved(model, tmp_path / "gpt2")).save_pretrained(tmp_path / "ours")
    theirs = GPTBigCodeForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    ids = torch.randint(97, (2, 30))
    expected = model(ids).logits
    assert error(theirs.eval()(ids).logits, expected) < 1e-5 * expected.abs().max().item()
    assert error(GPT.from_pretrained(tmp_path / "ours")(ids), theirs(ids).logits) < 1e-4


@torch.no_grad()
def test_names_without_prefix_and_mask_buffers_are_read_as_on_the_hub(tmp_path: Path) -> None:
    model = reference()
    saved(model, tmp_path)
    tensors = {
        name.removeprefix("transformer."): tensor
        for name, tensor in load_file(tmp_path / WEIGHTS).items()
    }
    for i in range(2):
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 112, 112).tril()
    save_file(tensors, tmp_path / WEIGHTS)
    ids = torch.randint(97, (2, 30))
    assert error(load_gpt2(tmp_path)(ids), model(ids).logits) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    ours = load_gpt2(saved(reference().to(dtype), tmp_path))
    assert ours.dtype == dtype
    assert ours.lm_head.weight is ours.transformer.wte.weight


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is true"),
        ({"activation_function": "silu"}, "activation_function is 'silu'"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
    ],
    ids=str,
)
def test_what_this_architecture_does_not_have_is_refused_by_name(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    edit_config(saved(reference(), tmp_path), **changes)
    with pytest.raises(ConfigError, match=message):
        load_gpt2(tmp_path)


def test_a_missing_tensor_and_a_wrong_shape_are_errors_that_name_it(tmp_path: Path) -> None:
    saved(reference(), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = "transformer.h.1.mlp.c_fc.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        load_gpt2(tmp_path)
    save_file(tensors | {name: tensors[name].T.contiguous()}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=f"{name} .* expected \\[60, 136\\]"):
        load_gpt2(tmp_path)


def test_loading_it_as_it_is_names_the_command_that_converts_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected 'gpt_bigcode'; `mqa-gpt convert` turns GPT-2"):
        GPT.from_pretrained(saved(reference(), tmp_path))


def test_gpt2_is_told_from_this_architecture(tmp_path: Path) -> None:
    assert is_gpt2(saved(reference(), tmp_path))
    edit_config(tmp_path, model_type="gpt_bigcode")
    assert not is_gpt2(tmp_path)
