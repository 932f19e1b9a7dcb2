"""Loading, against what transformers writes."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPTBigCodeForCausalLM
from transformers.pytorch_utils import Conv1D

from mqa_gpt import GPT, CheckpointError, ConfigError, GPTConfig
from mqa_gpt.checkpoints import files as weight_files
from mqa_gpt.checkpoints import headers, placement
from mqa_gpt.checkpoints import load as checkpoint
from mqa_gpt.checkpoints.files import stored_tensors
from mqa_gpt.checkpoints.headers import read_checkpoint, read_config
from mqa_gpt.checkpoints.load import load_model
from mqa_gpt.checkpoints.placement import as_dtype, fast_dtype
from mqa_gpt.errors import InputError
from tests.helpers import (
    INDEX,
    WEIGHTS,
    Tensors,
    assert_same_weights,
    random_ids,
    reference_model,
    tiny_config,
    weights_of,
    write_checkpoint,
)


def write_sharded(folder: Path, shards: dict[str, Tensors], config: GPTConfig) -> Path:
    """A checkpoint of the given files and an index without metadata."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config.to_json())
    for file, tensors in shards.items():
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / file)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def halves(tensors: Tensors) -> dict[str, Tensors]:
    """The tensors in two shards."""
    names = sorted(tensors)
    return {
        "model-00001-of-00002.safetensors": {n: tensors[n] for n in names[::2]},
        "model-00002-of-00002.safetensors": {n: tensors[n] for n in names[1::2]},
    }


@pytest.fixture(scope="module")
def reference() -> GPTBigCodeForCausalLM:
    return reference_model(tiny_config())


# ----------------------------------------------------------------------------- layouts in the wild


def without_prefix(tensors: Tensors) -> Tensors:
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def with_only_the_head(tensors: Tensors) -> Tensors:
    tensors = dict(tensors)
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    return tensors


def with_head_and_embedding(tensors: Tensors) -> Tensors:
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}


def with_mask_buffers(tensors: Tensors) -> Tensors:
    mask = torch.ones(112, 112, dtype=torch.bool).tril()
    buffers = {f"transformer.h.{i}.attn.bias": mask for i in range(2)}
    buffers |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    return tensors | buffers


@pytest.mark.parametrize(
    "layout",
    [
        dict,
        without_prefix,
        with_only_the_head,
        with_head_and_embedding,
        with_mask_buffers,
        lambda tensors: without_prefix(with_mask_buffers(with_head_and_embedding(tensors))),
    ],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_every_published_layout_gives_the_same_model(
    tmp_path: Path,
    reference: GPTBigCodeForCausalLM,
    layout: Callable[[Tensors], Tensors],
    sharded: bool,
) -> None:
    tensors = layout(weights_of(reference))
    if sharded:
        write_sharded(tmp_path, halves(tensors), tiny_config())
    else:
        write_checkpoint(tmp_path, tensors, tiny_config())
    model = load_model(tmp_path)
    assert_same_weights(model, reference)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("multi_query", [True, False])
@pytest.mark.parametrize("max_shard_size", ["5GB", 30_000])
def test_what_transformers_saves_loads(
    tmp_path: Path, tied: bool, multi_query: bool, max_shard_size: int | str
) -> None:
    config = tiny_config(tie_word_embeddings=tied, multi_query=multi_query)
    theirs = reference_model(config)
    theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / INDEX).exists() == (max_shard_size != "5GB")
    ours = GPT.from_pretrained(tmp_path)
    assert_same_weights(ours, theirs)
    ids = random_ids(config, 2, 9)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def original_santacoder(config: GPTConfig) -> tuple[dict[str, Any], dict[str, Conv1D], Tensors]:
    """A checkpoint as bigcode/santacoder holds it: its config, its linear layers, its tensors."""
    C, D, F = config.n_embd, config.head_dim, config.inner_size
    layers = {}
    for i in range(config.n_layer):
        layers |= {
            f"transformer.h.{i}.attn.q_attn": Conv1D(C, C),
            f"transformer.h.{i}.attn.kv_attn": Conv1D(2 * D, C),
            f"transformer.h.{i}.attn.c_proj": Conv1D(C, C),
            f"transformer.h.{i}.mlp.c_fc": Conv1D(F, C),
            f"transformer.h.{i}.mlp.c_proj": Conv1D(C, F),
        }
    tensors = {}
    for name, layer in layers.items():
        torch.nn.init.normal_(layer.bias)
        tensors |= {f"{name}.weight": layer.weight.detach(), f"{name}.bias": layer.bias.detach()}
    for name, tensor in weights_of(reference_model(config)).items():
        if ".attn." not in name and ".mlp." not in name:
            tensors[name] = tensor
    tensors = with_mask_buffers(tensors) | {"lm_head.weight": tensors["transformer.wte.weight"]}
    values = config.to_dict() | {
        "model_type": "gpt2",
        "attention_head_type": "multiquery",
        "architectures": ["GPT2LMHeadCustomModel"],
        "auto_map": {"AutoModelForCausalLM": "modeling_gpt2_mq.GPT2LMHeadCustomModel"},
    }
    del values["multi_query"]
    return values, layers, tensors


def test_original_santacoder_computes_what_its_own_layers_compute(tmp_path: Path) -> None:
    config = tiny_config(n_inner=60)  # all linear weights but one square: shapes tell nothing
    values, layers, tensors = original_santacoder(config)
    model = load_model(write_checkpoint(tmp_path, tensors, values))
    x = torch.randn(2, 5, config.n_embd)
    with torch.no_grad():
        for i, block in enumerate(model.transformer.h):
            name = f"transformer.h.{i}"
            query = layers[f"{name}.attn.q_attn"](x)
            key_value = layers[f"{name}.attn.kv_attn"](x)
            expected = torch.cat((query, key_value), dim=-1)
            torch.testing.assert_close(block.attn.c_attn(x), expected)
            for ours, part in (
                (block.attn.c_proj, "attn.c_proj"),
                (block.mlp.c_fc, "mlp.c_fc"),
                (block.mlp.c_proj, "mlp.c_proj"),
            ):
                torch.testing.assert_close(ours(x), layers[f"{name}.{part}"](x))
    assert torch.equal(model.lm_head.weight, tensors["transformer.wte.weight"])
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_original_santacoder_saved_again_is_a_checkpoint_of_transformers(tmp_path: Path) -> None:
    config = tiny_config()
    values, _, tensors = original_santacoder(config)
    model = load_model(write_checkpoint(tmp_path / "old", tensors, values))
    model.save_pretrained(tmp_path / "new")
    theirs = GPTBigCodeForCausalLM.from_pretrained(tmp_path / "new")
    assert_same_weights(model, theirs)
    ids = random_ids(config, 1, 7)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_one_file_is_preferred_to_an_index_as_in_transformers(
    tmp_path: Path, reference: GPTBigCodeForCausalLM
) -> None:
    other = reference_model(tiny_config(), seed=1)
    write_sharded(tmp_path, halves(weights_of(other)), tiny_config())
    write_checkpoint(tmp_path, weights_of(reference), tiny_config())
    model = load_model(tmp_path)
    assert_same_weights(model, reference)
    assert_same_weights(model, GPTBigCodeForCausalLM.from_pretrained(tmp_path))


def test_an_untied_head_is_its_own(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=False)
    theirs = reference_model(config)
    model = load_model(write_checkpoint(tmp_path, weights_of(theirs), config))
    assert_same_weights(model, theirs)
    assert not torch.equal(model.lm_head.weight, model.transformer.wte.weight)


def test_a_tied_checkpoint_with_two_different_matrices_is_refused(
    tmp_path: Path, reference: GPTBigCodeForCausalLM
) -> None:
    tensors = with_head_and_embedding(weights_of(reference))
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    with pytest.raises(CheckpointError, match=r"different values.*tie_word_embeddings.*false"):
        load_model(write_checkpoint(tmp_path, tensors, tiny_config()))
    model = load_model(write_checkpoint(tmp_path, tensors, tiny_config(tie_word_embeddings=False)))
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])


def test_nan_and_infinity_are_loaded_as_they_are(
    tmp_path: Path, reference: GPTBigCodeForCausalLM
) -> None:
    tensors = with_head_and_embedding(weights_of(reference))
    for name in ("transformer.wte.weight", "lm_head.weight"):
        tensors[name] = tensors[name].clone()
        tensors[name][0, :2] = torch.tensor([float("nan"), float("inf")])
    model = load_model(write_checkpoint(tmp_path, tensors, tiny_config()))
    assert model.lm_head.weight[0, 0].isnan()
    assert model.lm_head.weight[0, 1].isinf()


# ------------------------------------------------------------------------------- dtype and device


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("asked", [None, "float32", torch.bfloat16, "float16", "float64"])
def test_the_dtype_is_the_stored_one_or_the_one_asked_for(
    tmp_path: Path,
    reference: GPTBigCodeForCausalLM,
    stored: torch.dtype,
    asked: torch.dtype | str | None,
) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in weights_of(reference).items()}
    model = load_model(write_checkpoint(tmp_path, tensors, tiny_config()), dtype=asked)
    expected = getattr(torch, asked) if isinstance(asked, str) else asked or stored
    assert model.dtype == expected
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, tensors[name].to(expected)), name


def test_tensors_of_several_dtypes_load_in_the_one_that_holds_them_all(
    tmp_path: Path, reference: GPTBigCodeForCausalLM
) -> None:
    tensors = {
        name: tensor.to(torch.float16) if tensor.ndim == 2 else tensor.to(torch.bfloat16)
        for name, tensor in weights_of(reference).items()
    }
    model = load_model(write_checkpoint(tmp_path, tensors, tiny_config()))
    assert model.dtype == torch.float32
    assert all(torch.equal(p, tensors[name].float()) for name, p in model.named_parameters())


@pytest.mark.parametrize("dtype", ["int8", "int", "", torch.int8, torch.float8_e4m3fn, 16])
def test_an_unknown_dtype_is_answered_with_the_known_ones(tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(InputError, match=r"dtype is .*expected one of float32, bfloat16"):
        load_model(tmp_path, dtype=dtype)


@pytest.mark.parametrize(
    ("names", "dtype"),
    [
        (["float32", "torch.float32", "float", "fp32"], torch.float32),
        (["bfloat16", "torch.bfloat16", "bf16"], torch.bfloat16),
        (["float16", "torch.float16", "half", "torch.half", "fp16"], torch.float16),
        (["float64", "double", "fp64"], torch.float64),
    ],
)
def test_a_dtype_has_all_its_usual_names(names: list[str], dtype: torch.dtype) -> None:
    assert {as_dtype(name) for name in [*names, dtype]} == {dtype}


CPU = torch.device("cpu")


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_run_in_float32_where_a_cpu_is_slow_in_them(
    monkeypatch: pytest.MonkeyPatch, stored: torch.dtype
) -> None:
    name = str(stored)[6:]
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(placement, "available_memory", lambda device: 4_000)
    dtype, why = fast_dtype(stored, CPU, 1_000)
    assert dtype == torch.float32
    assert why == (
        f"running in float32, since this processor multiplies no {name}; pass --dtype {name} "
        f"(dtype='{name}') to keep it"
    )
    dtype, why = fast_dtype(stored, CPU, 1_001)
    assert dtype == stored
    assert why is not None
    assert why.startswith(f"running in {name}, though this processor multiplies none: in float32 ")


def test_weights_keep_a_dtype_that_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert fast_dtype(torch.bfloat16, CPU, 1) == (torch.bfloat16, None)
    for stored in (torch.float32, torch.float64):
        assert fast_dtype(stored, CPU, 1) == (stored, None)
    assert fast_dtype(torch.float16, torch.device("cuda"), 1) == (torch.float16, None)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_the_stored_dtype_is_found_without_loading(
    tmp_path: Path, reference: GPTBigCodeForCausalLM, stored: torch.dtype
) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in weights_of(reference).items()}
    folder = write_checkpoint(tmp_path, tensors, tiny_config())
    assert read_checkpoint(folder).dtype == stored


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "cpu:x", "xla", "meta", "hpu", "mkldnn", ""])
@pytest.mark.filterwarnings("error")
def test_an_unavailable_device_is_named(tmp_path: Path, device: str) -> None:
    with pytest.raises(InputError, match=rf"device is '{device}'.*'cpu' always works"):
        load_model(tmp_path, device=device)


def test_an_unknown_backend_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="backend is 'flash'"):
        load_model(tmp_path / "nowhere", backend="flash")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_quantized_weights_are_refused_by_name(
    tmp_path: Path, reference: GPTBigCodeForCausalLM, dtype: torch.dtype
) -> None:
    name = "transformer.h.1.mlp.c_fc.weight"
    tensors = weights_of(reference)
    tensors[name] = torch.zeros_like(tensors[name]).to(dtype)
    folder = write_checkpoint(tmp_path, tensors, tiny_config())
    with pytest.raises(CheckpointError, match=f"{name} has the dtype .*only F32, BF16, F16, F64 "):
        load_model(folder)
    write_checkpoint(
        tmp_path, tensors, tiny_config(quantization_config={"quant_method": "bitsandbytes"})
    )
    with pytest.raises(CheckpointError, match="are quantized by 'bitsandbytes', which is not read"):
        load_model(folder)


@pytest.mark.parametrize("file", [WEIGHTS, "gptq_model-4bit-128g.safetensors"])
@pytest.mark.parametrize("says", ["names", "quantize_config.json", "quant_config.json"])
def test_gptq_and_awq_weights_are_named_as_such(
    tmp_path: Path, reference: GPTBigCodeForCausalLM, file: str, says: str
) -> None:
    tensors = weights_of(reference)
    del tensors["transformer.h.0.attn.c_proj.weight"]
    if says == "names":
        tensors["transformer.h.0.attn.c_proj.qweight"] = torch.zeros(2, 3, dtype=torch.int32)
    write_checkpoint(tmp_path, tensors, tiny_config())
    (tmp_path / WEIGHTS).rename(tmp_path / file)
    if says != "names":
        (tmp_path / says).write_text("{}")
    method = {"names": "GPTQ or AWQ", "quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    assert str(caught.value) == (
        f"the weights in {tmp_path} are quantized by {method[says]}, which is not read: load the "
        "checkpoint that they were made from, with quantize='int8' to save memory"
    )


# ------------------------------------------------------------------------------------ damaged files


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of this header, which may be wrong, and this data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | changes


DAMAGED = {
    "short": b"\1\2\3",
    "header longer than the file": safetensors(b"{}", length=1000),
    "header longer than 100 MB": safetensors(b"{}", length=101_000_000),
    "header of 2^64 bytes": safetensors(b"{}", length=2**64 - 1),
    "overlapping": safetensors({"a": entry(), "b": entry(data_offsets=[8, 24])}, bytes(24)),
    "holed": safetensors({"a": entry(), "b": entry(data_offsets=[20, 36])}, bytes(36)),
    "reversed": safetensors({"a": entry(data_offsets=[16, 0])}, bytes(16)),
    "negative": safetensors({"a": entry(data_offsets=[-16, 0])}, bytes(16)),
    "truncated": safetensors({"a": entry()}, bytes(15)),
    "trailing": safetensors({"a": entry()}, bytes(17)),
    "shape mismatch": safetensors({"a": entry(shape=[2, 3])}, bytes(16)),
    "shape overflow": safetensors({"a": entry(shape=[2**63, 2**63])}, bytes(16)),
    "unknown dtype": safetensors({"a": entry(dtype="F99")}, bytes(16)),
    "bad UTF-8": safetensors(b'{"\xff": {}}'),
    "not JSON": safetensors(b"hello"),
    "not an object": safetensors([1]),
    "deep": safetensors(b"[" * 100_000),
    "metadata of numbers": safetensors({"__metadata__": {"a": 1}}),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_named_with_its_size(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.json").write_text(tiny_config().to_json())
    (tmp_path / WEIGHTS).write_bytes(DAMAGED[kind])
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / WEIGHTS} ({len(DAMAGED[kind]):,} bytes) is not a valid")
    assert message.endswith("get it again")


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"", "is empty (0 bytes): get it again"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n",
            "is a git-lfs pointer, not the weights: run `git lfs pull`",
        ),
        (b"PK\x03\x04" + bytes(100), "is a zip archive: unpack it, or get the file itself"),
        (b"\x80\x02}q\x00." + bytes(9), "is a pickle (PyTorch's .bin format), which can run code"),
    ],
)
def test_other_file_formats_are_named(tmp_path: Path, head: bytes, expected: str) -> None:
    (tmp_path / "config.json").write_text(tiny_config().to_json())
    (tmp_path / WEIGHTS).write_bytes(head)
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    assert expected in str(caught.value)
    assert str(tmp_path / WEIGHTS) in str(caught.value)


def test_a_file_that_may_not_be_read_is_named(
    tmp_path: Path, reference: GPTBigCodeForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, weights_of(reference), tiny_config())

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:  # root ignores permissions, so they are simulated
        patch.setattr(weight_files, "safe_open", refuse)
        patch.setattr(Path, "open", refuse)
        with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: Permission"):
            stored_tensors(tmp_path)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: Permission"):
        load_model(tmp_path)


@pytest.mark.parametrize("files", [["pytorch_model.bin"], ["model.pt", "x.pth"], []])
def test_a_folder_without_safetensors_is_refused_with_the_reason_and_the_way_out(
    tmp_path: Path, files: list[str]
) -> None:
    (tmp_path / "config.json").write_text(tiny_config().to_json())
    for file in files:
        (tmp_path / file).write_bytes(b"\x80\x02.")
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    message = str(caught.value)
    assert all(file in message for file in files)
    assert "opening a pickle (.bin, .pt) can run code" in message
    assert "save_pretrained" in message


def test_safetensors_under_another_name_are_pointed_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(tiny_config().to_json())
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"\['weights.safetensors'\]: rename"):
        load_model(tmp_path)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff\xfe{}", b"{'a': 1}", b"[" * 100_000, b"9" * 5000, b'{"n_layer": 2,}'],
)
def test_a_config_that_is_not_json_is_named(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ConfigError, match=r"config\.json is not valid JSON \(.*\): get it again"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], "a config must be a JSON object"),
        ({"n_layer": -1}, "n_layer is -1"),
        ({"n_head": 5, "n_embd": 64}, "n_embd must be a multiple of n_head"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"activation_function": "swish"}, "activation_function is 'swish'"),
        ({"add_cross_attention": True}, "add_cross_attention"),
    ],
)
def test_a_config_that_cannot_be_run_is_named_with_its_file(
    tmp_path: Path, values: object, expected: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert expected in str(caught.value)


def test_a_config_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + tiny_config().to_json().encode())
    assert read_config(tmp_path).n_embd == tiny_config().n_embd


# -------------------------------------------------------------------------- names, shapes, indexes


def problems_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The problems that loading lists, having allocated nothing."""

    def fail(*_: object) -> None:
        raise AssertionError("loading went on to allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "require_memory", fail)
        with pytest.raises(CheckpointError) as caught:
            load_model(folder)
    lines = str(caught.value).splitlines()
    assert str(folder) in lines[0]
    return [line.strip() for line in lines[1:]]


def test_missing_unexpected_and_misshaped_weights_are_listed_at_once(
    tmp_path: Path, reference: GPTBigCodeForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = weights_of(reference)
    del tensors["transformer.ln_f.bias"]
    tensors["transformer.h.0.mlp.c_fc.weight"] = torch.zeros(60, 136)
    tensors["transformer.h.0.mlp.c_fc.bias"] = torch.zeros(0)
    tensors["transformer.h.2.ln_1.weight"] = torch.zeros(60)
    tensors["transformer.h.0.attn.rotary.inv_freq"] = torch.zeros(2)
    assert set(problems_of(write_checkpoint(tmp_path, tensors, tiny_config()), monkeypatch)) == {
        "transformer.ln_f.bias is missing",
        "transformer.h.0.mlp.c_fc.weight has the shape [60, 136] instead of [136, 60]",
        "transformer.h.0.mlp.c_fc.bias has the shape [0] instead of [136]",
        "'transformer.h.2.ln_1.weight' is unexpected",
        "'transformer.h.0.attn.rotary.inv_freq' is unexpected",
    }


@pytest.mark.parametrize(
    "name", ["../../escaped", "/escaped", "..\\escaped", "a\0b", "\x1b[2J", "transformer.../x", ""]
)
def test_a_name_is_never_a_path_and_never_printed_raw(
    tmp_path: Path, reference: GPTBigCodeForCausalLM, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    tensors = weights_of(reference) | {name: torch.zeros(1)}
    folder = write_checkpoint(tmp_path / "checkpoint", tensors, tiny_config())
    before = sorted(tmp_path.rglob("*"))
    assert problems_of(folder, monkeypatch) == [f"{name!r} is unexpected"]
    assert sorted(tmp_path.rglob("*")) == before


def test_only_the_mask_buffers_are_skipped(
    tmp_path: Path, reference: GPTBigCodeForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["transformer.h.x.attn.bias", "transformer.attn.bias", "transformer.h.0.attn.bias.x"]
    tensors = weights_of(reference) | {name: torch.zeros(1) for name in names}
    del tensors["transformer.h.0.attn.c_attn.bias"]
    assert set(problems_of(write_checkpoint(tmp_path, tensors, tiny_config()), monkeypatch)) == {
        "transformer.h.0.attn.c_attn.bias is missing",
        *(f"{name!r} is unexpected" for name in names),
    }


def test_the_same_weight_under_two_names_is_refused(
    tmp_path: Path, reference: GPTBigCodeForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = weights_of(reference) | {"ln_f.bias": torch.zeros(60)}
    folder = write_checkpoint(tmp_path, tensors, tiny_config())
    assert problems_of(folder, monkeypatch) == [
        "'transformer.ln_f.bias' and 'ln_f.bias' are the same weight"
    ]


def test_an_untied_config_needs_the_head(
    tmp_path: Path, reference: GPTBigCodeForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(
        tmp_path, weights_of(reference), tiny_config(tie_word_embeddings=False)
    )
    assert problems_of(folder, monkeypatch) == ["lm_head.weight is missing"]
    folder = write_checkpoint(tmp_path, with_only_the_head(weights_of(reference)), tiny_config())
    assert load_model(folder)
    folder = write_checkpoint(
        tmp_path,
        with_only_the_head(weights_of(reference)),
        tiny_config(tie_word_embeddings=False),
    )
    assert problems_of(folder, monkeypatch) == ["transformer.wte.weight is missing"]


def test_a_tied_head_must_have_the_shape_of_the_embedding(
    tmp_path: Path, reference: GPTBigCodeForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = weights_of(reference) | {"lm_head.weight": torch.zeros(96, 60)}
    folder = write_checkpoint(tmp_path, tensors, tiny_config())
    assert problems_of(folder, monkeypatch) == [
        "lm_head.weight has the shape [96, 60] instead of [97, 60]"
    ]


def test_separate_queries_are_an_error_where_they_cannot_be_santacoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, tensors = original_santacoder(tiny_config())
    folder = write_checkpoint(tmp_path, tensors, tiny_config(multi_query=False))
    problems = problems_of(folder, monkeypatch)
    assert "transformer.h.0.attn.c_attn.weight is missing" in problems
    assert "'transformer.h.0.attn.q_attn.weight' is unexpected" in problems


def test_many_problems_are_counted(
    tmp_path: Path, reference: GPTBigCodeForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = weights_of(reference) | {f"x{i}": torch.zeros(1) for i in range(30)}
    folder = write_checkpoint(tmp_path, tensors, tiny_config())
    problems = problems_of(folder, monkeypatch)
    assert len(problems) == 21
    assert problems[-1] == "... and 10 more"


def test_a_config_of_absurd_depth_is_answered_at_once(
    tmp_path: Path, reference: GPTBigCodeForCausalLM
) -> None:
    folder = write_checkpoint(tmp_path, weights_of(reference), tiny_config(n_layer=2**28))
    with pytest.raises(CheckpointError, match=r"holds 28 weights, too few for the n_layer of 268"):
        load_model(folder)


@pytest.mark.parametrize("key", ["vocab_size", "n_positions", "n_embd", "n_inner"])
def test_a_config_of_absurd_width_is_answered_without_allocating(
    tmp_path: Path,
    reference: GPTBigCodeForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
    key: str,
) -> None:
    config = tiny_config(**{key: 3 * 2**26})
    assert problems_of(write_checkpoint(tmp_path, weights_of(reference), config), monkeypatch)


def test_a_missing_shard_and_keys_that_are_elsewhere_are_listed_at_once(
    tmp_path: Path, reference: GPTBigCodeForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_sharded(tmp_path, halves(weights_of(reference)), tiny_config())
    index = json.loads((folder / INDEX).read_text())
    first = "model-00001-of-00002.safetensors"
    inside = next(name for name, file in index["weight_map"].items() if file == first)
    index["weight_map"]["transformer.invented"] = first
    index["weight_map"][inside] = "model-00003-of-00003.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"")
    assert set(problems_of(folder, monkeypatch)) == {
        f"{folder}/model-00002-of-00002.safetensors is empty (0 bytes): get it again",
        "'model-00003-of-00003.safetensors' is missing",
        f"{first} lacks 'transformer.invented'",
        f"{first} holds {inside!r}, which the index does not place there",
    }


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "{outside}",
        "sub/inside.safetensors",
        "..\\outside.safetensors",
        "C:outside.safetensors",
        "..",
        ".",
        "",
        "pytorch_model.bin",
        "a\0.safetensors",
        "\x1b[2J.safetensors",
        "\ud800.safetensors",
        "x" * 300 + ".safetensors",
        None,
        1,
        ["a.safetensors"],
        {},
    ],
)
def test_an_index_that_names_anything_but_a_file_in_its_folder_is_refused(
    tmp_path: Path, reference: GPTBigCodeForCausalLM, monkeypatch: pytest.MonkeyPatch, shard: Any
) -> None:
    folder = tmp_path / "checkpoint"
    write_sharded(folder, halves(weights_of(reference)), tiny_config())
    (folder / "sub").mkdir()
    for file in (tmp_path / "outside.safetensors", folder / "sub" / "inside.safetensors"):
        save_file({"transformer.ln_f.bias": torch.zeros(60)}, file)
    if shard == "{outside}":
        shard = str(tmp_path / "outside.safetensors")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["transformer.ln_f.bias"] = shard
    (folder / INDEX).write_text(json.dumps(index))
    opened: list[Path] = []
    real = weight_files.safe_open
    monkeypatch.setattr(
        weight_files, "safe_open", lambda file, **kw: opened.append(file) or real(file, **kw)
    )
    assert problems_of(folder, monkeypatch)[0].startswith("'transformer.ln_f.bias' is in ")
    assert not opened


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{"])
def test_an_index_without_a_map_is_refused(
    tmp_path: Path, reference: GPTBigCodeForCausalLM, text: str
) -> None:
    write_sharded(tmp_path, halves(weights_of(reference)), tiny_config())
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json (has no weight_map|is not valid JSON)"):
        load_model(tmp_path)


def add_to_index(folder: Path, names: Iterable[str], shard: str) -> None:
    """Have the folder's index promise more names, in the form that transformers reads."""
    index = json.loads((folder / INDEX).read_text()) | {"metadata": {}}
    index["weight_map"] |= dict.fromkeys(names, shard)
    (folder / INDEX).write_text(json.dumps(index))


def test_an_index_may_promise_what_is_not_needed_as_in_transformers(
    tmp_path: Path, reference: GPTBigCodeForCausalLM
) -> None:
    write_sharded(tmp_path, halves(weights_of(reference)), tiny_config())
    optional = ("lm_head.weight", "transformer.h.0.attn.bias", "h.1.attn.masked_bias")
    add_to_index(tmp_path, optional, "model-00002-of-00002.safetensors")
    assert_same_weights(load_model(tmp_path), reference)
    assert_same_weights(GPTBigCodeForCausalLM.from_pretrained(tmp_path), reference)


def test_an_index_may_leave_out_what_is_not_needed(
    tmp_path: Path, reference: GPTBigCodeForCausalLM
) -> None:
    tensors = with_mask_buffers(with_head_and_embedding(weights_of(reference)))
    write_sharded(tmp_path, halves(tensors), tiny_config())
    index = json.loads((tmp_path / INDEX).read_text())
    needed = weights_of(reference)
    index["weight_map"] = {n: shard for n, shard in index["weight_map"].items() if n in needed}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert_same_weights(load_model(tmp_path), reference)


def test_an_untied_head_that_only_the_index_promises_is_missing(
    tmp_path: Path, reference: GPTBigCodeForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tie_word_embeddings=False)
    write_sharded(tmp_path, halves(weights_of(reference)), config)
    add_to_index(tmp_path, ["lm_head.weight"], "model-00002-of-00002.safetensors")
    assert problems_of(tmp_path, monkeypatch) == ["lm_head.weight is missing"]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "model.x."])
@pytest.mark.parametrize("layout", [dict, without_prefix, with_head_and_embedding])
def test_a_prefix_of_all_names_is_named_in_one_line(
    tmp_path: Path,
    reference: GPTBigCodeForCausalLM,
    prefix: str,
    layout: Callable[[Tensors], Tensors],
) -> None:
    tensors = {prefix + name: tensor for name, tensor in layout(weights_of(reference)).items()}
    with pytest.raises(CheckpointError) as caught:
        load_model(write_checkpoint(tmp_path, tensors, tiny_config()))
    assert str(caught.value).startswith(f"all weights in {tmp_path} have the prefix {prefix!r}")
    assert len(str(caught.value).splitlines()) == 1


def test_a_prefix_of_one_name_is_not_that_of_all(
    tmp_path: Path, reference: GPTBigCodeForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = weights_of(reference) | {"module.transformer.ln_f.bias": torch.zeros(60)}
    folder = write_checkpoint(tmp_path, tensors, tiny_config())
    assert problems_of(folder, monkeypatch) == ["'module.transformer.ln_f.bias' is unexpected"]


@pytest.mark.parametrize("base", ['"bigcode/starcoderbase-1b"', "null", "[1]"])
def test_an_adapter_folder_is_named_as_one(tmp_path: Path, base: str) -> None:
    (tmp_path / "adapter_config.json").write_text(f'{{"base_model_name_or_path": {base}}}')
    save_file({"base_model.model.x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    name = json.loads(base)
    of = "a model that it does not name" if name is None else repr(name)
    expected = f"{tmp_path} holds a peft adapter for {of}, not a model: load the"
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        load_model(tmp_path)


def test_ignored_files_and_defaults_are_noted(
    tmp_path: Path, reference: GPTBigCodeForCausalLM
) -> None:
    write_checkpoint(tmp_path, weights_of(reference), tiny_config())
    assert read_checkpoint(tmp_path).notes == []
    values = {"eos_token_id": 1, "transformers_version": "5", "_from_model_config": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(values | {"top_k": None}))
    assert read_checkpoint(tmp_path).notes == []
    values |= {"temperature": 0.2, "max_length": 20}
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    (tmp_path / "adapter_config.json").write_text("{}")
    assert read_checkpoint(tmp_path).notes == [
        f"the defaults in {tmp_path}/generation_config.json are not used: {{'max_length': 20, "
        "'temperature': 0.2}; choose sampling and length by options",
        f"the peft adapter in {tmp_path} is not used: only the full weights there are loaded",
    ]
    assert_same_weights(load_model(tmp_path), reference)


# ------------------------------------------------------------------------------------- end tokens


@pytest.mark.parametrize("ours", [3, [3, 4], None])
@pytest.mark.parametrize("values", [None, {"eos_token_id": 5}, {"eos_token_id": [5, 1]}])
def test_the_end_tokens_are_those_at_which_transformers_stops(
    tmp_path: Path,
    reference: GPTBigCodeForCausalLM,
    ours: int | list[int] | None,
    values: dict[str, Any] | None,
) -> None:
    write_checkpoint(tmp_path, weights_of(reference), tiny_config(eos_token_id=ours))
    if values is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(values))
    theirs = GPTBigCodeForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id
    model = load_model(tmp_path)
    assert model.config.eos_token_id == theirs
    model.save_pretrained(tmp_path / "again")
    again = GPTBigCodeForCausalLM.from_pretrained(tmp_path / "again").generation_config
    assert again.eos_token_id == theirs
    assert read_config(tmp_path / "again").eos_token_id == theirs


def test_the_configs_end_token_counts_where_generation_config_names_none(
    tmp_path: Path, reference: GPTBigCodeForCausalLM
) -> None:
    write_checkpoint(tmp_path, weights_of(reference), tiny_config(eos_token_id=3))
    for text in ("{}", '{"eos_token_id": null, "temperature": 1}'):
        (tmp_path / "generation_config.json").write_text(text)
        assert load_model(tmp_path).config.eos_token_id == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is not a JSON object: get it again, or remove it"),
        ('{"eos_token_id": "1"}', ": eos_token_id is '1': it must be an integer, a list of"),
        ('{"eos_token_id": [true]}', ": eos_token_id is [True]: it must be an integer, a list of"),
    ],
)
def test_a_broken_generation_config_is_named(
    tmp_path: Path, reference: GPTBigCodeForCausalLM, text: str, expected: str
) -> None:
    write_checkpoint(tmp_path, weights_of(reference), tiny_config())
    file = tmp_path / "generation_config.json"
    file.write_text(text)
    for read in (load_model, read_config):
        with pytest.raises(CheckpointError) as caught:
            read(tmp_path)
        assert str(caught.value).startswith(str(file))
        assert expected in str(caught.value)


# ------------------------------------------------------------------ files that change meanwhile


def test_a_file_that_is_replaced_while_it_is_read_is_read_as_it_was(
    tmp_path: Path, reference: GPTBigCodeForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "a", weights_of(reference), tiny_config())
    other = reference_model(tiny_config(), seed=1)
    write_checkpoint(tmp_path / "b", weights_of(other), tiny_config())
    real, reads = checkpoint._read, []

    def read(*args: Any, **kwargs: Any) -> torch.Tensor:
        reads.append(args)
        if len(reads) == 5:
            (tmp_path / "b" / WEIGHTS).replace(tmp_path / "a" / WEIGHTS)
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "_read", read)
    assert_same_weights(load_model(tmp_path / "a"), reference)
    assert_same_weights(load_model(tmp_path / "a"), other)


def test_a_file_that_is_overwritten_while_it_is_read_is_an_error(
    tmp_path: Path, reference: GPTBigCodeForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_checkpoint(tmp_path, weights_of(reference), tiny_config()) / WEIGHTS
    data = file.read_bytes()
    real, reads = checkpoint._read, []

    def read(*args: Any, **kwargs: Any) -> torch.Tensor:
        reads.append(args)
        if len(reads) == 5:
            with file.open("r+b") as stream:
                stream.write(data)
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "_read", read)
    with pytest.raises(CheckpointError, match=r"safetensors was overwritten while it was read"):
        load_model(tmp_path)


@pytest.mark.parametrize("when", ["before the shards", "between the shards"])
def test_shards_of_two_savings_are_never_mixed(
    tmp_path: Path,
    reference: GPTBigCodeForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    folder = write_sharded(tmp_path, halves(weights_of(reference)), tiny_config())
    other = reference_model(tiny_config(activation_function="relu"), seed=1)
    new = GPT(tiny_config(activation_function="relu"))
    new.load_state_dict(other.state_dict())
    real, opened = weight_files.WeightFile.__init__, []

    def opening(self: weight_files.WeightFile, path: Path) -> None:
        opened.append(path.name)
        if len(opened) == (1 if when == "before the shards" else 2):
            (folder / INDEX).rename(folder / "old-index")
            write_sharded(folder, halves(weights_of(other)), new.config)
        real(self, path)

    monkeypatch.setattr(weight_files.WeightFile, "__init__", opening)
    model = load_model(folder)
    assert_same_weights(model, new)
    assert model.config.activation_function == "relu"
    assert len(opened) == 4


def test_a_folder_that_is_always_being_written_is_an_error(
    tmp_path: Path, reference: GPTBigCodeForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path, weights_of(reference), tiny_config())
    real = headers.stored_tensors

    def read(folder: Path) -> list[weight_files.StoredTensor]:
        tensors = real(folder)
        write_checkpoint(folder, weights_of(reference), tiny_config())
        return tensors

    monkeypatch.setattr(headers, "stored_tensors", read)
    with pytest.raises(CheckpointError, match="is being written by another process: load it when"):
        load_model(folder)


def test_links_into_a_cache_are_followed(tmp_path: Path, reference: GPTBigCodeForCausalLM) -> None:
    blobs = write_sharded(tmp_path / "blobs", halves(weights_of(reference)), tiny_config())
    (tmp_path / "snapshot").mkdir()
    for file in blobs.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(Path("..") / "blobs" / file.name)
    assert_same_weights(load_model(tmp_path / "snapshot"), reference)


def test_stored_tensors_describes_what_is_there(
    tmp_path: Path, reference: GPTBigCodeForCausalLM
) -> None:
    tensors = with_mask_buffers(weights_of(reference))
    shards = halves(tensors)
    write_sharded(tmp_path, shards, tiny_config())
    found = stored_tensors(tmp_path)
    assert {t.name: (t.shape, t.file.path.name) for t in found} == {
        name: (tuple(tensor.shape), file)
        for file, part in shards.items()
        for name, tensor in part.items()
    }
    assert {t.dtype for t in found} == {"F32", "BOOL"}


# ------------------------------------------------------------------------------------------ memory


def test_a_model_that_does_not_fit_is_refused_with_numbers_and_a_way_out(
    tmp_path: Path, reference: GPTBigCodeForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path, weights_of(reference), tiny_config())
    elements = sum(tensor.numel() for tensor in weights_of(reference).values())
    needed, needed_16 = 4 * elements, 2 * elements

    def available(room: int | None) -> None:
        monkeypatch.setattr(placement, "available_memory", lambda device: room)

    available(needed)
    assert load_model(folder, device="cpu")
    available(needed - 1)
    with pytest.raises(CheckpointError, match=r"needs .* float32.*dtype='bfloat16' takes .* fit"):
        load_model(folder, device="cpu")
    available(needed_16)
    assert load_model(folder, device="cpu", dtype="bfloat16")
    available(needed_16 - 1)
    with pytest.raises(CheckpointError, match=r"on cpu: quantize='int8' would fit"):
        load_model(folder, device="cpu", dtype="bfloat16")
    available(elements)
    for quantize in (None, "int8"):
        with pytest.raises(CheckpointError, match=r"on cpu: it needs a device with more memory"):
            load_model(folder, device="cpu", dtype="bfloat16", quantize=quantize)
    available(None)
    assert load_model(folder, device="cpu")


def test_a_model_too_large_for_the_accelerator_is_pointed_to_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    room = {"cuda": 5 * 10**9, "cpu": 90 * 10**9}
    monkeypatch.setattr(placement, "available_memory", lambda device: room[device.type])
    model = checkpoint.empty_model(GPTConfig.preset("starcoderbase-7b"))
    with pytest.raises(CheckpointError) as caught:
        placement.require_memory(Path("x"), model, torch.float32, torch.device("cuda"))
    assert str(caught.value) == (
        "x needs 29.31 GB in float32, and 43.0 kB for each token in the KV cache, but 5.00 GB are "
        "available on cuda: device='cpu' has room for it"
    )


# The peak that Linux keeps for this program; getrusage's includes the parent's before the start.
MEASURE = """
import re, sys
from pathlib import Path
from mqa_gpt.checkpoints.load import load_model

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

load_model(sys.argv[1])  # a small one first: what loading imports and starts is not its memory
before = peak()
model = load_model(sys.argv[2], dtype=sys.argv[3])
print(peak() - before)
"""


@pytest.fixture(scope="module")
def large() -> GPT:
    """A model of 120 MB in float32."""
    config = tiny_config(n_embd=512, n_head=8, n_inner=2048, n_layer=10, vocab_size=8000)
    model = checkpoint.empty_model(config).to_empty(device="cpu")
    model.lm_head.weight = model.transformer.wte.weight
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
    return model


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_the_model_and_its_largest_tensor_at_most(
    tmp_path: Path, reference: GPTBigCodeForCausalLM, large: GPT, dtype: str
) -> None:
    write_checkpoint(tmp_path / "small", weights_of(reference), tiny_config())
    large.save_pretrained(tmp_path / "large", max_shard_size="80MB")
    elements = [parameter.numel() for parameter in large.parameters()]
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "small", tmp_path / "large", dtype],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    in_model = sum(elements) * getattr(torch, dtype).itemsize
    largest_stored = max(elements) * 4
    assert in_model <= int(result.stdout) <= in_model + largest_stored + 8e6


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_does_not_follow_the_file_that_it_was_read_from(
    tmp_path: Path,
    reference: GPTBigCodeForCausalLM,
    quantize: str | None,
    dtype: torch.dtype,
) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in weights_of(reference).items()}
    file = write_checkpoint(tmp_path / "model", weights, tiny_config()) / WEIGHTS
    model = load_model(tmp_path / "model", quantize=quantize)
    ids = random_ids(model.config, 2, 9)
    with torch.inference_mode():
        expected = model(ids)
        with file.open("r+b") as stream:  # in place: the same inode, and so the same mapping
            size = file.stat().st_size
            stream.seek(size // 20)
            stream.write(bytes(size - size // 20))
        assert torch.equal(model(ids), expected)
