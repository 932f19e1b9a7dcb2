"""Whatever a checkpoint holds, it loads or raises a typed error, in bounded time and memory, and no
other file is opened.

MQA_GPT_FUZZ is the number of inputs for each test; a few hundred without it.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mqa_gpt import GPT, CheckpointError, ConfigError, GPTConfig
from mqa_gpt.checkpoints import files as weight_files
from mqa_gpt.machine import peak_memory

pytestmark = [pytest.mark.fuzz, pytest.mark.slow]

CONFIG = GPTConfig(
    vocab_size=5, n_positions=3, n_embd=4, n_layer=1, n_head=2, n_inner=3, bos_token_id=0
)
INDEX = "model.safetensors.index.json"
EXAMPLES = int(os.environ.get("MQA_GPT_FUZZ", "0"))
fuzz = settings(
    max_examples=EXAMPLES or 200, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

texts = st.text(st.characters(), max_size=20)  # every code point, lone surrogates included
numbers = st.integers() | st.integers(-3, 9) | st.floats() | st.sampled_from([2**28, 2**63, 1e308])
json_values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)

opened: list[str] | None = None  # what was opened while `check` looks


def record(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook, which cannot be removed: idle unless `check` looks."""
    if opened is not None and event == "open":
        opened.append(str(arguments[0]))


sys.addaudithook(record)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A valid checkpoint, in one file and in shards, and a file outside that must not be opened."""
    folder = tmp_path / "checkpoint"
    GPT(CONFIG).save_pretrained(folder)
    GPT(CONFIG).save_pretrained(tmp_path / "sharded", max_shard_size=150)
    for file in (tmp_path / "sharded").iterdir():
        file.replace(folder / file.name)
    save_file({"transformer.ln_f.bias": torch.zeros(4)}, tmp_path / "outside.safetensors")
    real = weight_files.safe_open

    def recorded(file: Path, **kwargs: Any) -> Any:
        record("open", (Path(file).resolve(),))  # of /proc/self/fd: the file
        return real(file, **kwargs)

    monkeypatch.setattr(weight_files, "safe_open", recorded)
    return folder


def check(folder: Path) -> None:
    """Load; the outcome must be a model that runs, or a typed error that is safe to print."""
    global opened
    opened = files = []
    started, before = time.monotonic(), peak_memory() or 0
    try:
        model = GPT.from_pretrained(folder, device="cpu")
    except (CheckpointError, ConfigError) as error:
        message = str(error)
        assert str(folder) in message
        assert all(line.isprintable() for line in message.splitlines())
        assert len(message) < 6000
    else:
        with torch.no_grad():
            assert model(torch.tensor([[0]])).shape == (1, 1, model.config.vocab_size)
    finally:
        opened = None
    touched = {Path(file).resolve() for file in files if "outside" in file or ".safe" in file}
    assert all(file.parent == folder for file in touched), touched
    assert time.monotonic() - started < 10
    assert (peak_memory() or 0) - before < 10**9


def test_a_file_outside_is_noticed_and_no_file_is_recorded_afterwards(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def escape(*_: object, **__: object) -> None:
        (folder.parent / "outside.safetensors").read_bytes()
        raise CheckpointError(str(folder))

    monkeypatch.setattr(GPT, "from_pretrained", escape)
    with pytest.raises(AssertionError, match="outside"):
        check(folder)
    assert opened is None


@fuzz
@given(st.data())
def test_a_weights_file_of_changed_bytes(folder: Path, data: st.DataObject) -> None:
    file = folder / "model.safetensors"
    sound = file.read_bytes()
    changed = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 3))):
        # Mostly within the header, where the bytes mean something.
        place = data.draw(st.integers(0, 200) | st.integers(0, len(changed)))
        match data.draw(st.sampled_from(["change", "cut", "insert", "remove"])):
            case "change":
                changed[place : place + 1] = data.draw(st.binary(min_size=1, max_size=1))
            case "cut":
                del changed[place:]
            case "insert":
                changed[place:place] = data.draw(st.binary(min_size=1, max_size=9))
            case "remove":
                del changed[place : place + data.draw(st.integers(1, 9))]
    file.write_bytes(changed)
    check(folder)
    file.write_bytes(sound)


names = st.sampled_from([*GPT(CONFIG).state_dict(), "../../x", "/etc/passwd", "h.0.attn.bias"])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I8", "F8_E4M3", "F4", "?"]),
        "shape": st.lists(st.integers(-1, 9) | st.sampled_from([2**31, 2**62, 2**63]), max_size=3),
        "data_offsets": st.lists(st.integers(-1, 400), min_size=1, max_size=3).map(sorted),
    }
)


@fuzz
@given(
    header=st.dictionaries(names | texts, entries | json_values, max_size=5) | json_values,
    replace=st.booleans(),
    size=st.integers(0, 400),
)
def test_a_weights_file_of_any_header(folder: Path, header: Any, replace: bool, size: int) -> None:
    file = folder / "model.safetensors"
    sound = file.read_bytes()
    data = bytes(size)
    if not replace and isinstance(header, dict):  # a sound header with some entries changed
        length = struct.unpack("<Q", sound[:8])[0]
        header = json.loads(sound[8 : 8 + length]) | header
        data = sound[8 + length :]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    check(folder)
    file.write_bytes(sound)


shards = st.sampled_from(
    [
        "model-00001-of-00009.safetensors",
        "model-00002-of-00009.safetensors",
        "model.safetensors",
        "../outside.safetensors",
        "sub/../../outside.safetensors",
        "{folder}/../outside.safetensors",
        "~/outside.safetensors",
        "..",
        "config.json",
    ]
)


@fuzz
@given(
    changes=st.dictionaries(names | texts, shards | json_values, max_size=4),
    whole=st.none() | json_values,
)
def test_an_index_of_anything(folder: Path, changes: dict[str, Any], whole: Any) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    file = folder / INDEX
    sound = file.read_text()
    index = json.loads(sound)
    index["weight_map"] |= {
        name: shard.replace("{folder}", str(folder)) if isinstance(shard, str) else shard
        for name, shard in changes.items()
    }
    file.write_text(json.dumps(index if whole is None else whole))
    check(folder)
    file.write_text(sound)


configs = st.dictionaries(
    st.sampled_from(
        [
            *CONFIG.to_dict(),
            "hidden_size",
            "num_hidden_layers",
            "attention_head_type",
            "add_cross_attention",
            "quantization_config",
            "dtype",
            "torch_dtype",
        ]
    )
    | texts,
    json_values,
    max_size=4,
)


@fuzz
@given(configs)
@example({"model_type": "gpt2", "attention_head_type": "multiquery"})
@example({"n_layer": 2**28})
def test_a_config_of_anything(folder: Path, changes: dict[str, Any]) -> None:
    file = folder / "config.json"
    sound = file.read_text()
    file.write_text(json.dumps(json.loads(sound) | changes))
    check(folder)
    file.write_text(sound)


@fuzz
@given(
    st.dictionaries(st.sampled_from(["eos_token_id", "top_p"]) | texts, json_values, max_size=4)
    | json_values
)
def test_a_generation_config_of_anything(folder: Path, values: Any) -> None:
    file = folder / "generation_config.json"
    sound = file.read_text()
    file.write_text(json.dumps(values))
    check(folder)
    file.write_text(sound)


@settings(max_examples=EXAMPLES or 300)
@given(configs | json_values)
def test_a_config_is_refused_or_written_as_it_was_read(values: Any) -> None:
    try:
        config = GPTConfig.from_dict(values)
    except ConfigError:
        return
    assert config.head_dim * config.n_head == config.n_embd
    assert all(isinstance(token, int) for token in config.end_token_ids)
    text = config.to_json()
    assert GPTConfig.from_dict(json.loads(text)).to_json() == text


@settings(max_examples=EXAMPLES or 100)
@given(text=st.binary(max_size=60) | json_values.map(lambda v: json.dumps(v).encode()))
@pytest.mark.parametrize("name", ["config.json", INDEX, "generation_config.json"])
def test_a_json_file_of_any_bytes(
    tmp_path_factory: pytest.TempPathFactory, name: str, text: bytes
) -> None:
    folder = tmp_path_factory.getbasetemp() / "json"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(CONFIG.to_json())
    (folder / name).write_bytes(text)
    check(folder)
